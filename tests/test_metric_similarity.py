"""Cosine similarities of heads, depths and tokens against all pairs written out in float64."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import probekit
from probekit.errors import DoesNotApply, UsageError
from probekit.metrics.similarity_depths import SimilarityDepths
from probekit.metrics.similarity_heads import SimilarityHeads
from probekit.metrics.similarity_tokens import SimilarityTokens
from probekit.testing import TinyViT, check_metric, make_layer

CLOSE = {"rtol": 1e-6, "atol": 1e-8}


def cosine(a, b):
    """Of two vectors; 0 where one has no direction. float64."""
    lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / lengths if lengths > 1e-24 else 0.0


def all_pairs(vectors):
    """Mean cosine over ordered pairs of different rows, by the whole matrix. float64."""
    vectors = np.asarray(vectors, dtype=np.float64)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.where(norms < 1e-12, np.inf, norms)
    matrix = unit @ unit.T
    n = len(vectors)
    return matrix[~np.eye(n, dtype=bool)].mean()


def random(*shape, seed=0, offset=0.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + offset


def values(metric, layer):
    found = metric.measure(layer)
    assert all(v.dtype == torch.float32 and v.shape == (layer.batch,) for v in found.values())
    return found[metric.name].double().numpy(), found["zero_tokens"].numpy()


# ---------------------------------------------------------------------- tokens


@pytest.mark.parametrize("offset", [0.0, 0.05, 1.0, 10.0])
@pytest.mark.parametrize(("grid", "prefix"), [((14, 14), 1), ((3, 5), 0), ((1, 2), 5), ((20, 31), 0)])
def test_tokens_are_all_pairs(offset, grid, prefix):
    n = grid[0] * grid[1]
    tokens = random(2, n + prefix, 48, offset=offset) * torch.rand(1, n + prefix, 1).exp()
    got, zero = values(SimilarityTokens(), make_layer(tokens=tokens, grid=grid, prefix=prefix))
    # A vector's own share in |sum|^2 is 1 up to its norm's rounding in float32, and what is left over of n
    # such shares is divided by n (n - 1).
    room = {"rtol": 1e-6, "atol": 3e-7 / (n - 1)}
    np.testing.assert_allclose(got, [all_pairs(image[prefix:]) for image in tokens], **room)
    assert (zero == 0).all()


def test_pairs_one_by_one():
    tokens = random(1, 6, 5)
    pairs = list(itertools.permutations(tokens[0].tolist(), 2))
    expected = sum(cosine(a, b) for a, b in pairs) / len(pairs)
    assert values(SimilarityTokens(), make_layer(tokens=tokens, grid=(2, 3)))[0].item() == pytest.approx(
        expected, rel=1e-6
    )


def test_many_tokens_with_hardly_anything_in_common():
    """|sum|^2 is then about N, of which N is taken off."""
    tokens = random(1, 4096, 64, seed=4)
    tokens -= tokens.mean(1, keepdim=True) * 0.9
    expected = all_pairs(tokens[0])
    assert abs(expected) < 3e-4
    got, _ = values(SimilarityTokens(), make_layer(tokens=tokens, grid=(64, 64)))
    assert got.item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e6])
def test_closed_forms_of_tokens(size):
    same = random(1, 1, 32).expand(2, 16, 32) * torch.arange(1.0, 17).view(1, 16, 1)
    apart = torch.eye(16).expand(2, 16, 16)
    opposite = random(1, 1, 32) * torch.where(torch.arange(16) % 2 > 0, 1.0, -1.0).view(1, 16, 1)
    for tokens, expected in ((same, 1), (apart, 0), (opposite, -1 / 15)):
        got, zero = values(SimilarityTokens(), make_layer(tokens=tokens * size, grid=(4, 4)))
        np.testing.assert_allclose(got, expected, atol=1e-7)
        assert (zero == 0).all()


def test_tokens_without_direction():
    tokens = random(2, 16, 8, offset=1)
    tokens[1, [0, 7]] = 0
    tokens[1, 9] = 1e-14
    got, zero = values(SimilarityTokens(), make_layer(tokens=tokens, grid=(4, 4)))
    assert zero.tolist() == [0, 3]
    np.testing.assert_allclose(got, [all_pairs(image) for image in tokens], **CLOSE)
    got, zero = values(SimilarityTokens(), make_layer(tokens=torch.zeros(1, 16, 8), grid=(4, 4)))
    assert (got.item(), zero.item()) == (0, 16)


def test_one_token_does_not_apply():
    with pytest.raises(DoesNotApply, match="one token"):
        SimilarityTokens().measure(make_layer(tokens=random(2, 1, 8), grid=(1, 1)))


@pytest.mark.parametrize(("n", "channels"), [((14, 14), 96), ((7, 7), 33), ((1, 129), 48)])
def test_bits_depend_neither_on_the_batch_nor_on_threads(n, channels):
    tokens = random(4, n[0] * n[1], channels)
    q, k, v = random(3, 4, 3, n[0] * n[1], 16).unbind()
    moved = tokens + random(*tokens.shape, seed=1)
    before = torch.get_num_threads()

    def measured(which):
        layer = make_layer(q=q[which], k=k[which], v=v[which], tokens=tokens[which], grid=n)
        layer = replace(layer, captured={**layer.captured, "tokens_mid": moved[which]})
        return [m.measure(layer)[m.name] for m in (SimilarityTokens(), SimilarityHeads(), SimilarityDepths())]

    try:
        torch.set_num_threads(1)
        whole = measured(slice(None))
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for i in range(4):
                for alone, together in zip(measured(slice(i, i + 1)), whole, strict=True):
                    assert torch.equal(alone, together[i : i + 1])
    finally:
        torch.set_num_threads(before)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(1, 12), st.floats(0, 5), st.integers(0, 2**20))
def test_laws_of_tokens(n, channels, offset, seed):
    tokens = random(2, n, channels, seed=seed, offset=offset)
    got, _ = values(SimilarityTokens(), make_layer(tokens=tokens, grid=(1, n)))
    assert (got >= -1 / (n - 1) - 1e-6).all() and (got <= 1 + 1e-6).all()
    g = torch.Generator().manual_seed(seed)
    moved = tokens[:, torch.randperm(n, generator=g)] * torch.rand(2, n, 1, generator=g).add(0.1)
    turn = torch.linalg.qr(torch.randn(channels, channels, generator=g)).Q
    again, _ = values(SimilarityTokens(), make_layer(tokens=moved @ turn, grid=(1, n)))
    np.testing.assert_allclose(again, got, rtol=1e-5, atol=2e-6)


# ---------------------------------------------------------------------- attention's output


def written_out_heads(outputs):
    """(B, H, N, d) -> (B,): cosines of all ordered pairs of heads, token by token. float64."""
    return [
        np.mean([all_pairs(image[:, n]) for n in range(image.shape[1])]) for image in outputs.double().numpy()
    ]


@pytest.mark.parametrize("heads", [2, 3, 16])
def test_heads_are_all_pairs(heads):
    q, k, v = random(3, 2, heads, 13, 8, offset=0.2).unbind()
    layer = make_layer(q=q, k=k, v=v, grid=(3, 4), prefix=1)
    outputs = ((8**-0.5 * q.double() @ k.double().mT).softmax(-1) @ v.double())[:, :, 1:]
    got, zero = values(SimilarityHeads(), layer)
    np.testing.assert_allclose(got, written_out_heads(outputs), rtol=2e-6, atol=1e-7)  # outputs are float32
    assert (zero == 0).all()
    exact = layer.head_outputs
    np.testing.assert_allclose(got, written_out_heads(exact), **CLOSE)
    side_by_side, _ = values(SimilarityTokens(of="attention"), layer)
    expected = [all_pairs(image.transpose(0, 1).flatten(1)) for image in exact]
    np.testing.assert_allclose(side_by_side, expected, **CLOSE)


def of_outputs(outputs, grid):
    """A layer whose heads' outputs are these (B, H, N, d)."""
    layer = make_layer(v=outputs, grid=grid)
    return replace(layer, captured={"heads": outputs})


