"""Attention distance: closed forms, the formulas of METRICS in float64, and two other codes' conventions."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from regions import NINE, block_maps, masked_layer

from probekit.attention import stats_from_probabilities
from probekit.errors import DoesNotApply, UsageError
from probekit.metrics.attention_distance import AttentionDistance
from probekit.testing import make_layer


def positions(rows, cols, stride):
    return np.array([(r * stride, c * stride) for r in range(rows) for c in range(cols)], dtype=float)


def distances(rows, cols, stride):
    p = positions(rows, cols, stride)
    return torch.tensor([[math.dist(a, b) for b in p] for a in p]).float()[None, None]


def layer_of(full, d, prefix=0):
    """What the metric sees of a layer with attention `full` (B, H, prefix + N, prefix + N)."""
    patches = full[:, :, prefix:, prefix:]
    layer = SimpleNamespace(
        attention_full=full,
        attention_stats=stats_from_probabilities(patches, d),
        distances=d,
        prefix=prefix,
        window_count=1,
        window_share=1.0,
        unfold=lambda values: values.unsqueeze(1),
    )
    layer.windows = lambda: [layer]
    return layer


def uniform_distance(d):
    """What the metric says is the distance of uniform attention, with distances (1, 1, N, N)."""
    return AttentionDistance().describe(layer_of(torch.ones_like(d), d))["uniform"]


def measure(p, rows, cols, stride, **options):
    full = torch.as_tensor(np.asarray(p)).float().expand(1, 1, -1, -1)
    values = AttentionDistance(**options).measure(layer_of(full, distances(rows, cols, stride)))
    assert values["attention_distance"].dtype == torch.float32
    return values["attention_distance"].item()


def uniform(n):
    return np.full((n, n), 1 / n)


def neighbours(rows, cols, near):
    """Rows equal over the tokens that are `near` (row difference, column difference), normalised."""
    p = positions(rows, cols, 1)
    w = np.array([[float(near(*(a - b))) for b in p] for a in p])
    return w / w.sum(1, keepdims=True)


@pytest.mark.parametrize(
    ("rows", "stride", "px"),
    [(14, 16, 116.492), (16, 14, 116.57), (28, 8, 116.72), (7, 32, 115.50), (27, 8, 112.55), (31, 7, 113.09)],
)
def test_uniform(rows, stride, px):
    got = measure(uniform(rows * rows), rows, rows, stride)
    assert got == pytest.approx(px, abs=6e-3)
    d = distances(rows, rows, stride)
    assert uniform_distance(d) == pytest.approx(got, rel=1e-5)


@pytest.mark.parametrize(
    ("rows", "stride", "px"),
    [(7, 4, 14.44), (7, 8, 28.88), (7, 16, 57.75), (7, 32, 115.50), (6, 4, 12.32), (12, 4, 24.94)],
)
def test_uniform_in_windows(rows, stride, px):
    d = distances(rows, rows, stride)
    assert uniform_distance(d) == pytest.approx(px, abs=6e-3)


def test_closed_forms():
    eye, flat = np.eye(196), uniform(196)
    one_key = np.zeros((196, 196))
    one_key[:, 5] = 1
    table = {
        0.0: eye,
        58.246: (eye + flat) / 2,
        74.286: neighbours(14, 14, lambda r, c: r == 0),
        16.698: neighbours(14, 14, lambda r, c: max(abs(r), abs(c)) <= 1),
        36.680: neighbours(14, 14, lambda r, c: math.exp(-(r * r + c * c) / (2 * 2**2))),
        128.471: one_key,
    }
    for px, p in table.items():
        assert measure(p, 14, 14, 16) == pytest.approx(px, abs=6e-4)


def test_single_queries():
    d = distances(14, 14, 16)[0, 0]
    for query, px in ((0, 161), (7 * 14 + 7, 86)):
        p = np.zeros((196, 196))
        p[query] = 1 / 196  # the other rows have no mass and don't count
        assert measure(p, 14, 14, 16) == pytest.approx(px, abs=0.5)
        assert measure(p, 14, 14, 16) == pytest.approx(d[query].mean().item(), rel=1e-5)
    farthest = np.eye(196)[d.argmax(1).numpy()]
    farthest[1:195] = 0
    farthest[:, 1:195] = 0
    assert measure(farthest, 14, 14, 16) == pytest.approx(294.16, abs=6e-3)


def test_anisotropic_stride_and_oblong_grid():
    rows, cols, sy, sx = 3, 5, 8.0, 2.0
    p = [(r * sy, c * sx) for r in range(rows) for c in range(cols)]
    d = torch.tensor([[math.dist(a, b) for b in p] for a in p]).float()[None, None]
    a = np.random.default_rng(0).dirichlet(np.ones(15), 15)
    expected = np.mean([sum(a[i, j] * math.dist(p[i], p[j]) for j in range(15)) for i in range(15)])
    layer = layer_of(torch.tensor(a).float()[None, None], d)
    assert AttentionDistance().measure(layer)["attention_distance"].item() == pytest.approx(
        expected, rel=1e-6
    )


def attention_with_prefix(batch=3, heads=4, n=49, prefix=1, gain=3.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, heads, n + prefix, n + prefix, generator=g) * gain
    scores[..., :prefix] += 2  # sinks
    return scores.softmax(-1)


def notebook(attention, patch=16):
    """The published notebook's numbers, float64: patch block, 1e-32, rows to 1, grid distances, mean."""
    a = attention.double().numpy()[:, :, 1:, 1:] + 1e-32
    n = a.shape[-1]
    side = math.isqrt(n)
    assert side**2 == n
    a = a / a.sum(-1, keepdims=True)
    grid = [divmod(i, side) for i in range(n)]
    far = np.array([[patch * math.hypot(p[0] - q[0], p[1] - q[1]) for q in grid] for p in grid])
    return (a * far).sum(-1).mean(-1)


