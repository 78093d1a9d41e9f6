"""Prefix mass: the full softmax in float64, every way a layer can have its attention, and where there is none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import probekit
from probekit.anatomy import WindowGroup
from probekit.errors import DoesNotApply
from probekit.layer import Layer, Scores
from probekit.metrics.prefix_mass import PrefixMass
from probekit.testing import TinyViT, check_metric, make_layer

GRID, N = (4, 5), 20


def qk(prefix, batch=2, heads=3, gain=2.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, batch, heads, N + prefix, 8, generator=g).mul(gain).unbind()
    return q, k


def softmax(scores):
    e = np.exp(scores - np.max(np.where(np.isfinite(scores), scores, -1e30), -1, keepdims=True))
    total = e.sum(-1, keepdims=True)
    return e / np.where(total == 0, 1, total)


def maps_of(q, k, scale=8**-0.5, bias=0.0):
    return softmax(scale * q.double().numpy() @ k.double().numpy().swapaxes(-1, -2) + np.asarray(bias))


def reference(maps, prefix):
    """The definition, token by token: (B, H) float64, prefix first."""
    found = np.zeros(maps.shape[:2])
    patches = range(prefix, maps.shape[-2])
    for q in patches:
        for p in range(prefix):
            found += maps[:, :, q, p] / len(patches)
    return found


def mass(layer):
    return PrefixMass().measure(layer)["prefix_mass"]


@pytest.mark.parametrize("prefix", [1, 2, 5])
def test_from_queries_and_keys_and_from_maps(prefix):
    q, k = qk(prefix)
    expected = reference(maps_of(q, k), prefix)
    layer = make_layer(q=q, k=k, grid=GRID, prefix=prefix)
    np.testing.assert_allclose(mass(layer), expected, rtol=1e-6)
    given_maps = torch.from_numpy(maps_of(q, k)).float()
    np.testing.assert_allclose(mass(make_layer(given_maps, grid=GRID, prefix=prefix)), expected, rtol=1e-6)
    assert PrefixMass().describe(layer) == {"uniform": prefix / (prefix + N)}


@pytest.mark.parametrize("shift", [-25.0, 12.0, 40.0])
def test_sinks_and_prefixes_that_nobody_sees(shift):
    """Added to the prefix keys' scores: from 1e-12 to all but 1e-19 of the attention."""
    q, k = qk(2)
    bias = torch.zeros(1, 1, 1, N + 2)
    bias[..., :2] = shift
    layer = make_layer(q=q, k=k, grid=GRID, prefix=2)
    layer = replace(layer, captured={"scores": Scores(q, k, 0.3, bias)})
    np.testing.assert_allclose(mass(layer), reference(maps_of(q, k, 0.3, bias), 2), rtol=1e-5)