def test_closed_forms_of_heads():
    same = random(2, 1, 6, 8).repeat(1, 3, 1, 1) * torch.tensor([1.0, 2.0, 0.5]).view(1, 3, 1, 1)
    apart = torch.eye(3).view(1, 3, 1, 3).expand(2, 3, 6, 3)
    opposite = random(2, 1, 6, 8) * torch.tensor([1.0, -1.0]).view(1, 2, 1, 1)
    for outputs, expected in ((same, 1), (apart, 0), (opposite, -1)):
        np.testing.assert_allclose(
            values(SimilarityHeads(), of_outputs(outputs, (2, 3)))[0], expected, atol=3e-7
        )


def test_heads_without_output():
    outputs = random(2, 3, 6, 8, offset=1)
    outputs[1, 2, 4] = outputs[1, 0, 4] = outputs[1, 1, 5] = 0
    got, zero = values(SimilarityHeads(), of_outputs(outputs, (2, 3)))
    assert zero.tolist() == [0, 2]
    np.testing.assert_allclose(got, written_out_heads(outputs), **CLOSE)


def test_one_head_does_not_apply():
    with pytest.raises(DoesNotApply, match="'layer' has one head"):
        SimilarityHeads().measure(of_outputs(random(2, 1, 6, 8), (2, 3)))


