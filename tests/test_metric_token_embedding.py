"""t-SNE of tokens and the purity of their neighbourhoods: against loops, clusters far apart, and chance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probekit.errors import DoesNotApply, UsageError
from probekit.metric import Row, Traces
from probekit.metrics import token_embedding
from probekit.metrics.token_embedding import TokenEmbedding, nearest
from probekit.testing import make_layer


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def row(label, depth, site, part="encoder"):
    return Row(label, depth, site, part, 0, 2, (2, 3), (8.0, 8.0))


def traces(tokens, labels, seed=0, **more):
    values = {"tokens": np.asarray(tokens, dtype=np.float32)[:, None]}
    ids = [f"{i}.png" for i in range(len(tokens))]
    return Traces(values, [row("b2.out", 3.0, "out")], ids, labels, seed=seed, **more)


def neighbours(points, k, apart=None):
    """Sets of the k nearest others of each point, by sorting all distances."""
    found = []
    for i, p in enumerate(points):
        others = [j for j in range(len(points)) if (j != i if apart is None else apart[j] != apart[i])]
        found.append(set(sorted(others, key=lambda j: float(((points[j] - p) ** 2).sum()))[:k]))
    return found


@pytest.mark.parametrize("pairs", [2**22, 64])
def test_nearest_agrees_with_sorting(pairs, monkeypatch):
    monkeypatch.setattr(token_embedding, "_PAIRS", pairs)
    points, groups = normal(40, 5) + 100, np.repeat(np.arange(8), 5)
    assert [set(found) for found in nearest(points, 10)] == neighbours(points, 10)
    assert [set(found) for found in nearest(points, 10, apart=groups)] == neighbours(points, 10, groups)
    assert nearest(points[:4], 10).shape == (4, 3)


def test_purities_agree_with_counting():
    tokens, labels = normal(6, 7, 4), [0, 1, 2, 0, 1, 2]
    result = TokenEmbedding().summarize(traces(tokens, labels, classes=["a", "b", "c"]))
    flat = tokens.astype(np.float32).astype(np.float64).reshape(-1, 4)
    image = np.repeat(np.arange(6), 7)
    label = np.repeat(labels, 7)
    near, across = neighbours(flat, 10), neighbours(flat, 10, image)

    def purity(sets, of):
        return np.mean([np.mean([of[j] == of[i] for j in found]) for i, found in enumerate(sets)])

    assert result["token_embedding"].item() == pytest.approx(purity(near, label), rel=1e-12)
    assert result["image_purity"].item() == pytest.approx(purity(near, image), rel=1e-12)
    assert result["class_purity_across"].item() == pytest.approx(purity(across, label), rel=1e-12)
    assert result["chance"].item() == pytest.approx(13 / 41)
    assert result["image_by_chance"].item() == pytest.approx(6 / 41)
    assert result["across_by_chance"].item() == pytest.approx(7 / 35)
    assert result["token_image"].values.tolist() == [f"{i}.png" for i in image]
    assert result["token_class"].values.tolist() == ["abc"[i] for i in label]
    assert result["coordinates"].dims == ("layer", "token", "axis2")
    assert result["coordinates"].shape == (1, 42, 2) and np.isfinite(result["coordinates"]).all()
    np.testing.assert_array_equal(result["token_embedding_curve"], result["token_embedding"])


def test_classes_apart_are_pure_and_images_not():
    """Each class a cloud of its own, its images alike in distribution."""
    labels = [0] * 4 + [1] * 4
    tokens = normal(8, 20, 3) + 100 * np.array(labels)[:, None, None]
    result = TokenEmbedding().summarize(traces(tokens, labels))
    assert result["token_embedding"].item() == result["class_purity_across"].item() == 1
    assert 0.15 < result["image_purity"].item() < 0.35  # one image in four
    points, label = result["coordinates"].values[0], np.repeat(labels, 20)
    first, second = points[label == 0], points[label == 1]
    assert np.linalg.norm(first.mean(0) - second.mean(0)) > 2 * max(first.std(), second.std())


def test_images_apart_hide_their_class_unless_searched_across():
    tokens = normal(6, 15, 3) + 50 * np.arange(6)[:, None, None]
    result = TokenEmbedding().summarize(traces(tokens, [0, 1, 0, 1, 0, 1]))
    assert result["image_purity"].item() == result["token_embedding"].item() == 1
    assert result["class_purity_across"].item() < 0.2  # neighbours along the line are of the other class


def test_no_structure_is_at_chance():
    tokens, labels = normal(12, 40, 8), [0, 1, 2] * 4
    result = TokenEmbedding().summarize(traces(tokens, labels))
    for name, chance in (
        ("token_embedding", "chance"),
        ("image_purity", "image_by_chance"),
        ("class_purity_across", "across_by_chance"),
    ):
        assert result[name].item() == pytest.approx(result[chance].item(), abs=0.03)


def test_the_seed_decides_the_picture():
    tokens, labels = normal(4, 10, 5), [0, 0, 1, 1]
    a, b, c = (
        TokenEmbedding().summarize(traces(tokens, labels, seed))["coordinates"].values for seed in (1, 1, 2)
    )
    assert (a == b).all() and not np.allclose(a, c)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 6), st.integers(2, 8), st.integers(0, 2**20))
def test_nearest_does_not_depend_on_place_and_scale(images, n, seed):
    points = normal(images * n, 4, seed=seed)
    a, b = nearest(points, 5), nearest(8 * points + 3, 5)
    assert [set(x) for x in a] == [set(x) for x in b]


def test_site():
    rows = [
        row("embed", 0.0, "embed"),
        *(row(f"b{i}.{s}", i + d, s) for i in range(2) for s, d in (("mid", 0.5), ("out", 1.0))),
        row("d.embed", 2.0, "embed", "decoder"),
        row("d0.out", 3.0, "out", "decoder"),
    ]
    assert [r.label for r in TokenEmbedding().rows(rows)] == ["b1.out"]
    assert [r.label for r in TokenEmbedding(layer=0).rows(rows)] == ["embed"]
    assert [r.label for r in TokenEmbedding(layer=1).rows(rows)] == ["b0.out"]
    assert [r.label for r in TokenEmbedding(layer=3).rows(rows)] == ["d0.out"]
    assert TokenEmbedding(layer=7).rows(rows) == [] == TokenEmbedding().rows([])


def test_options():
    labels = [i // 20 for i in range(100)]
    chosen = TokenEmbedding().sample(100, labels)
    assert len(chosen) == 18 and [labels[i] for i in chosen] == [0] * 6 + [2] * 6 + [4] * 6
    assert len(TokenEmbedding(images=8, classes=2).sample(100, labels)) == 8
    tokens = make_layer(tokens=torch.tensor(normal(2, 6, 4)), grid=(2, 3))
    assert TokenEmbedding().measure(tokens)["tokens"].shape == (2, 6, 4)
    assert TokenEmbedding().requires == {"labels"}
    with pytest.raises(UsageError, match="'tsne' or 'umap', not 'pca'"):
        TokenEmbedding(method="pca")
    with pytest.raises(UsageError, match="18 images of 1 classes"):
        TokenEmbedding(classes=1)
    with pytest.raises(DoesNotApply, match="single class"):
        TokenEmbedding().summarize(traces(normal(3, 5, 2), [1, 1, 1]))


def test_umap_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(token_embedding, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs the package 'umap-learn'") as error:
        TokenEmbedding(method="umap")
    assert "method=tsne" in error.value.hint
