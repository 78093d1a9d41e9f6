"""probekit.attention against float64 references written from the formulas of the paper."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from probekit import attention
from probekit.attention import (
    probabilities,
    renormalise,
    share_beside,
    stats_from_probabilities,
    stats_from_scores,
)

FIELDS = ("distance", "conditional_entropy", "key_entropy")
EVERY = (*FIELDS, "log_mass")


def softmax_rows(scores: np.ndarray) -> list[np.ndarray | None]:
    rows = []
    for row in scores.reshape(-1, scores.shape[-1]):
        if np.isneginf(row).all():
            rows.append(None)
            continue
        w = np.exp(row - row.max())
        rows.append(w / w.sum())
    return rows


def reference(q, k, scale, distances, bias=None):
    """(3, B, H) float64: distance, mean H(k|q), H(mean row); rows without any key are left out."""
    q, k = (t.double().numpy() for t in (q, k))
    batch, heads, n, _ = q.shape
    d = np.broadcast_to(distances.double().numpy(), (batch, 1, n, k.shape[2]))
    b = np.zeros((1, 1, 1, 1)) if bias is None else bias.double().numpy()
    b = np.broadcast_to(b, (batch, heads, n, k.shape[2]))
    out = np.zeros((3, batch, heads))
    for i in range(batch):
        for h in range(heads):
            rows = softmax_rows(scale * q[i, h] @ k[i, h].T + b[i, h])
            kept = [(p, d[i, 0, j]) for j, p in enumerate(rows) if p is not None]
            if not kept:
                continue
            out[0, i, h] = np.mean([np.sum(p * far) for p, far in kept])
            out[1, i, h] = np.mean([-np.sum(p[p > 0] * np.log(p[p > 0])) for p, _ in kept])
            mean = np.mean([p for p, _ in kept], axis=0)
            out[2, i, h] = -np.sum(mean[mean > 0] * np.log(mean[mean > 0]))
    return out


def case(batch, heads, n, width, *, keys=None, gain=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, n, width, generator=g) * gain
    k = torch.randn(batch, heads, keys or n, width, generator=g)
    return q, k, width**-0.5, torch.rand(1, 1, n, keys or n, generator=g) * 200


def close(stats, expected, rtol=1e-6, atol=1e-6):
    for field, values in zip(FIELDS, expected, strict=True):
        np.testing.assert_allclose(
            getattr(stats, field).double().numpy(), values, rtol=rtol, atol=atol, err_msg=field
        )


def same_bits(a, b):
    return all(torch.equal(getattr(a, field), getattr(b, field)) for field in EVERY)


def pick(stats, index):
    return attention.AttentionStats(*(getattr(stats, field)[index] for field in EVERY))


@pytest.fixture
def small_tiles(monkeypatch):
    """Heads and queries are cut into blocks already at sizes a test can afford."""
    monkeypatch.setattr(attention, "_TILE_BYTES", 8 * 150)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


SHAPES = [
    (2, 3, 7, 5),
    (1, 12, 196, 64),
    (3, 1, 10, 4),
    (1, 1, 33, 8),
    (9, 4, 16, 8),
    (2, 5, 31, 6),
    (2, 2, 1, 4),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_scores_match_the_formulas(shape):
    q, k, scale, d = case(*shape, gain=3)
    close(stats_from_scores(q, k, scale=scale, distances=d), reference(q, k, scale, d))


@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_of_heads_and_queries_are_exact(shape, small_tiles):
    q, k, scale, d = case(*shape, gain=3)
    close(stats_from_scores(q, k, scale=scale, distances=d), reference(q, k, scale, d))


def test_more_keys_or_queries_than_the_other(small_tiles):
    for n, keys in ((5, 12), (12, 5), (40, 3)):
        q, k, scale, d = case(2, 3, n, 4, keys=keys)
        close(stats_from_scores(q, k, scale=scale, distances=d), reference(q, k, scale, d))


def test_a_thousand_tokens_are_swept_without_an_n_by_n_tensor():
    n = 1100
    q, k, scale, d = case(1, 2, n, 8, gain=2)
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (list, tuple)) else [out]:
                if (
                    isinstance(t, torch.Tensor)
                    and t.untyped_storage().data_ptr() != d.untyped_storage().data_ptr()
                ):
                    largest = max(largest, t.untyped_storage().nbytes())
            return out

    with Largest():
        stats = stats_from_scores(q, k, scale=scale, distances=d)
    assert 0 < largest < n * n * 4 / 2
    close(stats, reference(q, k, scale, d))


def test_distances_of_each_image():
    q, k, scale, _ = case(6, 2, 9, 4)
    d = torch.rand(6, 1, 9, 9) * 50
    close(stats_from_scores(q, k, scale=scale, distances=d), reference(q, k, scale, d))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_low_precision_inputs_are_computed_in_float32(dtype):
    q, k, scale, d = (t.to(dtype) if isinstance(t, torch.Tensor) else t for t in case(2, 3, 20, 16, gain=4))
    close(stats_from_scores(q, k, scale=scale, distances=d), reference(q, k, scale, d), rtol=2e-6)


def test_autocast_and_reduced_precision_products_change_nothing():
    q, k, scale, d = case(2, 4, 49, 32, gain=4)
    plain = stats_from_scores(q, k, scale=scale, distances=d)
    p = probabilities(q, k, scale=scale)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert same_bits(stats_from_scores(q, k, scale=scale, distances=d), plain)
            assert torch.equal(probabilities(q, k, scale=scale), p)
        assert torch.get_float32_matmul_precision() == "medium"
        with pytest.raises(ZeroDivisionError), attention.exact_float32(q.device):
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
            raise ZeroDivisionError
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_no_gradient_is_recorded_and_inputs_are_left_alone():
    q, k, scale, d = case(1, 2, 6, 4)
    bias = torch.randn(1, 2, 6, 6)
    copies = [t.clone() for t in (q, k, d, bias)]
    stats = stats_from_scores(q.requires_grad_(), k.requires_grad_(), scale=scale, bias=bias, distances=d)
    assert not stats.distance.requires_grad
    assert all(torch.equal(a, b) for a, b in zip((q, k, d, bias), copies, strict=True))
    p = probabilities(q, k, scale=scale)
    copy = p.clone()
    stats_from_probabilities(p, d)
    assert torch.equal(p, copy)


# ---------------------------------------------------------------------- bits


BIT_SHAPES = [
    (5, 12, 196, 64),
    (7, 3, 49, 32),
    (5, 1, 64, 96),
    (4, 6, 100, 48),
    (3, 2, 9, 24),
    (3, 1, 400, 48),
]


@pytest.mark.parametrize("shape", BIT_SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_bits_depend_neither_on_the_batch_nor_on_threads(shape, masked, threads):
    q, k, scale, d = case(*shape, gain=3)
    bias = torch.randn(1, shape[1], shape[2], shape[2]) if masked else None
    seen = []
    for count in (1, 2):
        threads(count)
        seen.append(stats_from_scores(q, k, scale=scale, bias=bias, distances=d))
        for i in range(len(q)):
            alone = stats_from_scores(q[i : i + 1], k[i : i + 1], scale=scale, bias=bias, distances=d)
            assert same_bits(alone, pick(seen[-1], slice(i, i + 1)))
        tail = stats_from_scores(q[1:], k[1:], scale=scale, bias=bias, distances=d)
        assert same_bits(tail, pick(seen[-1], slice(1, None)))
    assert same_bits(*seen)


@pytest.mark.parametrize("shape", [(3, 12, 196, 64), (2, 3, 50, 24)])
def test_bits_do_not_depend_on_strides(shape):
    batch, heads, n, width = shape
    packed = torch.randn(batch, n + 1, 3, heads, width)
    q, k = packed[:, 1:, 0].transpose(1, 2), packed[:, 1:, 1].transpose(1, 2)
    d = torch.rand(1, 1, n, n)
    a = stats_from_scores(q, k, scale=0.3, distances=d)
    assert same_bits(a, stats_from_scores(q.contiguous(), k.contiguous(), scale=0.3, distances=d))


def test_bits_do_not_depend_on_the_order_of_images_and_heads():
    q, k, scale, d = case(4, 7, 60, 16, gain=3)
    stats = stats_from_scores(q, k, scale=scale, distances=d)
    images, heads = torch.randperm(4), torch.randperm(7)
    moved = stats_from_scores(q[images][:, heads], k[images][:, heads], scale=scale, distances=d)
    assert same_bits(moved, pick(pick(stats, images), (slice(None), heads)))


def test_bits_of_probabilities_do_not_depend_on_the_batch(threads):
    q, k, scale, d = case(5, 3, 49, 16, gain=3)
    p = probabilities(q, k, scale=scale)
    threads(1)
    whole = stats_from_probabilities(p, d)
    threads(2)
    for i in range(5):
        assert same_bits(stats_from_probabilities(p[i : i + 1], d), pick(whole, slice(i, i + 1)))


# ---------------------------------------------------------------------- traps


def test_peaked_logits():
    q, k, scale, d = case(2, 4, 49, 16, gain=64)
    stats = stats_from_scores(q, k, scale=scale, distances=d)
    close(stats, reference(q, k, scale, d), rtol=3e-6, atol=3e-5)  # logits to 250, rounded to 2e-5
    assert torch.isfinite(stats.information).all()


@pytest.mark.parametrize("low", [-math.inf, -100.0])
def test_masked_pairs(low):
    q, k, scale, d = case(3, 2, 24, 8)
    bias = torch.zeros(3, 1, 24, 24).masked_fill_(torch.rand(3, 1, 24, 24) < 0.6, low)
    bias[..., 0] = 0
    close(stats_from_scores(q, k, scale=scale, bias=bias, distances=d), reference(q, k, scale, d, bias))
    p = probabilities(q, k, scale=scale, bias=bias)
    close(stats_from_probabilities(p, d), reference(q, k, scale, d, bias))


def test_masked_rows_are_left_out(small_tiles):
    q, k, scale, d = case(2, 3, 12, 4)
    bias = torch.zeros(2, 1, 12, 12)
    bias[0, 0, [0, 5, 11]] = -math.inf
    bias[1] = -math.inf
    stats = stats_from_scores(q, k, scale=scale, bias=bias, distances=d)
    close(stats, reference(q, k, scale, d, bias))
    assert all((getattr(stats, field)[1] == 0).all() for field in FIELDS)
    p = probabilities(q, k, scale=scale, bias=bias)
    assert (p[0, :, [0, 5, 11]] == 0).all() and (p[1] == 0).all()
    close(stats_from_probabilities(p, d), reference(q, k, scale, d, bias))


@pytest.mark.parametrize("form", [(1, 1, 8, 8), (1, 3, 8, 8), (2, 3, 8, 8), (2, 1, 1, 8), (8,), (8, 8)])
def test_bias_broadcasts(form):
    q, k, scale, d = case(2, 3, 8, 4)
    bias = torch.randn(form)
    close(stats_from_scores(q, k, scale=scale, bias=bias, distances=d), reference(q, k, scale, d, bias))


def test_nan_is_not_swallowed():
    q, k, scale, d = case(2, 2, 6, 4)
    q[0, 1, 3, 2] = math.nan
    for bias in (None, torch.zeros(1)):
        stats = stats_from_scores(q, k, scale=scale, bias=bias, distances=d)
        assert stats.distance.isnan().tolist() == [[False, True], [False, False]]
        assert stats.information.isnan()[0, 1]
    p = probabilities(q, k, scale=scale)
    assert stats_from_probabilities(p, d).distance.isnan()[0, 1]
    assert probabilities(q, k, scale=scale, bias=torch.zeros(1)).isnan()[0, 1, 3].all()


def test_denormal_probabilities():
    q, k, scale, d = case(1, 2, 16, 8)
    bias = torch.zeros(16, 16).masked_fill_(torch.eye(16).roll(3, 1) < 0.5, -95.0)
    p = probabilities(q, k, scale=scale, bias=bias)
    assert ((p > 0) & (p < torch.finfo(torch.float32).tiny)).any()
    for stats in (
        stats_from_probabilities(p, d),
        stats_from_scores(q, k, scale=scale, bias=bias, distances=d),
    ):
        close(stats, reference(q, k, scale, d, bias))


@pytest.mark.parametrize("mass", [1e-2, 1e-5])
def test_prefix_that_takes_nearly_all_attention(mass):
    n, scale = 49, 8**-0.5
    q, k, _, d = case(2, 3, n, 8, gain=3)
    scores = scale * q.double() @ k.double().mT
    sink = scores.logsumexp(-1, keepdim=True) + math.log((1 - mass) / mass)
    full = torch.cat([sink, scores], -1).softmax(-1)  # one prefix key
    assert full[..., 1:].sum(-1).sub(mass).abs().max() < 1e-9
    expected = reference(q, k, scale, d)
    close(stats_from_scores(q, k, scale=scale, distances=d), expected)
    close(stats_from_probabilities(full[..., 1:].float(), d), expected, rtol=2e-6)
    close(stats_from_probabilities(renormalise(full[..., 1:]), d), expected)


def test_one_hot_rows_have_no_negative_entropy():
    g = torch.Generator().manual_seed(0)
    p = torch.eye(4)[:1] * torch.rand(500, 2, 1, 1, generator=g)  # one query an image: nothing averages out
    stats = stats_from_probabilities(p, torch.ones(1, 1, 1, 4))
    assert (stats.conditional_entropy >= 0).all() and stats.conditional_entropy.max() < 1e-6
    assert (stats.information <= stats.key_entropy).all()


def test_small_information_is_not_lost():
    """Nearly uniform attention, as in the last layers of contrastive models."""
    q, k, scale, d = case(2, 4, 196, 64, gain=0.05)
    expected = reference(q, k, scale, d)
    information = stats_from_scores(q, k, scale=scale, distances=d).information
    np.testing.assert_allclose(information, expected[2] - expected[1], atol=1e-7)


# ---------------------------------------------------------------------- keys beside those swept


def log_sum(scores):
    """Of exp over the last axis, as a loop of float64 numbers."""
    found = np.full(scores.shape[:-1], -math.inf)
    for place in np.ndindex(found.shape):
        for x in scores[place]:
            high, low = max(found[place], x), min(found[place], x)
            found[place] = high if math.isinf(low) else high + math.log1p(math.exp(low - high))
    return found


@pytest.mark.parametrize("shape", [(2, 3, 7, 5), (1, 12, 49, 16), (9, 4, 16, 8), (2, 5, 31, 6)])
@pytest.mark.parametrize("masked", [False, True])
def test_log_mass(shape, masked, small_tiles):
    q, k, scale, d = case(*shape, gain=3)
    bias = torch.randn(1, shape[1], shape[2], shape[2]) if masked else None
    if masked:
        bias[:, 0, 2] = -math.inf
    scores = scale * q.double().numpy() @ k.double().numpy().swapaxes(-1, -2)
    expected = log_sum(scores + (bias.double().numpy() if masked else 0))
    got = stats_from_scores(q, k, scale=scale, bias=bias, distances=d).log_mass
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=2e-6)
    p = probabilities(q, k, scale=scale, bias=bias) * 0.25
    given = stats_from_probabilities(p, d).log_mass
    np.testing.assert_allclose(given, np.where(np.isneginf(expected), -math.inf, math.log(0.25)), atol=2e-6)


def beside(batch=2, heads=3, n=11, extra=2, width=8, gain=3.0, shift=0.0, bias=None):
    """Shares by `share_beside`, and those of the full softmax in float64; keys beside come first."""
    q, k, scale, d = case(batch, heads, n, width, keys=n + extra, gain=gain)
    full = torch.zeros(1, 1, 1, n + extra) if bias is None else bias
    full = full + torch.cat([torch.full((extra,), shift), torch.zeros(n)])
    stats = stats_from_scores(
        q, k[:, :, extra:], scale=scale, bias=full[..., extra:], distances=d[..., extra:]
    )
    got = share_beside(q, k[:, :, :extra], scale=scale, bias=full[..., :extra], log_mass=stats.log_mass)
    scores = scale * q.double().numpy() @ k.double().numpy().swapaxes(-1, -2) + full.double().numpy()
    rows = [0.0 if row is None else row[:extra].sum() for row in softmax_rows(scores)]
    return got, np.array(rows).reshape(got.shape)


@pytest.mark.parametrize("extra", [1, 2, 5])
@pytest.mark.parametrize("shift", [0.0, -30.0, 5.0, 60.0])
def test_share_beside_is_the_full_softmaxs(extra, shift, small_tiles):
    """From 1e-13 to all but 1e-24 of the attention; relative, as sigmoid keeps small shares' digits."""
    got, expected = beside(extra=extra, shift=shift)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_share_beside_of_peaked_scores():
    got, expected = beside(gain=60)
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=1e-5)  # logits to 200, rounded to 2e-5


