"""Weighted kNN: against loops and scikit-learn, known cases; Wilson's interval against its equation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probekit.errors import DoesNotApply, UsageError
from probekit.metric import Row, Traces
from probekit.metrics import knn as module
from probekit.metrics.knn import KNN, predictions
from probekit.metrics.readout import wilson


def clouds(n, classes=4, width=6, seed=0, spread=1.5):
    """Overlapping clouds off the origin, and their classes."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, n)
    centres = np.random.default_rng(99).standard_normal((classes, width))
    features = 1 + centres[labels] + spread * random.standard_normal((n, width))
    return features.astype(np.float32), labels


def vote(x, train, labels, k):
    """One image's class, written out in float64."""
    cosines = [float(np.dot(x, t) / math.sqrt(np.dot(x, x) * np.dot(t, t))) for t in train.astype(np.float64)]
    best = sorted(range(len(train)), key=lambda j: -cosines[j])[:k]
    votes = [sum(math.exp(cosines[j] / 0.07) for j in best if labels[j] == c) for c in range(max(labels) + 1)]
    return votes.index(max(votes))


def traces(features, labels, train=None, sites=("embed", "mid", "out")):
    rows = [Row(f"b.{s}", i / 2, s, "encoder", 0, 2, (2, 2), (8.0, 8.0)) for i, s in enumerate(sites)]
    widths = [f.shape[1] for f in features]
    values = np.full((len(labels), len(features), max(widths)), np.nan, dtype=np.float32)
    for row, found in enumerate(features):
        values[:, row, : found.shape[1]] = found
    ids = [f"{i}.png" for i in range(len(labels))]
    return Traces({"features": values}, rows, ids, labels=[int(x) for x in labels], train=train)


@pytest.mark.parametrize("pairs", [2**24, 150])
def test_agrees_with_the_loop(pairs, monkeypatch):
    monkeypatch.setattr(module, "_PAIRS", pairs)
    train, labels = clouds(60)
    test, _ = clouds(40, seed=1)
    got = predictions(test, train, torch.tensor(labels), [1, 10, 20, 60])
    for found, k in zip(got, (1, 10, 20, 60), strict=True):
        assert found.tolist() == [vote(x.astype(np.float64), train, labels, k) for x in test]


def test_agrees_with_scikit_learn():
    neighbors = pytest.importorskip("sklearn.neighbors")
    train, labels = clouds(300, classes=7, width=24)
    test, _ = clouds(200, classes=7, width=24, seed=1)
    for k in (10, 20, 100):
        theirs = neighbors.KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
        ).fit(train.astype(np.float64), labels)
        ours = predictions(test, train, torch.tensor(labels), [k])[0].numpy()
        assert (ours == theirs.predict(test.astype(np.float64))).all()


def test_the_temperature_decides_between_few_near_and_many_far():
    """One train image at cosine 1 against two at 0.9: exp(0.1 / 0.07) = 4.2 votes to 2."""
    near = np.array([[1.0, 0.0], [0.9, math.sqrt(0.19)], [0.9, -math.sqrt(0.19)]], dtype=np.float32)
    test = np.array([[5.0, 0.0]], dtype=np.float32)
    assert predictions(test, near, torch.tensor([0, 1, 1]), [3]).item() == 0
    five = np.concatenate([near, np.repeat(near[1:], 2, 0)])
    assert predictions(test, five, torch.tensor([0, 1, 1, 1, 1, 1, 1]), [7]).item() == 1


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 30), st.integers(0, 2**20))
def test_length_of_features_does_not_matter(n, seed):
    train, labels = clouds(n, seed=seed)
    test, _ = clouds(10, seed=seed + 1)
    lengths = np.random.default_rng(seed).uniform(0.1, 10, (n, 1)).astype(np.float32)
    ks = sorted({1, min(5, n), n})
    a = predictions(test, train, torch.tensor(labels), ks)
    assert torch.equal(predictions(4 * test, train * lengths, torch.tensor(labels), ks), a)
    assert (predictions(train, train, torch.tensor(labels), [1])[0].numpy() == labels).all()


@given(st.integers(1, 2000), st.floats(0, 1))
def test_wilson_solves_its_equation(n, share):
    """Its ends are where (p - share)^2 = z^2 p (1 - p) / n."""
    hits = round(share * n)
    low, high = (float(x) / 100 for x in wilson(np.array(hits), n))
    z = 1.959963984540054
    for end in (low, high):
        assert (end - hits / n) ** 2 == pytest.approx(z**2 * end * (1 - end) / n, abs=1e-12)
    assert 0 <= low <= hits / n + 1e-12 and hits / n - 1e-12 <= high <= 1


def test_wilson_known_values():
    low, high = wilson(np.array([0, 5, 10]), 10)
    np.testing.assert_allclose(low, [0, 23.659, 72.246], atol=1e-3)
    np.testing.assert_allclose(high, [27.754, 76.341, 100], atol=1e-3)


def test_result():
    (train, train_labels), (test, labels) = clouds(120), clouds(50, seed=1)
    noise = (
        np.random.default_rng(5).standard_normal((120, 3)),
        np.random.default_rng(6).standard_normal((50, 3)),
    )
    held = traces([noise[0], train, train], train_labels)
    result = KNN().summarize(traces([noise[1], test, test], labels, held))
    assert result["layer"].values.tolist() == ["b.embed", "b.out"]
    assert result["k"].values.tolist() == [10, 20, 100]
    for row, (a, b) in enumerate(((noise[1], noise[0]), (test, train))):
        a, b = a.astype(np.float32), b.astype(np.float32)
        hits = [vote(x.astype(np.float64), b, train_labels, 20) == y for x, y in zip(a, labels, strict=True)]
        assert result["correct"].values[row].tolist() == [int(h) for h in hits]
        assert result["knn"][row] == pytest.approx(2 * sum(hits))
        assert result["knn_by_k"].sel(k=20)[row] == result["knn"][row] == result["knn_curve"][row]
        low, high = wilson(np.array(sum(hits)), 50)
        assert (result["knn_curve_low"][row], result["knn_curve_high"][row]) == (low, high)
    assert result["correct"].dtype == np.int8 and result["image"].values[3] == "3.png"
    assert result["knn"].attrs["units"] == "%"
    assert (result.attrs["train_images"], result.attrs["k_used"]) == (120, 20)
    assert "Wilson" in result.attrs["interval"]


def test_few_train_images_limit_k():
    (train, train_labels), (test, labels) = clouds(7), clouds(5, seed=1)
    held = traces([train], train_labels, sites=("out",))
    result = KNN().summarize(traces([test], labels, held, sites=("out",)))
    assert result["k"].values.tolist() == [7] and result.attrs["k_used"] == 7
    assert KNN(k=3).summarize(traces([test], labels, held, sites=("out",)))["k"].values.tolist() == [3]


def test_classes_without_train_images_are_missed():
    train, train_labels = clouds(30, classes=2)
    test, _ = clouds(10, seed=1)
    held = traces([train], train_labels, sites=("out",))
    result = KNN().summarize(traces([test], [5] * 10, held, sites=("out",)))
    assert result["knn"].item() == 0


def test_options():
    assert KNN().requires == {"labels", "train"} and KNN(pool="cls").source == "features:pool=cls"
    with pytest.raises(UsageError, match="k is 1 or more, not 0"):
        KNN(k=0)
    with pytest.raises(DoesNotApply, match="no train images"):
        KNN().summarize(traces([clouds(5)[0]], [0] * 5, sites=("out",)))
