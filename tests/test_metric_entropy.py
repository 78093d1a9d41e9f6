"""Attention entropy: the formula in float64, closed forms, windows against the whole map, and what it is for."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from regions import NINE, block_maps, masked_layer

import probekit
from probekit.engine import Collector
from probekit.metrics.attention_entropy import AttentionEntropy
from probekit.metrics.nmi import NMI
from probekit.testing import TinyViT, check_metric, make_layer


def measured(layer):
    """Values and baselines as the engine gives them: within windows, averaged over tokens."""
    collector = Collector(AttentionEntropy(), [layer.row])
    collector.visitor.visit(layer)
    assert collector.failure is None
    values = collector.take(layer.batch)
    constants = collector.constants
    return (
        values["attention_entropy"][:, 0],
        values["attention_entropy_share"][:, 0],
        constants["uniform"].item(),
        constants["uniform_share"].item(),
    )


def reference(maps):
    """(B, H) mean entropy of the rows, mean entropy over the log of the number of keys with mass; float64."""
    a = maps.double().numpy()
    n = a.shape[-1]
    keys = (a[0, 0] > 0).sum(1)
    entropy, share = np.zeros(a.shape[:2]), np.zeros(a.shape[:2])
    for i, h in np.ndindex(a.shape[:2]):
        for q in range(n):
            own = -sum(x * math.log(x) for x in a[i, h, q] if x > 0)
            entropy[i, h] += own / n
            share[i, h] += (own / math.log(keys[q]) if keys[q] > 1 else 1) / n
    return entropy, share


def agree(layer, maps):
    entropy, share, uniform, uniform_share = measured(layer)
    expected, expected_share = reference(maps)
    np.testing.assert_allclose(entropy, expected, rtol=1e-6)
    np.testing.assert_allclose(share, expected_share, rtol=1e-6)
    even = (maps[:1, :1] > 0).double()
    even /= even.sum(-1, keepdim=True)
    assert uniform == pytest.approx(reference(even)[0].item(), rel=1e-6)
    assert uniform_share == pytest.approx(1)


@pytest.mark.parametrize(("grid", "prefix"), [((4, 4), 0), ((3, 5), 1), ((2, 7), 5)])
def test_patches_alone_renormalised(grid, prefix):
    n = grid[0] * grid[1] + prefix
    full = (torch.randn(2, 3, n, n, generator=torch.Generator().manual_seed(1)) * 3).softmax(-1)
    cut = full[:, :, prefix:, prefix:].double()
    agree(make_layer(full, grid=grid, prefix=prefix), cut / cut.sum(-1, keepdim=True))


def test_from_queries_and_keys():
    q, k = torch.randn(2, 2, 3, 17, 8, generator=torch.Generator().manual_seed(2)).mul(2).unbind()
    scores = (q[:, :, 1:].double() @ k[:, :, 1:].double().mT) * 8**-0.5
    agree(make_layer(q=q, k=k, grid=(4, 4), prefix=1), scores.softmax(-1))


def test_windows_and_regions():
    sets = [[r * 4 + c for r in (a, a + 1) for c in (b, b + 1)] for a in (0, 2) for b in (0, 2)]
    maps = block_maps(sets)
    inside = torch.stack([maps[:, :, s][..., s] for s in sets], 1).flatten(0, 1)
    agree(make_layer(inside, grid=(4, 4), window=2), maps)
    maps = block_maps(NINE)
    agree(masked_layer(maps, (3, 3), NINE), maps)


def test_uniform_and_homogeneous_maps_are_told_apart():
    """NMI is 0 for both; entropy is log N and the log of the number of keys that are seen."""
    flat = torch.full((196, 196), 1 / 196)
    few = torch.zeros(196, 196)
    few[:, [3, 70, 90, 141]] = 0.25
    eye = torch.eye(196)
    layer = make_layer(torch.stack([flat, few, eye])[None])
    assert NMI().measure(layer)["nmi"][0].tolist() == pytest.approx([0, 0, 1], abs=1e-6)
    found = AttentionEntropy().measure(layer)
    expected = [math.log(196), math.log(4), 0]
    assert found["attention_entropy"][0].tolist() == pytest.approx(expected, abs=1e-6)
    shares = [1, math.log(4) / math.log(196), 0]
    assert found["attention_entropy_share"][0].tolist() == pytest.approx(shares, abs=1e-6)


def test_one_key():
    entropy, share, uniform, uniform_share = measured(
        make_layer(torch.ones(8, 3, 1, 1), grid=(2, 2), window=1)
    )
    assert (entropy == 0).all() and (share == 1).all()
    assert (uniform, uniform_share) == (0, 1)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 12), st.floats(0, 40), st.integers(0, 2**20))
def test_bounds_and_orders(n, gain, seed):
    g = torch.Generator().manual_seed(seed)
    p = (torch.randn(2, 3, n, n, generator=g) * gain).softmax(-1)
    found = AttentionEntropy().measure(make_layer(p, grid=(1, n)))
    share = found["attention_entropy_share"]
    assert ((share >= 0) & (share <= 1 + 1e-6)).all()
    queries, keys = torch.randperm(n, generator=g), torch.randperm(n, generator=g)
    moved = AttentionEntropy().measure(make_layer(p[:, :, queries][..., keys], grid=(1, n)))
    torch.testing.assert_close(moved["attention_entropy_share"], share, rtol=1e-5, atol=1e-6)


def test_contract_and_a_whole_model():
    check_metric(AttentionEntropy)
    images = torch.randn(3, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    maps = []

    def attend(q, k, v):
        maps.append((q.double() @ k.double().mT)[:, :, 4:, 4:].softmax(-1))
        return (q @ k.mT).softmax(-1) @ v

    with torch.no_grad():
        TinyViT(attend, prefix=4)(images)
    found = probekit.probe(TinyViT(prefix=4), images, metrics=["attention_entropy"])["attention_entropy"]
    expected = np.stack([reference(m)[0].mean(0) for m in maps])
    np.testing.assert_allclose(found["attention_entropy"], expected, rtol=1e-5)  # the model's own rounding
    np.testing.assert_allclose(found["attention_entropy_share"], expected / math.log(24), rtol=1e-5)
    np.testing.assert_allclose(found["uniform"], math.log(24), rtol=1e-6)