@pytest.mark.parametrize("form", [(2, 3, 11, 13), (1, 3, 11, 13), (2, 1, 1, 13), (1, 1, 11, 13)])
def test_share_beside_with_bias(form):
    got, expected = beside(bias=torch.randn(form) * 4)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_share_beside_of_masked_keys():
    """All swept keys masked: everything; the keys beside masked, or all: nothing."""
    bias = torch.zeros(1, 1, 11, 13)
    bias[..., 0, 2:] = bias[..., 1, :2] = bias[..., 2, :] = -math.inf
    bias[..., 3, 1] = bias[..., 3, 5] = -math.inf
    got, expected = beside(bias=bias)
    assert (got[..., 0] == 1).all() and (got[..., 1:3] == 0).all()
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_share_beside_keeps_nan():
    q, k, scale, d = case(2, 2, 6, 4)
    q[0, 1, 3, 2] = math.nan
    for bias in (None, torch.zeros(1, 1, 6, 6)):
        log_mass = stats_from_scores(q, k, scale=scale, bias=bias, distances=d).log_mass
        got = share_beside(q, k, scale=scale, bias=bias, log_mass=log_mass)
        assert got.isnan().nonzero().tolist() == [[0, 1, 3]]


@pytest.mark.parametrize("extra", [1, 3])
@pytest.mark.parametrize("heads", [1, 3, 12])
def test_bits_of_shares_beside_depend_neither_on_the_batch_nor_on_threads(extra, heads, threads):
    q, k, scale, _ = case(5, heads, 100, 64, keys=extra, gain=3)
    log_mass = torch.randn(5, heads, 100)
    seen = []
    for count in (1, 2):
        threads(count)
        seen.append(share_beside(q, k, scale=scale, log_mass=log_mass))
        for i in range(5):
            cut = slice(i, i + 1)
            assert torch.equal(
                share_beside(q[cut], k[cut], scale=scale, log_mass=log_mass[cut]), seen[-1][cut]
            )
    assert torch.equal(*seen)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(share_beside(q, k, scale=scale, log_mass=log_mass), seen[0])


