"""Losses and momentum against formulas written out in float64, and what each network may see."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from probekit_train.backbone import Description, embedded, through_blocks
from probekit_train.local_attention import local_mask, restrict
from probekit_train.objectives import Batch, spread
from probekit_train.objectives.hybrid import Hybrid
from probekit_train.objectives.mae import (
    Autoencoder,
    masked_square,
    patches_of,
)
from probekit_train.objectives.moco import MomentumContrast, info_nce, momentum_at
from probekit_train.objectives.simmim import MaskedPixels, masked_l1, unit_mask
from probekit_train.pretraining import pretraining
from probekit_train.reading import make

from probekit.datasets import shapetex

ARGS = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
TINY = Description(model="vit", model_args=ARGS, img_size=16)
COMMON = {"epochs": 1, "batch_size": 8, "lr": 1e-3, "img_size": 16, "model_args": ARGS}
HEADS = {"projector": [24, 16], "predictor": [24, 16]}


def recipe(objective: str, views: int = 1, **fields):
    return make({"objective": objective, "views": [{}] * views, **COMMON, **fields})


def images(count: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# --- MoCo v3


def info_nce_by_hand(q: np.ndarray, k: np.ndarray, temperature: float) -> float:
    q = q / np.sqrt((q**2).sum(1, keepdims=True))
    k = k / np.sqrt((k**2).sum(1, keepdims=True))
    total = 0.0
    for i in range(len(q)):
        scores = [float(q[i] @ k[j]) / temperature for j in range(len(k))]
        top = max(scores)
        total -= scores[i] - top - math.log(sum(math.exp(s - top) for s in scores))
    return total / len(q)


def test_info_nce_is_the_formula():
    random = np.random.default_rng(0)
    q, k = random.normal(size=(7, 5)), random.normal(size=(7, 5))
    found = info_nce(torch.tensor(q), torch.tensor(k), 0.2)
    # computed in float32, whose rounding is 6e-8
    assert float(found) == pytest.approx(info_nce_by_hand(q, k, 0.2), rel=1e-6)


def test_info_nce_of_equal_keys_is_chance_and_of_its_own_keys_alone_nothing():
    assert float(info_nce(torch.eye(4), torch.ones(4, 4), 0.2)) == pytest.approx(math.log(4), rel=1e-6)
    assert float(info_nce(torch.eye(4), torch.eye(4), 0.01)) < 1e-6


@pytest.mark.parametrize(
    ("pool", "output"),
    [("token", lambda tokens: tokens[:, 0]), ("avg", lambda tokens: tokens[:, 1:].mean(1))],
)
def test_mocos_loss_is_symmetric_and_scaled_by_twice_the_temperature(pool, output):
    moco = pretraining(recipe("moco", 2, temperature=0.5, pool=pool, **HEADS), shapetex.load(None)).objective
    first, second = images(seed=1), images(seed=2)
    found = moco.losses(Batch([first, second]))
    with torch.no_grad():
        # the network's own tokens, not a helper of the pack's
        q, k = [], []
        for view in (first, second):
            features = output(moco.backbone.forward_features(view))
            q.append(moco.predictor(moco.projector(features)).double().numpy())
            features = output(moco.momentum["backbone"].forward_features(view))
            k.append(moco.momentum["projector"](features).double().numpy())
    expected = info_nce_by_hand(q[0], k[1], 0.5) + info_nce_by_hand(q[1], k[0], 0.5)
    assert found["loss"].item() == pytest.approx(2 * 0.5 * expected, rel=2e-6)
    assert float(found["info_nce"]) == pytest.approx(expected / 2, rel=2e-6)


def test_the_momentum_encoder_moves_by_the_closed_form_and_gets_no_gradient():
    moco = MomentumContrast(TINY.build(), recipe("moco", 2, **HEADS))
    start = moco.momentum["backbone"].blocks[0].mlp.fc1.weight.clone().double()
    with torch.no_grad():
        moco.backbone.blocks[0].mlp.fc1.weight.add_(1.0)
    for _ in range(10):
        moco.move(0.9)
    moved = moco.momentum["backbone"].blocks[0].mlp.fc1.weight.double()
    expected = 0.9**10 * start + (1 - 0.9**10) * moco.backbone.blocks[0].mlp.fc1.weight.double()
    torch.testing.assert_close(moved, expected, rtol=1e-6, atol=1e-6)
    moco.losses(Batch([images(), images(seed=1)]))["loss"].backward()
    assert all(p.grad is None for p in moco.momentum.parameters())
    assert all(p.grad is None for p in moco.backbone.patch_embed.parameters())
    assert all(p.grad is not None for p in moco.backbone.blocks.parameters())


def test_momentum_goes_along_a_cosine_to_one_and_zero_is_simclr():
    assert momentum_at(0.0, 0.99, 1.0) == pytest.approx(0.99)
    assert momentum_at(0.5, 0.99, 1.0) == pytest.approx(0.995)
    assert momentum_at(1.0, 0.99, 1.0) == 1.0
    simclr = MomentumContrast(TINY.build(), recipe("moco", 2, momentum=0, **HEADS))
    with torch.no_grad():
        simclr.projector[0].weight.add_(1.0)
    simclr.begin_step(0.7)
    torch.testing.assert_close(simclr.momentum["projector"][0].weight, simclr.projector[0].weight)


def test_tokens_are_left_out_until_their_time_is_over():
    network = TINY.build(patch_drop_rate=0.5)
    moco = MomentumContrast(network, recipe("moco", 2, drop_tokens=0.5, drop_until=0.7, **HEADS))
    lengths = []
    network.blocks[0].register_forward_hook(lambda module, inputs, output: lengths.append(output.shape[1]))
    for progress in (0.0, 0.69, 0.7, 1.0):
        moco.begin_step(progress)
        moco.losses(Batch([images(), images(seed=1)]))
    assert lengths == [9, 9, 9, 9, 17, 17, 17, 17]  # two views each; a class token and 16 patches


# --- SimMIM


def test_simmims_loss_is_the_published_formula():
    random = np.random.default_rng(0)
    x, guess = random.normal(size=(2, 3, 8, 8)), random.normal(size=(2, 3, 8, 8))
    mask = (random.random((2, 8, 8)) < 0.6).astype(float)
    total = sum(
        abs(x[b, c, i, j] - guess[b, c, i, j]) * mask[b, i, j] for b, c, i, j in np.ndindex(2, 3, 8, 8)
    )
    expected = total / (mask.sum() + 1e-5) / 3
    found = masked_l1(*(torch.tensor(value, dtype=torch.float32) for value in (x, guess, mask)))
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_thirty_of_forty_nine_squares_are_masked_as_published():
    mask = unit_mask(5, (14, 14), 2, 0.6, torch.device("cpu"))
    assert mask.shape == (5, 14, 14)
    assert (mask.sum(dim=(1, 2)) == 120).all()  # METRICS.md section 11: 30 squares, 120 of 196 tokens
    squares = mask.view(5, 7, 2, 7, 2)
    assert (squares == squares[:, :, :1, :, :1]).all()
    assert not torch.equal(mask[0], mask[1])


def test_simmim_sees_nothing_of_masked_patches_and_something_of_the_others():
    simmim = MaskedPixels(TINY.build(), recipe("simmim", mask_unit=8)).eval()
    mask = torch.zeros(1, 4, 4)
    mask[:, :2, :2] = 1.0
    one = images(1)
    hidden, seen = one.clone(), one.clone()
    hidden[..., :8, :8] += 1.0
    seen[..., 8:, 8:] += 1.0
    with torch.no_grad():
        (_, a), (_, b), (_, c) = (simmim.reconstruct(x, mask) for x in (one, hidden, seen))
    assert a.shape == one.shape
    torch.testing.assert_close(a, b)
    assert not torch.allclose(a, c)


# --- MAE


def test_maes_target_and_loss_are_the_published_formulas():
    x = images(2).double().numpy()
    guess = np.random.default_rng(1).normal(size=(2, 16, 48))
    hidden = (np.random.default_rng(2).random((2, 16)) < 0.75).astype(float)
    total = 0.0
    for b in range(2):
        for n in range(16):
            row, column = divmod(n, 4)
            patch = x[b, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            pixels = patch.transpose(1, 2, 0).reshape(-1)
            pixels = (pixels - pixels.mean()) / np.sqrt(pixels.var(ddof=1) + 1e-6)
            total += hidden[b, n] * ((guess[b, n] - pixels) ** 2).mean()
    target = patches_of(images(2), (4, 4), normalise=True)
    found = masked_square(target, torch.tensor(guess).float(), torch.tensor(hidden).float())
    assert float(found) == pytest.approx(total / hidden.sum(), rel=1e-6)


def test_guessing_each_patchs_mean_loses_one_of_normalised_targets():
    target = patches_of(images(4), (4, 4), normalise=True)
    lost = masked_square(target, torch.zeros_like(target), torch.ones(4, 16))
    assert float(lost) == pytest.approx(47 / 48, rel=1e-5)  # the variance is unbiased, over 48 values


def test_the_autoencoder_encodes_visible_patches_alone_in_any_order():
    network = Autoencoder(TINY.build(), 16, 1, 2).eval()
    kept = torch.tensor([[1, 4, 7, 12]])
    one = images(1)
    hidden = one.clone()
    hidden[..., :4, :4] += 1.0  # patch 0
    with torch.no_grad():
        a = network.decode(network.encode(one, kept), kept)
        b = network.decode(network.encode(hidden, kept), kept)
        c = network.decode(network.encode(one, kept.flip(1)), kept.flip(1))
        everything = torch.arange(16)[None]
        d = network.decode(network.encode(one, everything), everything)
        whole = network(one)
    assert a.shape == (1, 16, 48)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(d, whole, rtol=1e-4, atol=1e-6)


# --- hybrid


def test_hybrid_weighs_both_losses_over_one_encoder():
    hybrid = Hybrid(TINY.build(), recipe("hybrid", 3, **{"lambda": 0.2}, mask_unit=8, **HEADS))
    found = hybrid.losses(Batch([images(seed=s) for s in range(3)]))
    expected = 0.8 * float(found["mim"]) + 0.2 * float(found["contrast"])
    assert found["loss"].item() == pytest.approx(expected, rel=1e-6)
    assert hybrid.contrast.backbone is hybrid.masking.backbone
    names = [name for name, _ in hybrid.named_parameters()]
    assert sum(name.endswith("blocks.0.attn.qkv.weight") for name in names) == 2  # it and its average


# --- features, local attention


def test_spread_is_nothing_for_one_direction_and_one_for_all():
    assert float(spread(torch.ones(8, 16))) == pytest.approx(0.0, abs=1e-6)
    even = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    assert float(spread(even)) == pytest.approx(1.0, abs=0.02)


@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    side=st.sampled_from([1, 3, 5]),
    prefix=st.integers(0, 2),
)
def test_a_local_mask_opens_the_chebyshev_ball_and_the_prefix(rows, columns, side, prefix):
    mask = local_mask((rows, columns), side, prefix)
    for q in range(prefix + rows * columns):
        for k in range(prefix + rows * columns):
            (a, b), (c, d) = divmod(q - prefix, columns), divmod(k - prefix, columns)
            near = max(abs(a - c), abs(b - d)) <= (side - 1) / 2
            assert (mask[q, k] == 0) == (q < prefix or k < prefix or near)


@pytest.mark.parametrize("fused", [True, False])
def test_local_attention_keeps_far_patches_apart(fused):
    network = Description(
        model="vit", model_args={**ARGS, "class_token": False}, img_size=16, pool="avg"
    ).build()
    restrict(network, 3)
    for block in network.blocks:
        block.attn.fused_attn = fused
    one = images(1)
    far = one.clone()
    far[..., 12:, 12:] += 1.0  # patch 15
    with torch.no_grad():
        difference = (network.forward_features(one) - network.forward_features(far)).abs().amax(dim=2)[0]
    changed = (difference > 1e-6).view(4, 4)
    assert changed[3, 3] and changed[1, 1]  # two blocks reach two patches
    assert not changed[0].any() and not changed[:, 0].any()


def test_local_attention_holds_among_the_patches_an_autoencoder_sees():
    network = Autoencoder(TINY.build(), 16, 1, 2).eval()
    restrict(network.encoder, 3)
    kept = torch.tensor([[15, 0, 5]])
    with torch.no_grad():
        found = network.encode(images(1), kept)
        vit = network.encoder
        tokens = vit._pos_embed(embedded(vit, images(1)))[:, [0, 16, 1, 6]]
        mask = torch.zeros(4, 4)
        mask[1, 2:] = mask[2:, 1] = float("-inf")  # 15 is out of reach of 0 and 5; these are neighbours
        expected = through_blocks(vit, tokens, mask)
    torch.testing.assert_close(found, expected)


def test_positions_are_fixed_sines_where_asked():
    network = Description(model="vit", model_args=ARGS, img_size=16, positions="sincos").build()
    assert not network.pos_embed.requires_grad
    angle = 1 / 10000 ** (3 / 8)  # row 1, fourth of the eight frequencies
    assert float(network.pos_embed[0, 1 + 4, 3]) == pytest.approx(math.sin(angle), rel=1e-6)
    assert float(network.blocks[0].mlp.fc1.weight.std()) == pytest.approx(0.02, rel=0.05)
