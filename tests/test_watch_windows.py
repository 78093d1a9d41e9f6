"""The watcher over timm: Swin's windows, odd shapes, what is refused, and what an exception leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from probekit.errors import DoesNotApply, WatchError
from probekit.metrics.attention_distance import AttentionDistance
from probekit.metrics.nmi import NMI
from probekit.watch import Visitor, Watcher


def peaked(model: nn.Module) -> nn.Module:
    """Query and key weights times 4: random attention that is far from uniform."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            owner, _, kind = name.rpartition(".")
            owner = owner.rpartition(".")[2]
            if kind != "weight" or p.dim() < 2:
                continue
            if owner in ("qkv", "to_qkv", "in_proj"):
                p[: 2 * len(p) // 3] *= 4
            elif owner in ("q", "k", "q_proj", "k_proj", "qk", "kv", "to_q", "query", "key"):
                p *= 4
    return model


@contextmanager
def hooked(*pairs: tuple[nn.Module, Callable]) -> Iterator[None]:
    handles = [m.register_forward_hook(hook) for m, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hooks_of(model: nn.Module) -> int:
    names = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_always_called",
        "_forward_hooks_with_kwargs",
    )
    return sum(len(getattr(m, n)) for m in model.modules() for n in names)


# ---------------------------------------------------------------------- windows, against roll and partition


def small_swin(size: int | tuple[int, int], depths: tuple[int, ...] = (2,), **more: Any) -> nn.Module:
    torch.manual_seed(0)
    heads = (3, 6, 12)[: len(depths)]
    options = {"depths": depths, "num_heads": heads, "embed_dim": 48, "img_size": size, "num_classes": 8}
    return peaked(timm.create_model("swin_tiny_patch4_window7_224", **(options | more)).eval())


def partition(grid: Tensor, window: int, shift: int) -> Tensor:
    """Numbers on a (rows, columns) grid, rolled and cut into (windows, window * window)."""
    rows, columns = grid.shape
    grid = grid.roll((-shift, -shift), (0, 1))
    cut = grid.view(rows // window, window, columns // window, window).permute(0, 2, 1, 3)
    return cut.reshape(-1, window * window)


def test_swin_windows_are_the_rolled_partition_and_its_regions() -> None:
    model = small_swin(112)
    watcher = Watcher(model, torch.randn(2, 3, 112, 112))
    plain, shifted = watcher.anatomy.layers
    numbers = torch.arange(28 * 28).view(28, 28)
    assert [g.size for g in plain.groups] == [49]
    windows = {frozenset(row.tolist()) for row in partition(numbers, 7, 0)}
    assert {frozenset(row.tolist()) for row in plain.groups[0].tokens} == windows

    # a rolled window may not mix tokens from opposite borders: split it where the roll wrapped around
    expected = set()
    for row in partition(numbers, 7, 3):
        regions: dict[tuple[bool, bool], list[int]] = {}
        wraps = [any(int(n) // 28 >= 21 + 3 for n in row), any(int(n) % 28 >= 21 + 3 for n in row)]
        for n in row.tolist():
            y, x = divmod(n, 28)
            regions.setdefault((wraps[0] and y < 3, wraps[1] and x < 3), []).append(n)
        expected |= {frozenset(r) for r in regions.values()}
    assert {g.size for g in shifted.groups} == {9, 12, 16, 21, 28, 49}
    assert {frozenset(row.tolist()) for g in shifted.groups for row in g.tokens} == expected
    assert sum(g.tokens.size for g in shifted.groups) == 28 * 28
    for group in shifted.groups:
        np.testing.assert_array_equal(shifted.positions[group.tokens], group.key_positions)


@pytest.mark.parametrize("heads", [2, 3])
@pytest.mark.parametrize("largest", [1, None])
def test_regions_do_not_depend_on_how_peaked_heads_are(heads: int, largest: int | None) -> None:
    """Swin V2's largest scale, of one head or of all: masked pairs leak 1e-11, and allowed ones get less."""

    def regions(changed: int | None) -> list[set[frozenset[int]]]:
        torch.manual_seed(3)
        options = {"img_size": 112, "window_size": 7, "depths": (2,), "num_heads": (heads,), "embed_dim": 48}
        model = timm.create_model("swinv2_tiny_window8_256", **options).eval()
        for block in model.layers[0].blocks:
            block.attn.logit_scale.data[:changed] = np.log(100)
        images = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(103))
        layers = Watcher(model, images).anatomy.layers
        return [{frozenset(row.tolist()) for g in i.groups for row in g.tokens} for i in layers]

    plain, shifted = regions(0)
    assert (len(plain), len(shifted)) == (16, 25)
    assert regions(largest) == [plain, shifted]


def test_swin_heads_and_values_come_back_in_raster_order() -> None:
    model, images = small_swin(112), torch.randn(2, 3, 112, 112)
    watcher = Watcher(model, images)
    seen: dict[str, dict[str, Tensor]] = {}
    pairs = []
    for i, block in enumerate(model.layers[0].blocks):
        entry = seen.setdefault(f"layers.0.blocks.{i}.attn", {})
        pairs.append((block.attn.proj, lambda m, a, out, e=entry: e.update(heads=a[0])))
        pairs.append((block.attn.qkv, lambda m, a, out, e=entry: e.update(qkv=out)))
    with torch.no_grad(), hooked(*pairs):
        model(images)

    def raster(t: Tensor, shift: int) -> Tensor:  # (B * W, 49, C) -> (B, H, N, d)
        order = partition(torch.arange(28 * 28).view(28, 28), 7, shift).flatten()
        out = torch.empty(2, 28 * 28, t.shape[-1])
        out[:, order] = t.reshape(2, -1, t.shape[-1])
        return out.unflatten(-1, (3, 16)).transpose(1, 2)

    def visit(layer) -> None:
        shift = 3 if layer.info.masked else 0
        entry = seen[layer.info.name]
        torch.testing.assert_close(layer.head_outputs, raster(entry["heads"], shift), rtol=0, atol=0)
        for name, part in zip("qkv", entry["qkv"].chunk(3, -1), strict=True):
            expected = raster(part, shift) * (16**-0.5 if name == "q" else 1)  # timm scales its queries
            torch.testing.assert_close(getattr(layer, name), expected, rtol=0, atol=1e-6)
        for part in layer.windows():  # a folded layer's maps times its values are its heads' outputs
            found = part.attention @ part.v
            torch.testing.assert_close(found, part.head_outputs, rtol=0, atol=1e-5)

    watcher.run(images, [Visitor(frozenset({"head_outputs", "q", "k", "v", "attention"}), visit)])


def test_swin_padded_to_whole_windows() -> None:
    model, images = small_swin(128), torch.randn(2, 3, 128, 128)
    watcher = Watcher(model, images)
    for info in watcher.anatomy.layers:
        assert info.grid == (32, 32)
        assert info.windows == 25
        assert info.padded == 35 * 35 - 32 * 32
        assert sum(g.tokens.size for g in info.groups) == 32 * 32
    assert any(
        "2 layers (first: 'layers.0.blocks.0.attn') attend to padding" in w for w in watcher.anatomy.warnings
    )
    sums = []

    def visit(layer) -> None:
        for part in layer.windows():
            assert part.attention.shape[-1] == part.tokens_count
            sums.append(part.attention.sum(-1))

    watcher.run(images, [Visitor(frozenset({"attention"}), visit)])
    assert all(torch.allclose(s, torch.ones_like(s), atol=1e-5) for s in sums)


def test_windows_larger_than_the_grid() -> None:
    torch.manual_seed(0)
    model = timm.create_model("hieradet_small", num_classes=8).eval()
    images = torch.randn(2, 3, 64, 64)
    watcher = Watcher(model, images)
    grids = [i.grid for i in watcher.anatomy.layers]
    assert grids == [(16, 16)] + [(8, 8)] * 2 + [(4, 4)] * 11 + [(2, 2)] * 2
    assert all(i.role in ("tokens", "pooled keys") for i in watcher.anatomy.layers)
    pooled = watcher.anatomy.layers[14]  # asks with pooled queries, of windows that are mostly padding
    assert (pooled.role, pooled.tokens, pooled.padded) == ("pooled keys", 4, 16 * 16 - 4 * 4)
    shapes = []
    watcher.run(
        images,
        [Visitor(frozenset({"attention"}), lambda layer: shapes.append(layer.windows()[0].attention.shape))],
    )
    assert shapes[14][2:] == (4, 16)

    def left_out(layer) -> None:
        if layer.info.padded and layer.info.windows == 1:
            for metric in (NMI(compat="cl-vs-mim"), AttentionDistance(renormalise=False)):
                with pytest.raises(DoesNotApply, match="attends to padding"):
                    metric.measure(layer)
            refused.append(layer.info.index)

    refused: list[int] = []
    watcher.run(images, [Visitor(frozenset({"attention_full"}), left_out)])
    assert refused == [4, 5, 6, 8, 9, 11, 12, 14, 15]


def test_swin_merges_an_odd_grid() -> None:
    watcher = Watcher(small_swin(120, (1, 1, 1)), torch.randn(2, 3, 120, 120))
    assert [(i.grid, i.stride) for i in watcher.anatomy.layers] == [
        ((30, 30), (4, 4)),
        ((15, 15), (8, 8)),
        ((8, 8), (16, 16)),
    ]


@pytest.mark.parametrize(
    ("name", "options", "grids"),
    [
        ("vit_tiny_patch16_224", {"depth": 1, "img_size": (224, 448)}, [((14, 28), 16)]),
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": (224, 448), "depths": (1, 1), "num_heads": (3, 6)},
            None,
        ),
        ("pit_ti_224", {"img_size": (224, 448)}, None),
    ],
    ids=["vit", "swin", "pit"],
)
def test_images_that_are_not_square(name: str, options: dict[str, Any], grids: Any) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=8, **options).eval()
    images = torch.randn(2, 3, 224, 448)
    watcher = Watcher(model, images)
    grids = (
        grids
        or {
            "swin": [((56, 112), 4), ((28, 56), 8)],
            "pit_": [((27, 55), 8)] * 2 + [((14, 28), 16)] * 6 + [((7, 14), 32)] * 4,
        }[name[:4]]
    )
    assert [(i.grid, i.stride) for i in watcher.anatomy.layers] == [(g, (s, s)) for g, s in grids]
    first = watcher.anatomy.layers[0]
    rows, columns = first.grid
    reach = first.stride[0] * (rows - 1), first.stride[1] * (columns - 1)
    np.testing.assert_allclose(np.ptp(first.positions, axis=0), reach)
    seen = []
    watcher.run(images, [Visitor(frozenset({"tokens"}), lambda layer: seen.append(layer.tokens.shape[1]))])
    assert seen[0] == rows * columns


def test_positions_are_patch_centres_in_raster_order() -> None:
    watcher = Watcher(
        timm.create_model("vit_tiny_patch16_224", depth=1, img_size=(32, 48)), torch.randn(1, 3, 32, 48)
    )
    expected = [[8, 8], [8, 24], [8, 40], [24, 8], [24, 24], [24, 40]]
    np.testing.assert_array_equal(watcher.anatomy.layers[0].positions, expected)


# ---------------------------------------------------------------------- what can't be watched


@pytest.mark.parametrize(
    ("name", "size", "text", "watched"),
    [
        (
            "volo_d1_224",
            224,
            "attention module 'network.0.0.attn' of 'VOLO' ran, but no attention was seen",
            14,
        ),
        ("mobilevitv2_050", 64, "attention module 'stages.2.1.transformer.0.attn'", 0),
        ("efficientvit_b0", 64, "weighs tokens by rows that don't sum to 1 before the product with v", 0),
        (
            "swiftformer_xs",
            64,
            "'stages.0.blocks.2.attn' of 'SwiftFormer' ran, but no attention was seen in it",
            0,
        ),
        ("resnet18", 64, "no attention between tokens was found in 'ResNet'", 0),
        ("mixer_s32_224", 224, "no attention between tokens was found in 'MlpMixer'", 0),
    ],
)
def test_refused(name: str, size: int, text: str, watched: int) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=8).eval()
    images = torch.randn(2, 3, size, size)
    with pytest.raises(WatchError) as refusal:
        Watcher(model, images)
    assert text in refusal.value.message
    assert hooks_of(model) == 0
    if not watched:
        with pytest.raises(WatchError, match="no attention between tokens was found"):
            Watcher(model, images, allow_unwatched=True)
        return
    with torch.no_grad():
        before = model(images)
    watcher = Watcher(model, images, allow_unwatched=True)
    assert len(watcher.anatomy.layers) == watched
    left_out = [o for o in watcher.anatomy.others if "not watched" in o["why"]]
    assert {o["name"] for o in left_out} == {f"network.0.{i}.attn" for i in range(4)}
    assert torch.equal(watcher.run(images, []), before)


