"""Tokens before and after attention: translation ratio and scatter, against numpy's SVD and sums."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probekit.errors import UsageError
from probekit.layer import Layer
from probekit.metric import Row, Traces
from probekit.metrics.choosing import evenly, of_classes
from probekit.metrics.token_scatter import TokenScatter, scatter
from probekit.metrics.token_translation import TokenTranslation
from probekit.testing import check_metric, make_layer


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def layer_of(before, after) -> Layer:
    before, after = (torch.as_tensor(np.asarray(t), dtype=torch.float32) for t in (before, after))
    layer = make_layer(tokens=before, grid=(1, before.shape[1]))
    layer.captured = {**layer.captured, "tokens_in": before, "tokens_mid": after}
    return layer


def ratio(before, after):
    """||mean shift||^2 / mean ||shift||^2 of one image, token by token."""
    shifts = [np.asarray(b, dtype=np.float64) - a for a, b in zip(before, after, strict=True)]
    mean = sum(shifts) / len(shifts)
    return float(mean @ mean) / (sum(float(s @ s) for s in shifts) / len(shifts))


def measured(before, after):
    return TokenTranslation().measure(layer_of(before, after))["token_translation"].numpy()


# ------------------------------------------------------------------ translation


def test_translation_agrees_with_the_sums():
    before = normal(3, 20, 8).astype(np.float32)
    after = before + normal(3, 20, 8, seed=1).astype(np.float32) + np.float32(0.5)
    expected = [ratio(*(t.astype(np.float32) for t in pair)) for pair in zip(before, after, strict=True)]
    np.testing.assert_allclose(measured(before, after), expected, rtol=1e-6)


def test_translation_of_known_movements():
    before = normal(1, 10, 4)
    np.testing.assert_allclose(measured(before, before + np.array([2.0, 0, -1, 3])), 1, rtol=1e-6)
    opposite = np.tile([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]], (5, 1))[None]
    np.testing.assert_allclose(measured(np.zeros_like(opposite), opposite), 0, atol=1e-12)
    half = np.tile([[2.0, 0, 0, 0], [0.0, 0, 0, 0]], (5, 1))[None]  # mean 1, mean square 2
    np.testing.assert_allclose(measured(np.zeros_like(half), half), 0.5, rtol=1e-6)
    assert measured(before, before).tolist() == [0]


def test_movements_in_common_by_chance_are_at_the_baseline():
    layer = layer_of(np.zeros((400, 16, 64)), normal(400, 16, 64))
    values = TokenTranslation().measure(layer)["token_translation"]
    assert TokenTranslation().describe(layer)["independent"] == pytest.approx(1 / 16)
    assert float(values.mean()) == pytest.approx(1 / 16, rel=0.02)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 8), st.floats(1e-3, 1e3), st.integers(0, 2**20))
def test_translation_laws(n, c, factor, seed):
    before, shift = np.zeros((2, n, c)), normal(2, n, c, seed=seed)
    a, b = measured(before, shift), measured(before, factor * shift)
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9)  # near 0: float32 shifts
    assert ((a >= 0) & (a <= 1 + 1e-6)).all()
    np.testing.assert_allclose(measured(before, shift[:, ::-1].copy()), a, rtol=1e-6)


@pytest.mark.parametrize("metric", [TokenTranslation, TokenScatter])
def test_contract(metric):
    check_metric(metric)


# ------------------------------------------------------------------ scatter


def by_svd(before, after):
    """The first three right singular vectors of everything stacked less its mean, signed."""
    flat = np.concatenate([before.reshape(-1, before.shape[-1]), after.reshape(-1, after.shape[-1])])
    mean = flat.mean(0)
    _, sigma, basis = np.linalg.svd(flat - mean, full_matrices=False)
    basis = basis[:3]
    signs = np.array([np.sign(axis[np.abs(axis).argmax()]) for axis in basis])
    basis = basis * signs[:, None]
    return (before - mean) @ basis.T, (after - mean) @ basis.T, (sigma**2 / (sigma**2).sum())[:3], basis


@pytest.mark.parametrize("images", [1, 2, 3])
def test_scatter_agrees_with_the_singular_vectors(images):
    before = normal(images, 12, 20) * np.linspace(3, 0.1, 20)
    after = before + normal(images, 12, 20, seed=1) * 0.3 + 2
    got, expected = scatter(before, after), by_svd(before, after)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-8)


def test_points_on_a_line_are_the_line():
    line = np.outer(np.arange(5.0), [3.0, 4.0, 0, 0])[None]
    got = scatter(line, line)
    np.testing.assert_allclose(got.share, [1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(got.before[0, :, 0], 5 * (np.arange(5.0) - 2), atol=1e-9)


def test_result_of_scatter():
    """Two layers, the second with fewer tokens and channels: the rest is NaN."""
    images, sizes = 2, ((9, 6), (4, 5))
    values = {name: np.full((images, 2, 9, 6), np.nan, dtype=np.float32) for name in TokenScatter.dims}
    given = []
    for number, (n, c) in enumerate(sizes):
        before = normal(images, n, c, seed=number).astype(np.float32)
        after = (before + normal(images, n, c, seed=9 + number) + 1).astype(np.float32)
        values["tokens_before"][:, number, :n, :c] = before
        values["tokens_after"][:, number, :n, :c] = after
        given.append((before, after))
    rows = [Row(f"b{i}", i + 1.0, "attention", "encoder", i, 2, (3, 3), (8.0, 8.0)) for i in range(2)]
    result = TokenScatter().summarize(Traces(values, rows, ["x.png", "y.png"], of=40))
    assert result["before"].dims == ("layer", "image", "token", "axis3")
    for number, (before, after) in enumerate(given):
        n = before.shape[1]
        a, b, share, _ = by_svd(before.astype(np.float64), after.astype(np.float64))
        np.testing.assert_allclose(result["before"][number, :, :n], a, atol=1e-6)
        np.testing.assert_allclose(result["after"][number, :, :n], b, atol=1e-6)
        assert np.isnan(result["before"][number, :, n:]).all()
        np.testing.assert_allclose(result["centre_before"][number], a.mean(1), atol=1e-6)
        np.testing.assert_allclose(result["centre_after"][number], b.mean(1), atol=1e-6)
        np.testing.assert_allclose(result["explained"][number], share, rtol=1e-6)
        ratios = [ratio(*pair) for pair in zip(before, after, strict=True)]
        np.testing.assert_allclose(result["translation_ratio"][number], ratios, rtol=1e-6)
        assert result["token_scatter"][number] == pytest.approx(np.mean(ratios), rel=1e-6)
    np.testing.assert_array_equal(result["token_scatter_curve"], result["token_scatter"])
    assert np.isnan(result["token_scatter_curve_low"]).all()
    assert (result.attrs["images"], result.attrs["of"], result.attrs["interval"]) == (2, 40, "none")
    assert result["image"].values.tolist() == ["x.png", "y.png"]


def test_options():
    assert list(TokenScatter().sample(50, None)) == [12, 37]
    assert list(TokenScatter(images=4).sample(3, None)) == [0, 1, 2]
    with pytest.raises(UsageError, match="images is 1 or more, not 0"):
        TokenScatter(images=0)


# ------------------------------------------------------------------ choosing images


@given(st.integers(1, 500), st.integers(1, 60))
def test_evenly(count, wanted):
    found = evenly(count, wanted)
    assert len(found) == min(count, wanted) and len(set(found)) == len(found)
    assert found[0] >= 0 and found[-1] < count and found == sorted(found)
    steps = np.diff([-found[0] - 1, *found, 2 * count - found[-1] - 1])  # mirrored ends count as gaps too
    assert steps.max() - steps.min() <= 2


@given(st.lists(st.integers(0, 9), min_size=1, max_size=200), st.integers(2, 5), st.integers(1, 6))
def test_of_classes(labels, classes, each):
    found = of_classes(labels, classes=classes, images=classes * each)
    assert found == sorted(set(found))
    counts = {label: labels.count(label) for label in set(labels)}
    chosen = [labels[i] for i in found]
    assert len(set(chosen)) == min(classes, len(counts))
    enough = sum(n >= each for n in counts.values()) >= classes
    if enough:
        assert all(chosen.count(label) == each for label in set(chosen))
    assert all(chosen.count(label) == min(each, counts[label]) for label in set(chosen))
    assert found == of_classes(labels, classes=classes, images=classes * each)
