"""Linear probes per layer: against scikit-learn on the same traces, chance, top-5, intervals, laws."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

sys.path.insert(0, str(Path(__file__).parent))
from probe_traces import rows, shuffled, split, traces

from probekit.errors import DoesNotApply, MetricError, UsageError
from probekit.metrics.linear_probe import LinearProbe
from probekit.metrics.readout import wilson
from probekit.reports.curves import curve_of, main_value, values_of
from probekit.store.mapped import MappedArray
from probekit.store.results import read_result, write_result


def test_accuracies_are_scikit_learns_on_the_same_features():
    sklearn = pytest.importorskip("sklearn.linear_model")
    given = split(classes=8, train=240, test=200, apart=1.0)
    result = LinearProbe(l2=0.01).summarize(given)
    assert list(result["site"].values) == ["embed", "out", "out"]
    for place, row in enumerate([0, 2, 4]):
        x, test = (t["features"][:, row].astype(np.float64) for t in (given.train, given))
        keep = ~np.isnan(x[0])
        x, test = x[:, keep], test[:, keep]
        mean, scale = x.mean(0), np.sqrt(x.var(0) + 1e-6)
        other = sklearn.LogisticRegression(C=1 / (0.01 * len(x)), tol=1e-9, max_iter=9999)
        other.fit((x - mean) / scale, given.train.labels)
        scores = other.predict_proba((test - mean) / scale)
        labels = np.array(given.labels)
        assert result["linear_probe"].values[place] == pytest.approx(
            100 * (scores.argmax(1) == labels).mean()
        )
        assert (result["correct"].values[place] == (scores.argmax(1) == labels)).all()
        five = np.argsort(-scores, axis=1)[:, :5]
        top5 = 100 * (five == labels[:, None]).any(1).mean()
        assert result["linear_probe_top5"].values[place] == pytest.approx(top5)
    assert result["l2"].values.tolist() == [0.01] * 3
    assert (result["gradient"].values <= 1e-7).all()


def test_separable_classes_give_100_and_random_labels_chance():
    result = LinearProbe().summarize(split(apart=30))
    assert (result["linear_probe"].values == 100).all()
    assert (result["linear_probe_high"].values == 100).all()
    random = np.random.default_rng(0)
    given = split(train=600, test=600)
    given = replace(
        given,
        labels=random.integers(0, 3, 600).tolist(),
        train=replace(given.train, labels=random.integers(0, 3, 600).tolist()),
    )
    result = LinearProbe().summarize(given)
    sd = 100 * np.sqrt(2 / 9 / 600)
    np.testing.assert_allclose(result["linear_probe"].values, 100 / 3, atol=4 * sd)


def test_chance_is_the_best_constant_answer():
    given = split(classes=7, train=70, test=70)
    given = replace(given, labels=[0] * 30 + [1] * 20 + [2] * 10 + [3] * 4 + [4] * 3 + [5] * 2 + [6])
    result = LinearProbe(l2=1e-2).summarize(given)
    assert result["chance"].values == pytest.approx(100 * 30 / 70)
    assert result["chance_top5"].values == pytest.approx(100 * 67 / 70)
    assert result["chance"].attrs["role"] == "baseline"


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (3, 10), (10, 10), (417, 1000)])
def test_the_interval_is_wilsons(hits, n):
    expected = binomtest(hits, n).proportion_ci(0.95, "wilson")
    low, high = wilson(hits, n)
    assert (low, high) == (pytest.approx(100 * expected.low), pytest.approx(100 * expected.high))
    assert np.isnan(wilson(0, 0)).all()


def test_classes_the_train_split_lacks_count_as_wrong_and_are_told():
    given = split(classes=4, apart=30)
    train = given.train
    kept = [i for i, label in enumerate(train.labels) if label != 2]
    result = LinearProbe().summarize(replace(given, train=shuffled(train, kept)))
    labels = np.array(given.labels)
    assert (result["correct"].values == (labels != 2)).all()
    assert (result["linear_probe"].values == 75).all()
    assert result.attrs["unknown"] == 15 and result.attrs["train_classes"] == 3
    assert result["train_images"].values.tolist() == [23, 23, 0, 22]
    assert list(result["class"].values) == [f"class {i}" for i in range(4)]
    assert (result.attrs["n_train"], result.attrs["n_test"]) == (len(kept), 60)
    assert np.isnan(result["linear_probe_top5"].values).all()  # of three classes it says nothing


@settings(max_examples=5, deadline=None)
@given(st.permutations(range(30)), st.permutations(range(60)))
def test_the_order_of_images_does_not_matter(order, other):
    """Of test images never; of training images with a given l2, as the held-out ones depend on it."""
    given = split(train=60, test=30, apart=0.8)
    a = LinearProbe(l2=0.01).summarize(given)
    moved = replace(shuffled(given, list(order)), train=shuffled(given.train, list(other)))
    b = LinearProbe(l2=0.01).summarize(moved)
    np.testing.assert_array_equal(a["linear_probe"].values, b["linear_probe"].values)
    np.testing.assert_array_equal(a["correct"].values[:, list(order)], b["correct"].values)


def test_sites_and_pools():
    given = split()
    assert list(LinearProbe(sites="all", l2=1.0).summarize(given)["site"].values) == [
        "embed",
        "mid",
        "out",
        "mid",
        "out",
    ]
    assert LinearProbe().source == "features"
    assert LinearProbe(pool="cls").source == "features:pool=cls"
    assert LinearProbe(pool="both").source == "features:pool=both"
    assert [row.site for row in LinearProbe().rows(rows())] == ["embed", "out", "out"]


def test_a_row_without_features_is_left_out():
    given = split()
    for t in (given, given.train):
        t["features"][:, 2] = np.nan
    assert list(LinearProbe(l2=1.0).summarize(given)["depth"].values) == [0, 2]
    for t in (given, given.train):
        t["features"][:] = np.nan
    with pytest.raises(DoesNotApply, match="no layer"):
        LinearProbe().summarize(given)


@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
def test_the_result_is_one_that_reports_read_and_the_store_keeps(tmp_path, solver):
    result = LinearProbe(solver=solver).summarize(split(classes=6))
    write_result(tmp_path / "r.nc", result)
    back = read_result(tmp_path / "r.nc")
    assert main_value(back) == "linear_probe" and set(values_of(back)) == {
        "linear_probe",
        "linear_probe_top5",
    }
    curve = curve_of(back, "linear_probe", "m")
    assert [p.mean for p in curve.points] == back["linear_probe"].values.tolist()
    assert all(p.low < p.mean < p.high for p in curve.points if 0 < p.mean < 100)
    assert "Wilson" in back.attrs["interval"]
    assert ("lr" in back) == (solver == "sgd")


def test_what_it_cannot_do_it_says():
    given = split()
    with pytest.raises(DoesNotApply, match="no train split"):
        LinearProbe().summarize(replace(given, train=None))
    with pytest.raises(DoesNotApply, match="two images"):
        LinearProbe().summarize(replace(given, train=traces([0, 1, 2])))
    given["features"][4, 2, 1] = np.nan
    with pytest.raises(MetricError, match=r"encoder\.0\.attn\.out"):
        LinearProbe().summarize(given)


@pytest.mark.parametrize(
    "options",
    [
        {"pool": "max"},
        {"norm": "layer"},
        {"solver": "adam"},
        {"l2": "much"},
        {"l2": -1},
        {"lr": 0.1},
        {"solver": "sgd", "lr": 0},
        {"sites": "in"},
    ],
)
def test_wrong_options_are_refused(options):
    with pytest.raises(UsageError):
        LinearProbe(**options)


def test_an_unknown_option_is_an_error():
    with pytest.raises(TypeError):
        LinearProbe(features="cls")


@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
def test_traces_left_on_disk_give_the_same(solver):
    given = split(classes=8)

    def on_disk(t, **more):
        return replace(t, values={"features": MappedArray(np.split(t["features"], [7, 20]))}, **more)

    a = LinearProbe(solver=solver).summarize(given)
    b = LinearProbe(solver=solver).summarize(on_disk(given, train=on_disk(given.train)))
    assert a.identical(b)