@pytest.mark.parametrize(
    "form", [(2, 3, N + 2, N + 2), (1, 3, N + 2, N + 2), (2, 1, 1, N + 2), (1, 1, 1, N + 2)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_biases_and_masks(form, masked):
    q, k = qk(2)
    bias = torch.randn(form, generator=torch.Generator().manual_seed(3)) * 2
    if masked:
        bias[torch.rand(form, generator=torch.Generator().manual_seed(4)) < 0.5] = -torch.inf
        if form[2] > 1:  # two queries that see nothing at all
            bias[..., 5, :] = bias[..., -1, :] = -torch.inf
    layer = make_layer(q=q, k=k, grid=GRID, prefix=2)
    layer = replace(layer, captured={"scores": Scores(q, k, 0.3, bias)})
    np.testing.assert_allclose(mass(layer), reference(maps_of(q, k, 0.3, bias), 2), rtol=1e-5, atol=1e-12)
    # and what an N x N softmax of the same scores gives
    old = layer.attention_full[:, :, 2:, :2].sum(-1).mean(-1)
    np.testing.assert_allclose(mass(layer), old, rtol=1e-5, atol=1e-9)


def places(layer: Layer, queries: list[int], keys: list[int]) -> Layer:
    """The layer with its patch tokens at other places of the sequence."""
    group = layer.info.groups[0]
    group = WindowGroup(
        group.windows,
        np.array([queries]),
        np.array([keys]),
        group.tokens,
        group.key_positions[:, : len(keys)],
    )
    return replace(layer, info=replace(layer.info, groups=(group,)))


@pytest.mark.parametrize("hand_written", [False, True])
def test_prefix_tokens_that_stand_anywhere(hand_written):
    """CLS last and a register in the middle, patches in another order than the model's."""
    q, k = qk(2)
    others = [7, N + 1]
    patches = [i for i in range(N + 2) if i not in others][::-1]
    maps = maps_of(q, k)
    expected = maps[:, :, patches][..., others].sum(-1).mean(-1)
    given_scores = {"attention": torch.from_numpy(maps).float()} if hand_written else {"q": q, "k": k}
    layer = places(make_layer(**given_scores, grid=GRID, prefix=2), patches, patches)
    np.testing.assert_allclose(mass(layer), expected, rtol=1e-6)


def test_fewer_keys_than_queries():
    """Pooled keys, with a class token in front of both."""
    q, _ = qk(1)
    _, k = qk(1, seed=5)
    k = k[:, :, :7]
    layer = places(make_layer(q=q, k=q, grid=GRID, prefix=1), list(range(1, N + 1)), list(range(1, 7)))
    layer = replace(layer, captured={"scores": Scores(q, k, 0.3)})
    np.testing.assert_allclose(mass(layer), reference(maps_of(q, k, 0.3), 1), rtol=1e-6)
    assert PrefixMass().describe(layer)["uniform"] == pytest.approx(1 / 7)


def test_closed_forms():
    n = N + 3
    uniform = make_layer(torch.full((1, 2, n, n), 1 / n), grid=GRID, prefix=3)
    assert mass(uniform).tolist() == [[pytest.approx(3 / n)] * 2]
    own = make_layer(torch.eye(n).expand(1, 2, n, n), grid=GRID, prefix=3)
    assert (mass(own) == 0).all()
    sink = torch.zeros(1, 2, n, n)
    sink[..., 1] = 1
    assert (mass(make_layer(sink, grid=GRID, prefix=3)) == 1).all()


def test_no_prefix_does_not_apply():
    for layer in (
        make_layer(grid=GRID),
        make_layer(grid=(4, 4), window=2),
        make_layer(grid=(4, 4), window=2).windows()[0],
    ):
        for use in (PrefixMass().measure, PrefixMass().describe):
            with pytest.raises(DoesNotApply, match="'layer' has no prefix tokens"):
                use(layer)
        assert (layer.prefix_mass == 0).all() and layer.prefix_mass.shape == (layer.batch, 3)


@pytest.mark.parametrize("change", [{"windows": 2}, {"masked": True}, {"padded": 3}])
def test_prefixes_in_windows_or_beside_padding_do_not_apply(change):
    layer = make_layer(grid=GRID, prefix=1)
    layer = replace(layer, info=replace(layer.info, **change))
    with pytest.raises(DoesNotApply, match="stand in windows or beside padding"):
        PrefixMass().measure(layer)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.floats(0.1, 12), st.integers(0, 2**20))
def test_a_share(prefix, gain, seed):
    q, k = qk(prefix, gain=gain, seed=seed)
    layer = make_layer(q=q, k=k, grid=GRID, prefix=prefix)
    got = mass(layer)
    assert ((got >= 0) & (got <= 1)).all()
    rest = layer.attention_full[:, :, prefix:, prefix:].sum(-1).mean(-1)
    torch.testing.assert_close(got + rest, torch.ones_like(got), rtol=0, atol=2e-6)


def test_contract_and_a_whole_model():
    check_metric(PrefixMass)
    images = torch.randn(3, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    maps = []

    def attend(q, k, v):
        maps.append(maps_of(q, k, 1.0))
        return (q @ k.mT).softmax(-1) @ v

    with torch.no_grad():
        TinyViT(attend, prefix=4)(images)
    expected = [reference(m, 4).mean(0) for m in maps]
    for model in (TinyViT(prefix=4), TinyViT(lambda q, k, v: (q @ k.mT).softmax(-1) @ v, prefix=4)):
        found = probekit.probe(model, images, metrics=["prefix_mass"])["prefix_mass"]
        np.testing.assert_allclose(found["prefix_mass"], expected, rtol=1e-5)  # the model's own rounding
        np.testing.assert_allclose(found["uniform"], 4 / 28, rtol=1e-6)
