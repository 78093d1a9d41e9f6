"""Variance of tokens: numpy's in float64, the published notebook's up to its ddof, and Parseval's law."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import probekit
from probekit.metrics.feature_variance import FeatureVariance
from probekit.testing import TinyViT, check_metric, make_layer


def measure(tokens, grid=(14, 14), prefix=0):
    layer = make_layer(tokens=torch.tensor(np.asarray(tokens)), grid=grid, prefix=prefix)
    found = FeatureVariance().measure(layer)
    assert all(v.dtype == torch.float32 for v in found.values())
    return found["feature_variance"].double().numpy(), found["feature_variance_share"].double().numpy()


def maps(batch=3, n=196, channels=24, offset=0.0, seed=0):
    g = np.random.default_rng(seed)
    scale = g.uniform(0.1, 5, channels)
    return (g.standard_normal((batch, n, channels)) * scale + offset).astype(np.float32)


@pytest.mark.parametrize("offset", [0.0, 3.0, 100.0])
@pytest.mark.parametrize(("grid", "channels"), [((14, 14), 24), ((3, 5), 768), ((64, 64), 16)])
def test_numpys_variance(offset, grid, channels):
    """Also of channels whose mean is long beside their spread; there the share is small."""
    tokens = maps(n=grid[0] * grid[1], channels=channels, offset=offset)
    wide = tokens.astype(np.float64)
    variance, share = measure(tokens, grid)
    np.testing.assert_allclose(variance, wide.var(1).mean(1), rtol=1e-6)
    np.testing.assert_allclose(share, wide.var(1).mean(1) / (wide**2).mean((1, 2)), rtol=1e-6)


def test_the_published_notebook_up_to_its_ddof():
    """featuremap_variance.ipynb: tokens as (b, c, h, w), variance over h and w with ddof 1, mean over both."""
    tokens = maps(n=81)
    image = tokens.astype(np.float64).reshape(3, 9, 9, 24).transpose(0, 3, 1, 2)
    expected = image.var((2, 3), ddof=1).mean((0, 1))
    assert measure(tokens, (9, 9))[0].mean() * 81 / 80 == pytest.approx(expected, rel=1e-6)


def test_prefix_tokens_are_dropped():
    tokens = maps(n=14)
    moved = tokens.copy()
    moved[:, :2] = 1e3
    for a, b in zip(measure(tokens, (3, 4), 2), measure(moved, (3, 4), 2), strict=True):
        assert (a == b).all()
    np.testing.assert_allclose(measure(tokens, (3, 4), 2)[0], measure(tokens[:, 2:], (3, 4))[0])


def test_closed_forms():
    constant = np.broadcast_to(np.float32(3.7), (2, 196, 5))
    variance, share = measure(constant)
    np.testing.assert_allclose(variance, 0, atol=1e-12)
    np.testing.assert_allclose(share, 0, atol=1e-12)
    assert measure(np.zeros((2, 196, 5), np.float32)) == (pytest.approx(0), pytest.approx(0))
    signs = np.where(np.arange(196) % 2, 2.0, -2.0)[None, :, None].astype(np.float32)
    variance, share = measure(np.broadcast_to(signs, (2, 196, 3)))
    assert (variance == 4).all() and (share == 1).all()
    half = signs.repeat(2, 2) + np.array([0, 2], np.float32)  # mean square 4 and 8, variance 4 and 4
    assert measure(half)[1].item() == pytest.approx(4 / 6)


def test_parseval():
    """The variance is the energy of all frequencies but 0."""
    tokens = maps(n=30, offset=1.5)
    spectrum = np.abs(np.fft.fft2(tokens.astype(np.float64).reshape(3, 5, 6, 24), axes=(1, 2))) ** 2
    spectrum[:, 0, 0] = 0
    np.testing.assert_allclose(measure(tokens, (5, 6))[0], spectrum.sum((1, 2)).mean(1) / 30**2, rtol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.floats(1e-3, 1e3), st.integers(0, 2**20))
def test_laws(factor, seed):
    tokens = maps(n=12, seed=seed, offset=1)
    variance, share = measure(tokens, (3, 4))
    assert ((share > 0) & (share <= 1)).all()
    scaled = measure(tokens * np.float32(factor), (3, 4))
    np.testing.assert_allclose(scaled[0], variance * np.float64(np.float32(factor)) ** 2, rtol=1e-5)
    np.testing.assert_allclose(scaled[1], share, rtol=1e-5)
    order = np.random.default_rng(seed).permutation(12)
    np.testing.assert_allclose(measure(tokens[:, order], (4, 3))[0], variance, rtol=1e-5)
    shifted = measure(tokens + np.float32(2), (3, 4))
    np.testing.assert_allclose(shifted[0], variance, rtol=1e-4)


@pytest.mark.parametrize(("n", "channels"), [((14, 14), 96), ((7, 7), 33), ((32, 32), 48)])
def test_bits_depend_neither_on_the_batch_nor_on_threads(n, channels):
    tokens = maps(4, n[0] * n[1], channels)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = measure(tokens, n)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for i in range(4):
                alone = measure(tokens[i : i + 1], n)
                assert all((a == w[i]).all() for a, w in zip(alone, whole, strict=True))
    finally:
        torch.set_num_threads(before)


def test_contract_and_a_whole_model():
    check_metric(FeatureVariance)
    images = torch.randn(3, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    model = TinyViT(prefix=2)
    sites = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, given, out: sites.extend([given[0], out]))
    with torch.no_grad():
        model(images)
    first, *out = [sites[0], *sites[1::2]]
    found = probekit.probe(TinyViT(prefix=2), images, metrics=["feature_variance"])["feature_variance"]
    assert found["site"].values.tolist() == ["embed", "mid", "out", "mid", "out"]
    for row, tokens in zip((0, 2, 4), (first, *out), strict=True):
        expected = tokens[:, 2:].double().numpy().var(1).mean()
        assert float(found["feature_variance"][row]) == pytest.approx(expected, rel=1e-5)