@pytest.mark.parametrize("compat", ["", "cl-vs-mim"])
def test_agrees_with_the_published_code(compat):
    full = attention_with_prefix()
    got = AttentionDistance(compat=compat).measure(layer_of(full, distances(7, 7, 16), prefix=1))
    np.testing.assert_allclose(got["attention_distance"], notebook(full), rtol=1e-5)


@pytest.mark.parametrize("prefix", [1, 2, 5])
def test_without_renormalisation_it_is_lower_by_the_prefixs_share(prefix):
    """As probing-vits: rows keep the mass they give to patches."""
    full = attention_with_prefix(prefix=prefix)
    layer = layer_of(full, distances(7, 7, 16), prefix)
    metric = AttentionDistance(renormalise=False)
    assert metric.needs == {"attention_full"} and metric.conventions["renormalised"] is False
    a, far = full.double().numpy()[:, :, prefix:, prefix:], layer.distances.double().numpy()[0, 0]
    got = metric.measure(layer)["attention_distance"]
    np.testing.assert_allclose(got, (a * far).sum(-1).mean(-1), rtol=1e-6)
    mass = a.sum(-1)
    lost = (mass * ((a / mass[..., None]) * far).sum(-1)).mean(-1)
    np.testing.assert_allclose(got, lost, rtol=1e-6)
    assert (got < AttentionDistance().measure(layer)["attention_distance"]).all()


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 1), st.integers(0, 2**20))
def test_linear_in_the_attention(share, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.dirichlet(np.ones(16), (2, 16))
    mixed = measure(share * a + (1 - share) * b, 4, 4, 16)
    assert mixed == pytest.approx(share * measure(a, 4, 4, 16) + (1 - share) * measure(b, 4, 4, 16), rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**20))
def test_transposed_and_mirrored_grids(rows, cols, seed):
    n = rows * cols
    a = np.random.default_rng(seed).dirichlet(np.ones(n), n)
    there = np.arange(n).reshape(rows, cols)
    turned, mirrored = there.T.flatten(), there[:, ::-1].flatten()
    got = measure(a, rows, cols, 16)
    assert measure(a[np.ix_(turned, turned)], cols, rows, 16) == pytest.approx(got, rel=1e-5, abs=1e-5)
    assert measure(a[np.ix_(mirrored, mirrored)], rows, cols, 16) == pytest.approx(got, rel=1e-5, abs=1e-5)


def test_heads_and_images_are_independent():
    full, d = attention_with_prefix(), distances(7, 7, 16)
    got = AttentionDistance().measure(layer_of(full, d, 1))["attention_distance"]
    parts = [AttentionDistance().measure(layer_of(x[None], d, 1))["attention_distance"] for x in full]
    assert torch.equal(torch.cat(parts), got)
    images, heads = [2, 0, 1], [3, 1, 0, 2]
    moved = AttentionDistance().measure(layer_of(full[images][:, heads], d, 1))["attention_distance"]
    assert torch.equal(moved, got[images][:, heads])


def test_options():
    assert AttentionDistance().needs == {"attention_stats"}
    assert AttentionDistance().options == {"compat": "", "renormalise": True}
    with pytest.raises(UsageError, match="'cl-vs-mim', not 'cl_vs_mim'"):
        AttentionDistance(compat="cl_vs_mim")


def test_the_published_codes_1e_32_where_the_prefix_takes_everything():
    """Queries that leave patches 1e-31 in all: what the notebook adds then draws them towards uniform."""
    random = np.random.default_rng(0)
    full = np.zeros((1, 2, 50, 50), dtype=np.float32)
    full[..., 0] = 1
    full[..., 1:] = random.gamma(0.3, 4e-33, (1, 2, 50, 49))
    d = distances(7, 7, 16)
    got = AttentionDistance(compat="cl-vs-mim").measure(layer_of(torch.from_numpy(full), d, prefix=1))
    a = full[:, :, 1:, 1:].astype(np.float64) + 1e-32
    expected = ((a / a.sum(-1, keepdims=True)) * np.asarray(d).reshape(49, 49)).sum(-1).mean(-1)
    np.testing.assert_allclose(got["attention_distance"], expected, rtol=1e-5)
    plain = AttentionDistance().measure(layer_of(torch.from_numpy(full), d, prefix=1))["attention_distance"]
    assert float((plain - got["attention_distance"]).abs().max()) > 0.5