def test_an_exception_leaves_no_hook_behind() -> None:
    model, images = small_swin(56, (1,)), torch.randn(2, 3, 56, 56)
    handle = model.layers[0].blocks[0].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Watcher(model, images)
    handle.remove()
    assert hooks_of(model) == 0
    watcher = Watcher(model, images)

    def fail(layer) -> None:
        raise RuntimeError("visitor")

    with pytest.raises(RuntimeError, match="visitor"):
        watcher.run(images, [Visitor(frozenset({"attention"}), fail)])
    assert hooks_of(model) == 0
    with torch.no_grad():
        assert torch.equal(watcher.run(images, []), model(images))


def test_channel_attention_has_no_maps_over_tokens() -> None:
    images = torch.randn(2, 3, 96, 96)
    model = timm.create_model("xcit_nano_12_p16_224", depth=1, img_size=96, num_classes=8).eval()
    refused = []

    def visit(layer) -> None:
        for field_name in ("attention", "attention_stats", "distances", "q", "head_outputs", "prefix_mass"):
            with pytest.raises(DoesNotApply, match=r"'blocks.0.attn' attends over channels"):
                getattr(layer, field_name)
            refused.append(field_name)
        with pytest.raises(DoesNotApply, match="over channels"):
            layer.windows()
        assert layer.tokens_out.shape == (2, 36, 128)

    Watcher(model, images).run(
        images, [Visitor(frozenset({"attention", "q", "head_outputs", "tokens_out"}), visit)]
    )
    assert len(refused) == 6