# ---------------------------------------------------------------------- laws


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(2, 4), st.floats(0.1, 20), st.integers(0, 2**20))
def test_a_constant_added_to_a_querys_scores_changes_nothing(n, heads, gain, seed):
    q, k, scale, d = case(2, heads, n, 4, gain=gain, seed=seed)
    shift = torch.randn(2, heads, n, 1, generator=torch.Generator().manual_seed(seed)) * 10
    a = stats_from_scores(q, k, scale=scale, distances=d)
    b = stats_from_scores(q, k, scale=scale, bias=shift, distances=d)
    for field in FIELDS:
        torch.testing.assert_close(getattr(a, field), getattr(b, field), rtol=2e-5, atol=2e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.floats(0.1, 50), st.integers(0, 2**20))
def test_entropies_are_ordered(n, gain, seed):
    q, k, scale, d = case(2, 2, n, 4, gain=gain, seed=seed)
    stats = stats_from_scores(q, k, scale=scale, distances=d)
    assert (stats.conditional_entropy >= 0).all()
    assert (stats.conditional_entropy <= stats.key_entropy + 1e-6).all()
    assert (stats.key_entropy <= math.log(n) + 1e-6).all()
    assert (stats.distance <= d.max()).all() and (stats.distance >= d.min() * (1 - 1e-6)).all()