def test_windows_are_those_of_the_whole_map():
    """2 x 3 windows of 2 x 2 tokens: numbers are those of all tokens of the image, not of each window's."""
    windows = [
        [r * 6 + c for r in (top, top + 1) for c in (left, left + 1)] for top in (0, 2) for left in (0, 2, 4)
    ]
    q, k, v = random(3, 2 * 6, 3, 4, 8).unbind()
    layer = make_layer(q=q, k=k, v=v, tokens=random(2, 24, 12), grid=(4, 6), window=2)
    outputs = torch.zeros(2, 3, 24, 8)
    inside = ((8**-0.5 * q @ k.mT).softmax(-1) @ v).unflatten(0, (2, 6))
    for w, members in enumerate(windows):
        outputs[:, :, members] = inside[:, w]
    np.testing.assert_allclose(
        values(SimilarityHeads(), layer)[0], written_out_heads(outputs), rtol=1e-5, atol=1e-7
    )
    expected = [all_pairs(image.transpose(0, 1).flatten(1)) for image in outputs]
    np.testing.assert_allclose(values(SimilarityTokens(of="attention"), layer)[0], expected, rtol=1e-5)
    np.testing.assert_allclose(
        values(SimilarityTokens(), layer)[0], [all_pairs(t) for t in layer.tokens], **CLOSE
    )


# ---------------------------------------------------------------------- depths


def between(before, after, grid=(3, 4), prefix=0):
    layer = make_layer(tokens=before, grid=grid, prefix=prefix)
    return replace(layer, captured={"tokens_in": before[:, prefix:], "tokens_mid": after[:, prefix:]})


@pytest.mark.parametrize("size", [0.01, 1.0, 30.0])
def test_depths_are_each_tokens_cosine(size):
    before, added = random(2, 14, 24), random(2, 14, 24, seed=1, offset=0.3) * size
    after = before + added
    layer = between(before, after, prefix=2)
    a, b = before[:, 2:].double().numpy(), after[:, 2:].double().numpy()
    for of, other in (("stream", b), ("branch", b - a)):
        expected = [
            np.mean([cosine(x, y) for x, y in zip(*pair, strict=True)]) for pair in zip(a, other, strict=True)
        ]
        got, zero = values(SimilarityDepths(of=of), layer)
        # what was added is a difference of float32 numbers: a small one has few digits
        np.testing.assert_allclose(
            got, expected, **(CLOSE if of == "stream" else {"rtol": 1e-5, "atol": 1e-7})
        )
        assert (zero == 0).all()