def test_compat_renormalises():
    with pytest.raises(UsageError, match="renormalise=False"):
        AttentionDistance(compat="cl-vs-mim", renormalise=False)


# ---------------------------------------------------------------------- share of uniform, windows


def both(layer):
    found = AttentionDistance().measure(layer)
    assert all(v.dtype == torch.float32 for v in found.values())
    return found["attention_distance"].double().numpy(), found["attention_distance_share"].double().numpy()


def written_out(maps, grid, stride=16.0):
    """Distance of whole maps (B, H, N, N), and of uniform attention over the keys with any mass, float64."""
    a = maps.double().numpy()
    p = positions(*grid, stride)
    distance, flat = np.zeros(a.shape[:2]), 0.0
    seen = a[0, 0] > 0
    for q in range(len(p)):
        far = [math.dist(p[q], other) for other in p]
        distance += sum(a[:, :, q, k] * far[k] for k in range(len(p))) / len(p)
        flat += np.mean([far[k] for k in range(len(p)) if seen[q, k]]) / len(p)
    return distance, flat


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_share_of_uniform(grid):
    maps = attention_with_prefix(n=grid[0] * grid[1], prefix=2)
    layer = make_layer(maps, grid=grid, prefix=2)
    cut = maps[:, :, 2:, 2:].double()
    distance, flat = written_out(cut / cut.sum(-1, keepdim=True), grid)
    got, share = both(layer)
    np.testing.assert_allclose(got, distance, rtol=1e-6)
    np.testing.assert_allclose(share, distance / flat, rtol=1e-6)
    described = AttentionDistance().describe(layer)
    assert described["uniform"] == pytest.approx(flat, rel=1e-6) and described["uniform_share"] == 1
    n = grid[0] * grid[1]
    even, eye = (
        both(make_layer(m.expand(1, 1, n, n), grid=grid)) for m in (torch.ones(n, n) / n, torch.eye(n))
    )
    assert even[1].item() == pytest.approx(1, rel=1e-6)
    assert eye[1].item() < 1e-30


def test_share_without_renormalisation_is_lower_by_the_prefixs_share():
    full = attention_with_prefix(n=16, prefix=1)
    found = AttentionDistance(renormalise=False).measure(make_layer(full, grid=(4, 4), prefix=1))
    flat = written_out(torch.ones(1, 1, 16, 16), (4, 4))[1]
    np.testing.assert_allclose(
        found["attention_distance_share"], found["attention_distance"] / flat, rtol=1e-6
    )


def test_windows_are_those_of_the_whole_map():
    """2 x 3 windows of 3 x 3 tokens: the layer's numbers are those of its un-windowed, block-sparse map."""
    sets = [
        [r * 9 + c for r in range(top, top + 3) for c in range(left, left + 3)]
        for top in (0, 3)
        for left in (0, 3, 6)
    ]
    maps = block_maps(sets)
    inside = torch.stack([maps[:, :, s][..., s] for s in sets], 1).flatten(0, 1)
    layer = make_layer(inside, grid=(6, 9), window=3)
    distance, flat = written_out(maps, (6, 9))
    got, share = both(layer)
    np.testing.assert_allclose(got, distance, rtol=1e-6)
    np.testing.assert_allclose(share, distance / flat, rtol=1e-6)
    assert AttentionDistance().describe(layer)["uniform"] == pytest.approx(flat, rel=1e-6)


def test_sets_of_unequal_size():
    """Regions of 4, 2, 2 and 1 tokens: mean over tokens of both distances, then the share."""
    maps = block_maps(NINE)
    layer = masked_layer(maps, (3, 3), NINE)
    distance, flat = written_out(maps, (3, 3))
    got, share = both(layer)
    np.testing.assert_allclose(got, distance, rtol=1e-6)
    np.testing.assert_allclose(share, distance / flat, rtol=1e-6)
    assert AttentionDistance().describe(layer)["uniform"] == pytest.approx(flat, rel=1e-6)
    with pytest.raises(DoesNotApply, match="windowed attention and no single full map"):
        AttentionDistance(renormalise=False).measure(layer)


def test_tokens_in_windows_of_one():
    """There all attention is uniform: 0 px of 0 px is 1."""
    got, share = both(make_layer(torch.ones(8, 3, 1, 1), grid=(2, 2), window=1))
    assert got.shape == (2, 3) and (got == 0).all() and (share == 1).all()
