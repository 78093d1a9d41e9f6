"""Accuracy lost to band noise: the drop and its interval from hand-made traces, the variations it asks for."""

from __future__ import annotations

import pickle
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from probe_traces import split

import probekit
from probekit.datasets.noise import BandNoise
from probekit.errors import MetricError, UsageError
from probekit.metrics import readout
from probekit.metrics.frequency_robustness import FrequencyRobustness
from probekit.metrics.linear_probe import LinearProbe
from probekit.metrics.probing import fit_many
from probekit.reports.curves import baselines_of, curve_of, main_value, values_of
from probekit.store.results import read_result, write_result

BANDS = [0, 0.25, 0.5, 0.75, 1]


def measured(wrong, metric, n=60):
    """Traces whose features under band b and seed s are another class's for the images `wrong(b, s)`."""
    given = split(test=n, apart=30, image_size=(32, 32))
    found = {}
    for variation in metric.variations():
        noise = variation.pixels
        values = given["features"].copy()
        for image in wrong(noise.frequency, noise.seed):
            values[image] = given["features"][(image + 1) % n]  # labels go in turn: of the next class
        found[variation.name] = replace(given, values={"features": values}, train=None)
    return replace(given, variations=found)


def test_the_drop_is_the_share_of_images_lost():
    metric = FrequencyRobustness(step=0.25, seeds=2)
    lost = {
        (0.5, 0): range(12),
        (0.75, 0): range(30),
        (0.75, 1): range(6),
        (1.0, 0): range(6),
        (1.0, 1): range(6),
    }
    result = metric.summarize(measured(lambda f, s: lost.get((f, s), ()), metric))
    assert (result["clean_accuracy"].values == 100).all()
    assert result["band"].values.tolist() == BANDS and result["band"].attrs["units"] == "pi"
    # 12 of 60 in one seed of two; 30 and 6; 6 and 6
    np.testing.assert_allclose(result["frequency_robustness"].values, [[0, 0, 10, 30, 10]] * 3)
    np.testing.assert_allclose(result["frequency_robustness_curve"].values, 20)  # of .75 and 1
    assert result["correct_noisy"].values[0, 3, :8].tolist() == [0] * 6 + [1] * 2
    assert result["rms"].dims == ("band",) and result.attrs["rms_size"] == "32 x 32"


def test_probes_of_the_same_features_are_fitted_once_and_of_others_anew(monkeypatch):
    fitted = []

    def counted(matrices, *rest, **more):
        fitted.append(len(matrices))
        return fit_many(matrices, *rest, **more)

    monkeypatch.setattr(readout, "fit_many", counted)
    monkeypatch.setattr(readout, "_LAST", {})
    metric = FrequencyRobustness(step=0.5)
    given = split(apart=0.8)
    noisy = replace(given, variations={v.name: replace(given, train=None) for v in metric.variations()})
    accuracy = LinearProbe().summarize(given)
    result = metric.summarize(noisy)
    assert fitted == [3]
    np.testing.assert_array_equal(result["clean_accuracy"].values, accuracy["linear_probe"].values)
    assert len(readout._LAST) == 1
    other = replace(given.train, labels=given.train.labels[1:] + given.train.labels[:1])
    metric.summarize(replace(noisy, train=other))
    assert fitted == [3, 3]
    LinearProbe(l2=0.1).summarize(given)
    LinearProbe(l2=0.1).summarize(replace(given, seed=1))
    nudged = given.train["features"] * np.float32(1.5)
    LinearProbe(l2=0.1).summarize(replace(given, train=replace(given.train, values={"features": nudged})))
    assert len(fitted) == 5


def test_the_interval_is_the_paired_bootstrap_over_images():
    """Resampled here one by one, with the same draws."""
    metric = FrequencyRobustness(step=0.25)
    lost = {0.5: range(12), 0.75: range(20), 1.0: range(10, 25)}
    result = metric.summarize(measured(lambda f, s: lost.get(f, ()), metric))
    draws = np.random.Generator(np.random.PCG64(0)).integers(0, 60, size=(1000, 60))
    per_image = np.array([[100.0 * (i in lost.get(f, ())) for f in BANDS] for i in range(60)])
    for columns, name in (
        (per_image, "frequency_robustness"),
        (per_image[:, 3:].mean(1), "frequency_robustness_curve"),
    ):
        low, high = np.quantile(columns[draws].mean(1), [0.025, 0.975], axis=0)
        np.testing.assert_allclose(result[f"{name}_low"].values[0], low, atol=1e-9)
        np.testing.assert_allclose(result[f"{name}_high"].values[0], high, atol=1e-9)
    assert result["frequency_robustness_high"].values[0, 0] == 0  # nothing lost, nothing to vary


def test_without_noise_nothing_is_lost_and_the_probe_is_linear_probes():
    metric = FrequencyRobustness(step=0.5)
    given = split(apart=0.8)
    same = {v.name: replace(given, train=None) for v in metric.variations()}
    result = metric.summarize(replace(given, variations=same))
    assert (result["frequency_robustness"].values == 0).all()
    expected = LinearProbe().summarize(given)
    np.testing.assert_array_equal(result["correct"].values, expected["correct"].values)
    np.testing.assert_array_equal(result["clean_accuracy_low"].values, expected["linear_probe_low"].values)
    np.testing.assert_allclose(
        result["drop_to_chance"].values, expected["linear_probe"].values - expected["chance"].values
    )