def test_closed_forms_of_depths():
    x = random(2, 12, 24)
    for after, stream, branch in ((x, 1, 0), (2 * x, 1, 1), (-x, -1, -1), (0 * x, 0, -1)):
        for of, expected in (("stream", stream), ("branch", branch)):
            got, zero = values(SimilarityDepths(of=of), between(x, after))
            np.testing.assert_allclose(got, expected, atol=3e-7)
            gone = (after - x if of == "branch" else after).abs().sum() == 0
            assert (zero == (12 if gone else 0)).all()


def test_depths_where_attention_changes_the_tokens():
    layer = between(random(2, 12, 24), random(2, 12, 24))
    layer = replace(layer, captured={**layer.captured, "tokens_mid": random(2, 12, 48)})
    with pytest.raises(DoesNotApply, match="changes the number or width"):
        SimilarityDepths().measure(layer)


# ---------------------------------------------------------------------- contract


@pytest.mark.parametrize(
    "metric",
    [
        SimilarityHeads(),
        SimilarityDepths(),
        SimilarityDepths(of="branch"),
        SimilarityTokens(),
        SimilarityTokens(of="attention"),
    ],
    ids=lambda m: f"{m.name} {m.options}",
)
def test_contract(metric):
    check_metric(metric)
    assert {"of", "open", "reading", "does_not_show"} <= set(metric.conventions)


def test_options():
    assert SimilarityTokens().needs == {"tokens"} and SimilarityTokens(of="attention").needs == {
        "head_outputs"
    }
    assert SimilarityDepths().conventions != SimilarityDepths(of="branch").conventions
    with pytest.raises(UsageError, match="'stream' or 'attention', not 'branch'"):
        SimilarityTokens(of="branch")
    with pytest.raises(UsageError, match="'stream' or 'branch', not 'attention'"):
        SimilarityDepths(of="attention")


def test_a_whole_model():
    images = random(3, 3, 32, 48)
    model, seen = TinyViT(prefix=3), []
    for block in model.blocks:
        block.norm1.register_forward_hook(lambda _, given, out: seen.append({"in": given[0]}))
        block.norm2.register_forward_hook(lambda _, given, out: seen[-1].update(mid=given[0]))
        block.register_forward_hook(lambda _, given, out: seen[-1].update(out=out))
        block.attn.proj.register_forward_hook(lambda _, given, out: seen[-1].update(heads=given[0]))
    with torch.no_grad():
        model(images)
    seen = [{name: t[:, 3:].double() for name, t in layer.items()} for layer in seen]
    names = ["similarity_heads", "similarity_depths", "similarity_tokens"]
    results = probekit.probe(TinyViT(prefix=3), images, metrics=names)
    tolerance = {"rtol": 1e-5, "atol": 1e-6}  # the model's own rounding
    sites = [seen[0]["in"], *(layer[site] for layer in seen for site in ("mid", "out"))]
    expected = [np.mean([all_pairs(image) for image in site]) for site in sites]
    np.testing.assert_allclose(results["similarity_tokens"]["similarity_tokens"], expected, **tolerance)
    heads = [
        np.mean(written_out_heads(layer["heads"].unflatten(2, (3, 8)).transpose(1, 2))) for layer in seen
    ]
    np.testing.assert_allclose(results["similarity_heads"]["similarity_heads"], heads, **tolerance)
    depths = [torch.cosine_similarity(layer["in"], layer["mid"], dim=-1).mean().item() for layer in seen]
    np.testing.assert_allclose(results["similarity_depths"]["similarity_depths"], depths, **tolerance)
