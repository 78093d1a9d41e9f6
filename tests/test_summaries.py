"""Means, spread and intervals against closed forms, scipy, and what they promise over many data sets."""

from __future__ import annotations

import json
import tracemalloc
import warnings

import numpy as np
import pytest
import scipy.stats
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from probekit.errors import MetricError, UsageError
from probekit.metric import Metric, Row, Traces
from probekit.store.results import read_result, write_result
from probekit.summaries import (
    bootstrap_interval,
    image_curve,
    layer_coordinates,
    paired_difference,
    summarize,
    summary,
)

pytestmark = pytest.mark.filterwarnings("error")


class NMI(Metric):
    name = "nmi"
    version = 3
    needs = frozenset({"attention"})
    dims = {"nmi": ("head",)}
    units = {"nmi": "1"}
    figure = "Fig. 4"
    conventions = {"prefix": "dropped", "log": "natural"}


class Spectrum(Metric):
    name = "spectrum"
    needs = frozenset({"tokens"})
    dims = {"amplitude": ("frequency",), "gap": (), "both": ("head", "frequency")}
    units = {"amplitude": "log", "frequency": "pi"}


class Last(Spectrum):
    dims = {"amplitude": ("frequency",)}
    curve = "last"


def rows(count: int, heads: int = 4, stride=(16.0, 16.0)) -> list[Row]:
    return [
        Row(f"blocks.{i}", i + 1.0, "attention", "encoder", i // 2, heads, (14, 7), stride)
        for i in range(count)
    ]


def traces(seed=0, images=20, layers=3, heads=4, **values) -> Traces:
    if not values:
        values = {"nmi": np.random.default_rng(seed).normal(1, 2, (images, layers, heads)).astype(np.float32)}
    count, layers = next(iter(values.values())).shape[:2]
    return Traces(values, rows(layers), [f"{i}.jpg" for i in range(count)], seed=0)


# ---------------------------------------------------------------------------------------- default result


def test_means_and_spread_against_numpy():
    data = traces()
    ds = summarize(NMI(temperature=2), data)
    x = data["nmi"].astype(np.float64)
    assert ds.nmi.dims == ("layer", "head")
    np.testing.assert_allclose(ds.nmi, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(ds.nmi_sd, x.std(0, ddof=1), rtol=1e-13)
    np.testing.assert_allclose(ds.nmi_sem, x.std(0, ddof=1) / np.sqrt(20), rtol=1e-13)
    np.testing.assert_allclose(ds.nmi_curve, x.mean((0, 2)), rtol=1e-13)
    np.testing.assert_allclose(ds.nmi_head_sd, x.mean(0).std(1), rtol=1e-12)
    assert ds.nmi_head_sd.attrs["ddof"] == 0
    assert ((ds.nmi_low < ds.nmi) & (ds.nmi < ds.nmi_high)).all()
    assert ((ds.nmi_curve_low < ds.nmi_curve) & (ds.nmi_curve < ds.nmi_curve_high)).all()
    assert all(ds[name].dtype == np.float64 for name in ds.data_vars)
    assert all(ds[name].attrs["units"] == "1" for name in ds.data_vars)
    assert set(ds.data_vars) == {
        *("nmi", "nmi_sd", "nmi_sem", "nmi_low", "nmi_high"),
        *("nmi_curve", "nmi_curve_low", "nmi_curve_high", "nmi_head_sd"),
    }


def test_attributes_and_coordinates():
    ds = summarize(NMI(temperature=2), traces())
    assert {k: v for k, v in ds.attrs.items() if k not in ("conventions", "options")} == {
        "metric": "nmi",
        "version": 3,
        "figure": "Fig. 4",
        "images": 20,
        "interval": "95 % percentile bootstrap over images, 1000 resamples, seed 0",
        "ddof": 1,
    }
    assert json.loads(ds.attrs["conventions"]) == {"prefix": "dropped", "log": "natural"}
    assert json.loads(ds.attrs["options"]) == {"temperature": 2}
    assert list(ds.layer.values) == ["blocks.0", "blocks.1", "blocks.2"]
    assert list(ds["head"].values) == [0, 1, 2, 3]
    for name, expected in {
        "depth": [1, 2, 3],
        "stage": [0, 0, 1],
        "grid_rows": [14] * 3,
        "grid_cols": [7] * 3,
        "stride": [16] * 3,
        "site": ["attention"] * 3,
        "part": ["encoder"] * 3,
    }.items():
        assert list(ds[name].values) == expected
        assert ds[name].dims == ("layer",)
    uneven = layer_coordinates(rows(2, stride=(4.0, 16.0)))
    assert [uneven[name].values[0] for name in ("stride", "stride_y", "stride_x")] == [8.0, 4.0, 16.0]


def test_a_result_survives_the_disk(tmp_path):
    ds = summarize(NMI(), traces())
    write_result(tmp_path / "nmi.nc", ds)
    xr.testing.assert_identical(read_result(tmp_path / "nmi.nc"), ds)


def test_float64_where_float32_would_lose_digits():
    x = np.full((100_000, 1, 1), 0.1, np.float32)
    x[0] = 3e4
    mean = float(summarize(NMI(), traces(nmi=x)).nmi[0, 0])
    exact = (3e4 + 99_999 * float(np.float32(0.1))) / 100_000
    assert mean == pytest.approx(exact, rel=1e-13)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 40))
