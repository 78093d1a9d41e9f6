"""Attention pictures: every weight at its place, also in shifted windows; rollout against its recursion."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch

from probekit.errors import UsageError
from probekit.metric import Row, Traces
from probekit.metrics.attention_maps import AttentionMaps, rollout
from probekit.testing import make_layer
from probekit.watch import Visitor, Watcher


def softmax(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(-1)


def test_global_maps():
    full = softmax(2, 3, 26, 26)
    layer = make_layer(full, grid=(4, 6), prefix=2)
    found = AttentionMaps().measure(layer)
    patches = full[:, :, 2:, 2:]
    patches = patches / patches.sum(-1, keepdim=True)
    maps = found["attention_maps"]
    assert maps.shape == (2, 3, 3, 4, 6) and maps.dtype == torch.float32
    for query, (row, col) in enumerate([(2, 3), (0, 0), (1, 4)]):
        torch.testing.assert_close(maps[:, :, query], patches[:, :, row * 6 + col].unflatten(-1, (4, 6)))
    torch.testing.assert_close(found["attention_mean"], full.mean(1))
    assert AttentionMaps().places(4, 6) == [(2, 3), (0, 0), (1, 4)]
    assert AttentionMaps(row=0.99, col=0).places(4, 6)[2] == (3, 0)


def test_windows_have_holes():
    parts = softmax(2 * 4, 3, 4, 4)  # 4 x 4 tokens in windows of 2 x 2
    found = AttentionMaps().measure(make_layer(parts, grid=(4, 4), window=2))
    maps = found["attention_maps"]
    assert found["attention_mean"].shape == (2, 0, 0)
    expected = torch.full((2, 3, 3, 4, 4), torch.nan)
    windows = parts.unflatten(0, (2, 4))
    expected[:, :, 0, 2:, 2:] = windows[:, 3, :, 0].unflatten(-1, (2, 2))  # (2, 2): its window's first token
    expected[:, :, 1, :2, :2] = windows[:, 0, :, 0].unflatten(-1, (2, 2))
    expected[:, :, 2, :2, 2:] = windows[:, 1, :, 3].unflatten(-1, (2, 2))  # (1, 3): its window's last token
    torch.testing.assert_close(maps, expected, equal_nan=True)


def test_shifted_windows_are_where_the_image_is():
    """A Swin's two blocks: each map lies in the window, or the region of the shifted window, of its query."""
    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, depths=(2,), num_heads=(3,), embed_dim=48, num_classes=8
    ).eval()
    images, seen = torch.randn(2, 3, 56, 56), []

    def visit(layer):
        seen.append(AttentionMaps().measure(layer)["attention_maps"])

    metric = AttentionMaps()
    Watcher(model, images).run(images, [Visitor(frozenset(metric.needs), visit)])
    rows, cols = np.mgrid[:14, :14]
    # regions of a shift by 3: tokens 0-2, then 3-9, then 10-13, along each axis
    cuts = (lambda x: x // 7, lambda x: np.digitize(x, [3, 10]))
    for maps, cut in zip(seen, cuts, strict=True):
        assert maps.shape == (2, 3, 3, 14, 14)
        for query, (row, col) in enumerate(metric.places(14, 14)):
            inside = (cut(rows) == cut(np.array(row))) & (cut(cols) == cut(np.array(col)))
            there = ~maps[:, :, query].isnan().numpy()
            assert (there == inside).all()
        torch.testing.assert_close(maps.nansum((-2, -1)), torch.ones(2, 3, 3))


def test_rollout_is_its_recursion():
    maps = [softmax(2, 5, 5, seed=i).double().numpy() for i in range(3)]
    found = rollout(maps)
    for image in range(2):
        state = np.eye(5)
        for layer, one in enumerate(maps):
            state = (0.5 * one[image] + 0.5 * np.eye(5)) @ state
            np.testing.assert_allclose(
                found[layer][image], state, rtol=1e-6
            )  # float32 rows sum to 1 within 1e-7
    np.testing.assert_allclose(found[-1].sum(-1), 1)


def traces(layers, **changed):
    """Traces of the maps of layers (attention, prefix, grid)."""
    metric, values, rows = AttentionMaps(), [], []
    for number, (attention, prefix, grid) in enumerate(layers):
        values.append(metric.measure(make_layer(attention, grid=grid, prefix=prefix)))
        rows.append(Row(f"b{number}", number + 1.0, "attention", "encoder", 0, 3, grid, (8.0, 8.0)))
    stacked = {}
    for name in metric.dims:
        arrays = [found[name].numpy() for found in values]
        shape = np.max([a.shape for a in arrays], 0)
        full = np.full((len(layers), *shape), np.nan, dtype=np.float32)
        for row, array in enumerate(arrays):
            full[(row, *(slice(0, n) for n in array.shape))] = array
        stacked[name] = np.moveaxis(full, 0, 1)
    held = Traces(stacked, rows, ["x.png", "y.png"], of=50)
    return replace(held, **changed)


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_result(prefix):
    attention = [softmax(2, 3, 6 + prefix, 6 + prefix, seed=i) for i in range(2)]
    held = traces([(one, prefix, (2, 3)) for one in attention])
    result = AttentionMaps().summarize(held)
    assert result["attention_maps"].dims == ("layer", "image", "head", "query", "key_row", "key_col")
    np.testing.assert_array_equal(result["attention_maps"][1], held["attention_maps"][:, 1])
    peaks = held["attention_maps"].astype(np.float64).max((-2, -1)).mean((0, 2, 3))
    np.testing.assert_allclose(result["attention_maps_curve"], peaks, rtol=1e-6)
    assert result["query_row"].values.tolist() == [[1, 0, 0]] * 2
    assert result["query_col"].values.tolist() == [[1, 0, 2]] * 2
    state = np.eye(6 + prefix)
    for layer, one in enumerate(attention):
        state = (0.5 * one.double().mean(1).numpy() + 0.5 * np.eye(6 + prefix)) @ state
        row = state[:, 0] if prefix else state.mean(1)
        np.testing.assert_allclose(result["rollout"][layer], row[:, prefix:].reshape(2, 2, 3), rtol=1e-5)


def test_rollout_only_where_all_layers_are_global_and_alike():
    a, b = softmax(2, 3, 6, 6), softmax(2, 3, 4, 4)
    assert "rollout" in AttentionMaps().summarize(traces([(a, 0, (2, 3)), (a, 0, (2, 3))]))
    result = AttentionMaps().summarize(traces([(a, 0, (2, 3)), (b, 0, (2, 2))]))
    assert "rollout" not in result
    assert np.isnan(result["attention_maps"][1, ..., 2]).all()
    held = traces([(a, 0, (2, 3)), (a, 0, (2, 3))])
    gone = held.values["attention_mean"].copy()
    gone[:, 1] = np.nan
    assert "rollout" not in AttentionMaps().summarize(
        replace(held, values={**held.values, "attention_mean": gone})
    )


def test_rollout_of_the_encoder_beside_a_decoder():
    a, b = softmax(2, 3, 7, 7), softmax(2, 3, 7, 7, seed=1)
    held = traces([(a, 1, (2, 3)), (b, 1, (2, 3))])
    rows = [held.rows[0], replace(held.rows[1], part="decoder")]
    result = AttentionMaps().summarize(replace(held, rows=rows))
    assert np.isfinite(result["rollout"][0]).all() and np.isnan(result["rollout"][1]).all()


def test_options():
    assert list(AttentionMaps().sample(100, None)) == [12, 37, 62, 87]
    assert AttentionMaps.holes and AttentionMaps.needs == {"attention", "attention_full"}
    with pytest.raises(UsageError, match="images is 1 or more"):
        AttentionMaps(images=0)
    with pytest.raises(UsageError, match="shares of height and width"):
        AttentionMaps(row=1.0)