def test_stats_from_stored_float16_probabilities_stay_within_the_measured_error():
    q, k, scale, d = case(2, 3, 196, 16, gain=2)
    p = probabilities(q, k, scale=scale)
    exact = stats_from_probabilities(p, d)
    for dtype, px, nats in ((torch.float16, 5e-3, 2e-5), (torch.bfloat16, 2e-2, 2e-4)):
        stored = stats_from_probabilities(p.to(dtype), d)
        assert (stored.distance - exact.distance).abs().max() < px
        assert (stored.information - exact.information).abs().max() < nats


# ---------------------------------------------------------------------- probabilities


def test_probabilities_match_numpy():
    q, k, scale, _ = case(2, 3, 9, 4, gain=5)
    bias = torch.randn(1, 3, 9, 9)
    p = probabilities(q.half(), k.half(), scale=scale, bias=bias)
    scores = (
        scale * q.half().double().numpy() @ k.half().double().numpy().swapaxes(-1, -2) + bias.double().numpy()
    )
    expected = np.array(softmax_rows(scores)).reshape(p.shape)
    assert p.dtype == torch.float32
    np.testing.assert_allclose(p, expected, atol=1e-6)


def test_renormalise():
    p = torch.tensor([[0.2, 0.2], [0.0, 0.0], [3e-30, 1e-30]])
    expected = torch.tensor([[0.5, 0.5], [0.0, 0.0], [0.75, 0.25]])
    torch.testing.assert_close(renormalise(p), expected)
    half = renormalise(torch.tensor([[0.25, 0.5]], dtype=torch.float16))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, torch.tensor([[1 / 3, 2 / 3]]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_agrees_with_cpu():
    q, k, scale, d = case(4, 12, 196, 64, gain=3)
    on_gpu = stats_from_scores(*(t.cuda() for t in (q, k)), scale=scale, distances=d.cuda())
    close(pick(on_gpu, ...), [getattr(stats_from_scores(q, k, scale=scale, distances=d), f) for f in FIELDS])
