"""Debiased CKA: against the n x n formula, known cases, its invariances; other models by image id."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probekit.errors import DoesNotApply
from probekit.metric import Row, Traces
from probekit.metrics import cka as module
from probekit.metrics.cka import CKA, cka


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def hsic(k, l):  # noqa: E741
    """Song et al. 2012, eq. 5, with the n x n matrices themselves."""
    n = len(k)
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))  # noqa: E741
    one = np.ones(n)
    total = np.trace(k @ l) + (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
    return (total - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3))


def direct(x, y):
    k, l = (f.astype(np.float64) @ f.astype(np.float64).T for f in (x, y))  # noqa: E741
    return hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l))


def rows(widths, sites=("embed", "out")):
    return [
        Row(f"b{i}.{sites[min(i, 1)]}", float(i), sites[min(i, 1)], "encoder", 0, 2, (2, 2), (8.0, 8.0))
        for i in range(len(widths))
    ]


def traces(features, ids=None, **more):
    widths = [f.shape[1] for f in features]
    values = np.full((len(features[0]), len(features), max(widths)), np.nan, dtype=np.float32)
    for row, found in enumerate(features):
        values[:, row, : found.shape[1]] = found
    ids = ids or [f"{i}.png" for i in range(len(values))]
    return Traces({"features": values}, rows(widths), ids, **more)


@pytest.mark.parametrize(("n", "c", "d"), [(4, 3, 2), (12, 30, 5), (60, 8, 20), (61, 61, 61)])
@pytest.mark.parametrize("block", [2**23, 40])
def test_agrees_with_the_matrices(n, c, d, block, monkeypatch):
    monkeypatch.setattr(module, "_VALUES", block)
    x = normal(n, c) + 3
    y = x[:, :1] * normal(1, d, seed=2) + 0.5 * normal(n, d, seed=1) - 7
    got = cka([x, y], [y, x, x])
    expected = [[direct(a, b) for b in (y, x, x)] for a in (x, y)]
    # at n = 4 the estimate of HSIC(K, K) may be below 0: then there is no number
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-9)
    own = [x, y]
    np.testing.assert_allclose(cka(own, own), [[direct(a, b) for b in own] for a in own], rtol=1e-6)


def test_equal_features_are_1_and_unrelated_ones_0_however_wide():
    x, y = normal(50, 400), normal(50, 400, seed=1)
    got = cka([x], [x, y])
    assert got[0, 0] == pytest.approx(1, rel=1e-12)
    assert abs(got[0, 1]) < 0.1  # the biased estimate is near 1 here
    centred = [f - f.mean(0) for f in (x, y)]
    biased = np.sum((centred[0].T @ centred[1]) ** 2) / np.prod([np.linalg.norm(f.T @ f) for f in centred])
    assert biased > 0.8


@settings(max_examples=25, deadline=None)
@given(st.integers(8, 40), st.integers(2, 12), st.floats(0.01, 100), st.integers(0, 2**20))
def test_invariances(n, c, factor, seed):
    x, y = normal(n, c, seed=seed), normal(n, 3, seed=seed + 1)
    turn = np.linalg.qr(np.random.default_rng(seed).standard_normal((c, c)))[0]
    order = np.random.default_rng(seed).permutation(n)
    value = cka([x], [y])
    np.testing.assert_allclose(cka([(factor * x @ turn + factor).astype(np.float32)], [y]), value, atol=1e-4)
    np.testing.assert_allclose(cka([x[order]], [y[order]]), value, atol=1e-9)
    np.testing.assert_allclose(cka([y], [x]), value.T, atol=1e-12)


def test_features_without_variance_have_no_similarity():
    same = np.tile(normal(1, 5), (20, 1))
    got = cka([same, normal(20, 5)], [normal(20, 4, seed=1), same])
    assert np.isnan(got[0]).all() and np.isnan(got[1, 1]) and np.isfinite(got[1, 0])


def test_result():
    features = [normal(30, 6), normal(30, 9, seed=1)]
    features.append(np.concatenate([features[1], features[0]], 1))
    result = CKA().summarize(traces(features))
    expected = [[direct(a, b) for b in features] for a in features]
    assert result["cka"].dims == ("layer", "other_layer")
    np.testing.assert_allclose(result["cka"], expected, rtol=1e-6)
    np.testing.assert_allclose(result["cka_curve"], [row[-1] for row in expected], rtol=1e-6)
    assert np.isnan(result["cka_curve_low"]).all() and result.attrs["interval"] == "none"
    assert result["other_layer"].values.tolist() == ["b0.embed", "b1.out", "b2.out"]
    assert result["other_depth"].values.tolist() == [0, 1, 2]
    assert "cka_with" not in result


def test_sites_after_attention_are_left_out():
    held = traces([normal(9, 3), normal(9, 3, seed=1), normal(9, 3, seed=2)])
    mid = Row("b1.mid", 0.5, "mid", "encoder", 0, 2, (2, 2), (8.0, 8.0))
    moved = Traces(held.values, [held.rows[0], mid, held.rows[2]], held.images)
    assert CKA().summarize(moved)["layer"].values.tolist() == ["b0.embed", "b2.out"]


def test_other_models_by_image_id():
    features, theirs = [normal(20, 6), normal(20, 5, seed=1)], [normal(20, 4, seed=2)] * 2
    theirs.append(features[0][:, :3])
    order = np.random.default_rng(0).permutation(20)
    ids = [f"{i}.png" for i in range(20)]
    # another order, and three images of which the first model has none
    mixed = [np.concatenate([f[order], normal(3, f.shape[1], seed=5)]) for f in theirs]
    other = traces(mixed, [ids[i] for i in order] + ["x", "y", "z"])
    strangers = traces([normal(5, 3)], ["p", "q", "r", "0.png", "s"])
    result = CKA().summarize(traces(features, ids, others={"mae:b": other, "dino:s": strangers}))
    assert result["cka_with"].dims == ("model", "layer", "model_layer")
    assert result["model"].values.tolist() == ["mae:b", "dino:s"]
    assert result["cka_with_images"].values.tolist() == [20, 1]
    expected = [[direct(a, b) for b in theirs] for a in features]
    np.testing.assert_allclose(result["cka_with"][0], expected, rtol=1e-6)
    assert np.isnan(result["cka_with"][1]).all()
    assert result["cka_with_layer"].values.tolist() == [
        ["b0.embed", "b1.out", "b2.out"],
        ["b0.embed", "", ""],
    ]


def test_too_few_images():
    with pytest.raises(DoesNotApply, match="3 images: the unbiased estimator needs 4"):
        CKA().summarize(traces([normal(3, 4)]))
    assert CKA(pool="cls").source == "features:pool=cls" and CKA.others


def test_result_can_be_stored(tmp_path):
    from probekit.store.results import read_result, write_result

    held = traces([normal(9, 3), normal(9, 4, seed=1)])
    result = CKA().summarize(Traces(held.values, held.rows, held.images, others={"a": held}))
    write_result(tmp_path / "cka.nc", result)
    assert read_result(tmp_path / "cka.nc").identical(result)