def test_variations_are_one_a_band_and_seed_and_can_travel():
    metric = FrequencyRobustness()
    found = metric.variations()
    assert len(found) == 11
    assert [v.pixels.frequency for v in found] == pytest.approx(np.arange(11) / 10)
    assert all(v.model is None and not v.train for v in found)
    pixels = torch.zeros(3, 32, 32)
    for v in found:
        back = pickle.loads(pickle.dumps(v))
        assert (back.pixels(pixels, 3) == v.pixels(pixels, 3)).all()
    changes = [{}, {"half_width": 0.1}, {"eps": 0.5}, {"energy": "equal"}, {"symmetric": True}, {"seeds": 2}]
    names = [{v.name for v in FrequencyRobustness(**change).variations()} for change in changes]
    assert all(re.fullmatch(r"[\w.\-]+", name) for some in names for name in some)
    for i, some in enumerate(names):
        for other in names[:i]:
            assert not some & other or (i == 5 and other < some)  # a second seed adds to the first


def test_rms_is_that_of_the_noise():
    metric = FrequencyRobustness(step=0.25)
    result = metric.summarize(measured(lambda f, s: (), metric))
    for v, expected in zip(metric.variations(), result["rms"].values, strict=True):
        drawn = [v.pixels(torch.zeros(3, 32, 32), i).square().mean().item() for i in range(200)]
        assert np.sqrt(np.mean(drawn)) == pytest.approx(expected, rel=0.15, abs=1e-9)
    equal = FrequencyRobustness(step=0.5, energy="equal", half_width=0.2)
    assert len(set(equal.summarize(measured(lambda f, s: (), equal))["rms"].values)) == 1
    nobody_says = metric.summarize(replace(measured(lambda f, s: (), metric), image_size=None))
    assert np.isnan(nobody_says["rms"].values).all() and nobody_says.attrs["rms_size"] == "unknown"


PLUGIN = """
import numpy as np, torch
from PIL import Image
from probekit import Dataset, DatasetSpec, Model, Preprocessing, hookimpl
from probekit.testing import TinyViT

PROBEKIT_API = 1


class Greys(Dataset):
    def __init__(self, name, count):
        self.name, self.classes = name, ["a", "b"]
        self.ids = [f"{name}-{i}" for i in range(count)]
        self.labels = [i % 2 for i in range(count)]

    def image(self, index):
        rng = np.random.default_rng(index)
        return Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))


def greys(argument, **options):
    test = Greys("test", 6)
    test.train = Greys("train", 20)
    return test


def build():
    model = TinyViT()
    model.patch = torch.nn.Conv2d(3, 24, 8, 4)  # patches overlap, as PiT's: 7 x 7 tokens 4 px apart
    return Model(model, preprocessing=Preprocessing(size=(32, 32), crop_pct=1.0))


@hookimpl
def probekit_datasets():
    return [DatasetSpec(name="greys", summary="greys", target=f"{__name__}:greys")]
"""


def test_rms_is_of_the_input_and_not_of_grid_times_stride(tmp_path):
    """A run over 32 x 32 px with 7 x 7 overlapping patches, 4 px apart."""
    plugin = tmp_path / "overlap.py"
    plugin.write_text(PLUGIN)
    run = probekit.run(
        [f"{plugin}:build"],
        ["greys"],
        ["features", "frequency_robustness:step=0.5:half_width=0.2"],
        out=tmp_path / "run",
        plugins=[plugin],
    )
    result = run.result("frequency_robustness")
    rows = run.traces("features").rows
    assert {(row.grid, row.stride) for row in rows} == {((7, 7), (4.0, 4.0))}
    noise = [BandNoise(f, 0.2).rms((3, 32, 32)) for f in (0, 0.5, 1)]
    assert result.attrs["rms_size"] == "32 x 32"
    np.testing.assert_allclose(result["rms"], noise)


def test_the_result_is_one_that_reports_read_and_the_store_keeps(tmp_path):
    metric = FrequencyRobustness(step=0.25)
    write_result(tmp_path / "r.nc", metric.summarize(measured(lambda f, s: range(int(40 * f)), metric)))
    back = read_result(tmp_path / "r.nc")
    assert main_value(back) == "frequency_robustness"
    assert set(values_of(back)) == {"frequency_robustness", "clean_accuracy"}
    assert [p.mean for p in curve_of(back, "frequency_robustness", "m").points] == pytest.approx(
        [350 / 6] * 3
    )
    assert "drop_to_chance" in back and baselines_of(back, "frequency_robustness") == [], "it isn't drawn"
    assert "bootstrap" in back.attrs["interval"] and "paired" in back.attrs["interval"]


def test_what_it_cannot_do_it_says():
    metric = FrequencyRobustness(step=0.5)
    with pytest.raises(MetricError, match="not measured under 'noise-0pi"):
        metric.summarize(split())
    given = measured(lambda f, s: (), metric)
    other = {name: replace(t, images=t.images[::-1]) for name, t in given.variations.items()}
    with pytest.raises(MetricError, match="not the clean ones"):
        metric.summarize(replace(given, variations=other))
    for wrong in (
        {"step": 0.3},
        {"step": 0},
        {"seeds": 0},
        {"eps": 0},
        {"half_width": -1},
        {"energy": "flat"},
    ):
        with pytest.raises(UsageError):
            FrequencyRobustness(**wrong)