def test_laws(seed, images):
    """Order of the images doesn't matter, shifting shifts, scaling scales, halves average."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(images, 2, 3))
    base, order = summary(x, 0), rng.permutation(images)
    permuted, moved = summary(x[order], 0), summary(3 * x + 10, 0)
    for part in ("mean", "sd", "sem"):
        np.testing.assert_allclose(permuted[part], base[part], rtol=1e-9, atol=1e-12)
    for part in ("mean", "low", "high"):
        np.testing.assert_allclose(moved[part], 3 * base[part] + 10, rtol=1e-9)
    np.testing.assert_allclose(moved["sd"], 3 * base["sd"], rtol=1e-9)
    half = images // 2
    whole = (half * summary(x[:half], 0)["mean"] + (images - half) * summary(x[half:], 0)["mean"]) / images
    np.testing.assert_allclose(whole, base["mean"], rtol=1e-9, atol=1e-12)


def test_same_seed_same_bits_other_seed_other_interval():
    data = traces()
    one, two = summarize(NMI(), data), summarize(NMI(), data)
    xr.testing.assert_identical(one, two)
    other = summarize(NMI(), Traces(data.values, data.rows, data.images, seed=1))
    assert (one.nmi == other.nmi).all()
    assert (one.nmi_low != other.nmi_low).any()
    assert "seed 1" in other.attrs["interval"]


def test_columns_do_not_depend_on_their_neighbours(monkeypatch):
    """Neither blocks nor chunks of resamples show in the numbers."""
    x = np.random.default_rng(0).normal(size=(50, 30))
    whole = bootstrap_interval(x, 7)
    np.testing.assert_allclose(bootstrap_interval(x[:, 4], 7), np.array(whole)[:, 4], rtol=1e-12)
    for name, value in [("_WEIGHTS", 350), ("_BLOCK", 200), ("_COLUMNS", 7)]:
        monkeypatch.setattr(f"probekit.summaries.{name}", value)
    np.testing.assert_allclose(bootstrap_interval(x, 7), whole, rtol=1e-12)


# ------------------------------------------------------------------------------------------------ absent


def test_absent_heads_stay_nan_and_poison_nothing():
    x = traces()["nmi"].copy()
    full = summarize(NMI(), traces(nmi=x[:, :, :2]))
    x[:, 1, 2:] = np.nan
    ds = summarize(NMI(), traces(nmi=x))
    for part in ("nmi", "nmi_sd", "nmi_sem", "nmi_low", "nmi_high"):
        assert np.isnan(ds[part].values[1, 2:]).all()
        assert np.isfinite(np.delete(ds[part].values, 1, 0)).all()
        np.testing.assert_allclose(ds[part].values[1, :2], full[part].values[1, :2], rtol=1e-12)
    for part in ("nmi_curve", "nmi_curve_low", "nmi_curve_high", "nmi_head_sd"):
        np.testing.assert_allclose(ds[part].values[1], full[part].values[1], rtol=1e-12)
    assert "missing" not in ds.nmi.attrs


def test_a_row_without_any_value():
    x = traces()["nmi"].copy()
    x[:, 0] = np.nan
    ds = summarize(NMI(), traces(nmi=x))
    assert all(np.isnan(ds[name].values[0]).all() for name in ds.data_vars)
    assert all(np.isfinite(ds[name].values[1:]).all() for name in ds.data_vars)


def test_an_image_without_a_value_is_left_out_and_counted():
    x = traces()["nmi"].copy()
    x[3, 0, 1] = x[4, 0, 1] = np.nan
    ds = summarize(NMI(), traces(nmi=x))
    rest = np.delete(x[:, 0, 1], [3, 4]).astype(np.float64)
    assert float(ds.nmi[0, 1]) == pytest.approx(rest.mean(), rel=1e-13)
    assert float(ds.nmi_sem[0, 1]) == pytest.approx(rest.std(ddof=1) / np.sqrt(18), rel=1e-13)
    width = float(ds.nmi_high[0, 1] - ds.nmi_low[0, 1])
    assert width == pytest.approx(2 * 1.96 * rest.std() / np.sqrt(18), rel=0.2)
    assert ds.nmi.attrs["missing"] == 2
    x[:12, 2, 3] = np.nan
    ds = summarize(NMI(), traces(nmi=x))
    middle, sem = float(ds.nmi_low[2, 3] + ds.nmi_high[2, 3]) / 2, float(ds.nmi_sem[2, 3])
    assert middle == pytest.approx(float(ds.nmi[2, 3]), abs=0.3 * sem)


@pytest.mark.parametrize("images", [0, 1])
def test_too_few_images(images):
    ds = summarize(NMI(), traces(nmi=np.ones((images, 3, 4), np.float32)))
    assert (np.isfinite(ds.nmi) == bool(images)).all()
    assert (np.isfinite(ds.nmi_curve) == bool(images)).all()
    for part in ("sd", "sem", "low", "high", "curve_low", "curve_high"):
        assert np.isnan(ds[f"nmi_{part}"]).all()


def test_constant_and_infinite_values():
    x = np.full((30, 2, 1), 0.1, np.float32)
    x[5, 1, 0] = np.inf
    ds = summarize(NMI(), traces(nmi=x))
    assert float(ds.nmi_low[0, 0]) == float(ds.nmi[0, 0]) == float(ds.nmi_high[0, 0])
    assert float(ds.nmi_sd[0, 0]) == pytest.approx(0, abs=1e-15)
    assert np.isinf(ds.nmi[1, 0])
    assert np.isnan(ds.nmi_low[1, 0])


# --------------------------------------------------------------------------------------------- bootstrap


def test_bootstrap_agrees_with_scipy():
    x = np.random.default_rng(3).exponential(size=(60, 3))
    low, high = bootstrap_interval(x, 0, resamples=20_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = scipy.stats.bootstrap(
            (x,), np.mean, n_resamples=20_000, method="percentile", axis=0, vectorized=True, rng=1
        ).confidence_interval
    np.testing.assert_allclose(low, theirs.low, atol=0.01)
    np.testing.assert_allclose(high, theirs.high, atol=0.01)


def test_coverage_is_near_nominal():
    """Of 600 samples of 50, the 95 % interval holds the true mean in about 94 % (percentile, n = 50)."""
    x = np.random.default_rng(4).normal(2.0, 3.0, size=(50, 600))
    low, high = bootstrap_interval(x, 0)
    assert 0.91 < np.mean((low <= 2.0) & (high >= 2.0)) < 0.97


def test_memory_stays_bounded_for_a_whole_validation_set():
    """50,000 images x 12 x 12 values; few resamples, because the peak doesn't depend on their number."""
    x = np.zeros((50_000, 144), np.float32)
    tracemalloc.start()
    bootstrap_interval(x, 0, resamples=40)
    summary(x[:, :1], 0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 70e6


# ------------------------------------------------------------------------------------- curves, constants


def spectrum(constants=None, images=5) -> Traces:
    rng = np.random.default_rng(0)
    values = {
        "amplitude": rng.normal(size=(images, 3, 4)).astype(np.float32),
        "gap": rng.normal(size=(images, 3)).astype(np.float32),
        "both": rng.normal(size=(images, 3, 2, 4)).astype(np.float32),
    }
    return Traces(values, rows(3), [str(i) for i in range(images)], constants=constants or {})


def test_several_values_and_axes():
    data = spectrum()
    ds = summarize(Spectrum(), data)
    assert ds.both.dims == ("layer", "head", "frequency")
    assert ds.gap.dims == ("layer",)
    np.testing.assert_allclose(ds.gap, ds.gap_curve)
    np.testing.assert_allclose(ds.both_curve, data["both"].astype(float).mean((0, 2, 3)))
    assert "amplitude_head_sd" not in ds
    assert "both_head_sd" not in ds
    assert "units" not in ds.gap.attrs


def test_curve_last_takes_the_last_value_each_image_has():
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    x[0, 1, 2:] = np.nan
    x[:, 2, :] = np.nan
    np.testing.assert_array_equal(image_curve(x, "last"), [[3, 5, np.nan], [15, 19, np.nan]])
    ds = summarize(Last(), Traces({"amplitude": x}, rows(3), ["a", "b"]))
    np.testing.assert_array_equal(ds.amplitude_curve, [9, 12, np.nan])
    assert ds.amplitude_curve.attrs["reduced"] == "last"
    with pytest.raises(MetricError, match="several inner axes"):
        image_curve(np.zeros((1, 1, 2, 2)), "last")


def test_curve_averages_each_image_before_the_images():
    x = np.array([[[1, 2, 3]], [[10, np.nan, np.nan]]], np.float32)
    assert float(summarize(NMI(), traces(nmi=x)).nmi_curve[0]) == (2 + 10) / 2


def test_equal_constants_become_the_axis():
    ds = summarize(Spectrum(), spectrum({"frequency": np.tile([0, 0.3, 0.6, 1], (3, 1))}))
    assert list(ds.frequency.values) == [0, 0.3, 0.6, 1]
    assert ds.frequency.attrs == {"units": "pi"}
    assert float(ds.amplitude.sel(frequency=1.0)[0]) == float(ds.amplitude[0, 3])


def test_unequal_constants_become_an_auxiliary_coordinate():
    frequency = np.array([[0, 0.3, 0.6, 1], [0, 0.3, 0.6, 1], [0, 0.5, 1, np.nan]])
    ds = summarize(Spectrum(), spectrum({"frequency": frequency}))
    assert list(ds.frequency.values) == [0, 1, 2, 3]
    assert ds.frequency_by_layer.dims == ("layer", "frequency")
    assert "frequency_by_layer" in ds.coords
    np.testing.assert_array_equal(ds.frequency_by_layer, frequency)


def test_other_constants_are_baselines():
    ds = summarize(
        Spectrum(),
        spectrum({"uniform": np.arange(3.0), "white": np.ones((3, 4)), "odd": np.ones((3, 7))}),
    )
    assert ds.uniform.dims == ("layer",)
    assert ds.white.dims == ("layer", "frequency")
    assert ds.odd.dims == ("layer", "odd_axis0")
    assert all(ds[name].attrs["role"] == "baseline" for name in ("uniform", "white", "odd"))


@pytest.mark.parametrize(
    ("metric", "data", "reason"),
    [
        (NMI(), spectrum(), "declares 'nmi' but measured no such value"),
        (NMI(), traces(nmi=np.ones((2, 3))), "'nmi' has shape"),
        (NMI(), Traces({"nmi": np.ones((2, 3, 4))}, rows(2), ["a", "b"]), "expected"),
        (Spectrum(), spectrum({"frequency": np.ones((3, 5))}), "the axis 'frequency' is 4 long"),
        (Spectrum(), spectrum({"x": np.ones(2)}), "constant 'x' has shape"),
        (Spectrum(), spectrum({"gap": np.ones(3)}), "the name of something else"),
        (Spectrum(), spectrum({"depth": np.ones(3)}), "the name of something else"),
    ],
)
def test_a_metric_that_breaks_its_declaration(metric, data, reason):
    with pytest.raises(MetricError) as caught:
        summarize(metric, data)
    assert reason in caught.value.message
    assert metric.name in caught.value.message


# ------------------------------------------------------------------------------------------------ paired


def test_pairing_removes_what_both_models_share():
    rng = np.random.default_rng(0)
    difficulty = rng.normal(0, 10, (40, 1, 1))
    noise = rng.normal(0, 0.1, (2, 40, 3, 4))
    a = traces(nmi=(difficulty + noise[0] + 0.5).astype(np.float32))
    b = traces(nmi=(difficulty + noise[1]).astype(np.float32))
    ds = paired_difference(a, b, "nmi")
    np.testing.assert_allclose(ds.nmi_difference, 0.5, atol=0.1)
    np.testing.assert_allclose(ds.nmi_difference, ds.nmi_a - ds.nmi_b, atol=1e-12)
    assert (ds.nmi_difference_low > 0.3).all()
    assert (ds.nmi_difference_high - ds.nmi_difference_low < 0.1).all()
    assert float(ds.nmi_overall) == pytest.approx(float(ds.nmi_difference.mean()))
    assert ds.nmi_overall_low < ds.nmi_overall < ds.nmi_overall_high
    swapped = paired_difference(b, a, "nmi")
    np.testing.assert_allclose(swapped.nmi_difference_low, -ds.nmi_difference_high, atol=1e-9)


def test_only_common_images_whatever_their_order():
    data = traces()
    order = np.random.default_rng(0).permutation(20)[:15]
    b = Traces({"nmi": data["nmi"][order] - 1}, data.rows, [data.images[i] for i in order] + [])
    ds = paired_difference(data, b, "nmi")
    np.testing.assert_allclose(ds.nmi_difference, 1, atol=1e-6)
    np.testing.assert_allclose(ds.nmi_difference_sd, 0, atol=1e-6)
    assert (ds.attrs["images"], ds.attrs["images_a"], ds.attrs["images_b"]) == (15, 20, 15)
    np.testing.assert_allclose(ds.nmi_a, data["nmi"][np.sort(order)].astype(float).mean((0, 2)))


def test_models_of_different_depth_are_compared_overall():
    a, b = traces(layers=3), traces(seed=1, layers=5)
    ds = paired_difference(a, b, "nmi")
    assert float(ds.nmi_overall) == pytest.approx(
        float(a["nmi"].astype(float).mean() - b["nmi"].astype(float).mean())
    )
    assert "nmi_difference" not in ds


def test_what_cannot_be_paired():
    a = traces()
    other = Traces(a.values, a.rows, [f"other{i}" for i in range(20)])
    twice = Traces(a.values, a.rows, ["same"] * 20)
    for b, name, reason in [(other, "nmi", "no image in common"), (twice, "nmi", "twice"), (a, "x", "'x'")]:
        with pytest.raises(UsageError, match=reason):
            paired_difference(a, b, name)
