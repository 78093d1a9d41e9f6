"""The published layouts of Swin rebuilt with random weights, against a reference forward in plain torch."""

from __future__ import annotations

import importlib
import math
from types import SimpleNamespace

import pytest
import torch
from probekit_swin.plugin import probekit_models

from probekit.errors import UsageError, WeightsError
from probekit.models.model import load_model
from probekit.names import parse_model, read_options
from probekit.watch import Visitor, Watcher

DEPTHS, HEADS, WIDTH = (2, 2, 6, 2), (3, 6, 12, 24), 96


class Catalog:
    """The two calls `load_model` makes, over this pack's specs alone."""

    def model(self, ref):
        ref = parse_model(ref)
        spec = next(s for s in probekit_models() if s.variant == ref.variant)
        options = read_options(spec.options, ref.options, ref.name)
        return SimpleNamespace(
            spec=spec, pack="swin", version="0", ref=ref, options=options, variant=spec.variant
        )

    def resolve_target(self, entry):
        module, _, attribute = entry.spec.target.partition(":")
        return getattr(importlib.import_module(module), attribute)


def windows_at(size: int, window: int) -> list[int]:
    """Window of each stage: the stage itself where it is no larger."""
    return [min(window, size // (4 << stage)) for stage in range(4)]


def shapes(second: bool, window: int, size: int) -> dict[str, tuple[int, ...]]:
    """Keys of a tiny network's published file (METRICS.md part II), buffers included."""
    found: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (WIDTH, 3, 4, 4),
        "patch_embed.proj.bias": (WIDTH,),
        "patch_embed.norm.weight": (WIDTH,),
        "patch_embed.norm.bias": (WIDTH,),
        "norm.weight": (8 * WIDTH,),
        "norm.bias": (8 * WIDTH,),
        "head.weight": (1000, 8 * WIDTH),
        "head.bias": (1000,),
    }
    for stage, (depth, heads, w) in enumerate(zip(DEPTHS, HEADS, windows_at(size, window), strict=True)):
        width = WIDTH << stage
        for block in range(depth):
            name = f"layers.{stage}.blocks.{block}"
            found |= {
                f"{name}.norm1.weight": (width,),
                f"{name}.norm1.bias": (width,),
                f"{name}.attn.relative_position_index": (w * w, w * w),
                f"{name}.attn.qkv.weight": (3 * width, width),
                f"{name}.attn.proj.weight": (width, width),
                f"{name}.attn.proj.bias": (width,),
                f"{name}.norm2.weight": (width,),
                f"{name}.norm2.bias": (width,),
                f"{name}.mlp.fc1.weight": (4 * width, width),
                f"{name}.mlp.fc1.bias": (4 * width,),
                f"{name}.mlp.fc2.weight": (width, 4 * width),
                f"{name}.mlp.fc2.bias": (width,),
            }
            if second:
                found |= {
                    f"{name}.attn.q_bias": (width,),
                    f"{name}.attn.v_bias": (width,),
                    f"{name}.attn.logit_scale": (heads, 1, 1),
                    f"{name}.attn.cpb_mlp.0.weight": (512, 2),
                    f"{name}.attn.cpb_mlp.0.bias": (512,),
                    f"{name}.attn.cpb_mlp.2.weight": (heads, 512),
                    f"{name}.attn.relative_coords_table": (1, 2 * w - 1, 2 * w - 1, 2),
                }
            else:
                found |= {
                    f"{name}.attn.qkv.bias": (3 * width,),
                    f"{name}.attn.relative_position_bias_table": ((2 * w - 1) ** 2, heads),
                }
            tokens = size // (4 << stage)
            if block % 2 and tokens > w:
                found[f"{name}.attn_mask"] = ((tokens // w) ** 2, w * w, w * w)
        if stage < 3:
            found[f"layers.{stage}.downsample.reduction.weight"] = (2 * width, 4 * width)
            norm = 2 * width if second else 4 * width
            found |= {f"layers.{stage}.downsample.norm.{key}": (norm,) for key in ("weight", "bias")}
    return found


BUFFERS = ("relative_position_index", "attn_mask", "relative_coords_table")


def weights(seed: int, second: bool = False, window: int = 7, size: int = 224) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in shapes(second, window, size).items():
        if key.endswith("relative_position_index"):
            state[key] = torch.zeros(shape, dtype=torch.long)
            continue
        scale = 0.06 if ".qkv.weight" in key or "cpb_mlp" in key else 0.5 if "table" in key else 0.02
        centre = 1.0 if "norm" in key and key.endswith("weight") else 2.0 if "logit_scale" in key else 0.0
        if second and ".norm" in key and ".blocks." in key:  # after a branch: it magnifies rounding
            centre, scale = centre * 0.3, 0.006
        state[key] = torch.randn(shape, generator=generator) * scale + centre
    return state


def partition(x: torch.Tensor, w: int) -> torch.Tensor:
    """(B, H, W, ...) -> (B, windows, w * w, ...), windows and the tokens in them in raster order."""
    rows = [x[:, i : i + w, j : j + w].flatten(1, 2) for i in range(0, x.shape[1], w)
            for j in range(0, x.shape[2], w)]  # fmt: skip
    return torch.stack(rows, dim=1)


def restore(x: torch.Tensor, w: int, rows: int, columns: int) -> torch.Tensor:
    """The inverse of `partition`."""
    out = x.new_empty(x.shape[0], rows, columns, *x.shape[3:])
    for number in range(x.shape[1]):
        i, j = divmod(number, columns // w)
        out[:, i * w : i * w + w, j * w : j * w + w] = x[:, number].unflatten(1, (w, w))
    return out


def regions(rows: int, columns: int, w: int, shift: int) -> torch.Tensor:
    """(1, H, W) of the shifted map: numbers of the parts that may attend to each other."""
    down, right = (
        torch.tensor([0 if i < length - w else 1 if i < length - shift else 2 for i in range(length)])
        for length in (rows, columns)
    )
    return (3 * down[:, None] + right[None, :])[None]


def reference(state: dict, images: torch.Tensor, second: bool, window: int, trained: int):
    """Tokens after each block, and of each block (attention, its tokens' numbers); float64.

    trained: px of the size the network was trained at, to which V2's coordinates are relative
    """
    w = {k: v.double() for k, v in state.items() if not k.endswith(BUFFERS)}

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scale = torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5)
        return centred / scale * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def offsets(side):
        at = torch.arange(side * side)
        return (at // side)[:, None] - (at // side)[None], (at % side)[:, None] - (at % side)[None]

    def bias(name, side, stage):
        down, right = offsets(side)
        if not second:
            table = w[f"{name}.relative_position_bias_table"]
            return table[(down + side - 1) * (2 * side - 1) + right + side - 1].permute(2, 0, 1)
        reach = windows_at(trained, window)[stage] - 1
        coordinates = torch.stack([down, right], dim=-1).double() / reach * 8
        coordinates = coordinates.sign() * torch.log2(coordinates.abs() + 1) / 3
        hidden = torch.relu(linear(coordinates, f"{name}.cpb_mlp.0")) @ w[f"{name}.cpb_mlp.2.weight"].T
        return (16 / (1 + torch.exp(-hidden))).permute(2, 0, 1)

    def attend(x, name, stage, side, shift):
        rows, columns, heads = x.shape[1], x.shape[2], HEADS[stage]
        numbers = torch.arange(rows * columns).reshape(1, rows, columns)
        x, numbers = (t.roll((-shift, -shift), (1, 2)) for t in (x, numbers))
        x, numbers = partition(x, side), partition(numbers, side)[0]
        qkv = x @ w[f"{name}.qkv.weight"].T
        if second:
            extra = torch.cat(
                [w[f"{name}.q_bias"], torch.zeros_like(w[f"{name}.q_bias"]), w[f"{name}.v_bias"]]
            )
        else:
            extra = w[f"{name}.qkv.bias"]
        q, k, v = (qkv + extra).unflatten(-1, (3, heads, -1)).permute(3, 0, 1, 4, 2, 5)
        if second:
            q, k = (t / t.norm(dim=-1, keepdim=True) for t in (q, k))
            scale = torch.exp(torch.clamp(w[f"{name}.logit_scale"], max=math.log(100.0)))
        else:
            scale = q.shape[-1] ** -0.5
        logits = q @ k.transpose(-1, -2) * scale + bias(name, side, stage)
        if shift:
            part = partition(regions(rows, columns, side, shift), side)[0]
            apart = part[:, :, None] != part[:, None, :]
            logits = logits.masked_fill(apart[None, :, None], -math.inf)
        logits = torch.exp(logits - logits.amax(-1, keepdim=True))
        probabilities = logits / logits.sum(-1, keepdim=True)
        out = linear((probabilities @ v).transpose(2, 3).flatten(3), f"{name}.proj")
        out = restore(out, side, rows, columns).roll((shift, shift), (1, 2))
        return out, (probabilities, numbers)

    def mlp(x, name):
        hidden = linear(x, f"{name}.fc1")
        return linear(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))), f"{name}.fc2")

    count, _, height, width = images.shape
    cut = images.double().reshape(count, 3, height // 4, 4, width // 4, 4).permute(0, 2, 4, 1, 3, 5)
    x = cut.flatten(3) @ w["patch_embed.proj.weight"].reshape(WIDTH, -1).T + w["patch_embed.proj.bias"]
    x = norm(x, "patch_embed.norm")
    tokens, attention = [], []
    for stage, depth in enumerate(DEPTHS):
        side = min(window, x.shape[1])
        for block in range(depth):
            name = f"layers.{stage}.blocks.{block}"
            shift = side // 2 if block % 2 and x.shape[1] > side else 0
            if second:
                mixed, maps = attend(x, f"{name}.attn", stage, side, shift)
                x = x + norm(mixed, f"{name}.norm1")
                x = x + norm(mlp(x, f"{name}.mlp"), f"{name}.norm2")
            else:
                mixed, maps = attend(norm(x, f"{name}.norm1"), f"{name}.attn", stage, side, shift)
                x = x + mixed
                x = x + mlp(norm(x, f"{name}.norm2"), f"{name}.mlp")
            tokens.append(x.flatten(1, 2))
            attention.append(maps)
        if stage < 3:
            name = f"layers.{stage}.downsample"
            corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]  # rows vary fastest
            x = torch.cat(corners, dim=-1)
            if second:
                x = norm(x @ w[f"{name}.reduction.weight"].T, f"{name}.norm")
            else:
                x = norm(x, f"{name}.norm") @ w[f"{name}.reduction.weight"].T
    return tokens, attention, linear(norm(x, "norm").mean((1, 2)), "head")


def assert_same(model, state, second, window, trained, size):
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(5))
    tokens, attention, logits = reference(state, images, second, window, trained)
    seen = []

    def see(layer):
        number = len(seen)
        seen.append(layer.tokens_out)
        assert layer.tokens_out.shape == tokens[number].shape
        assert (layer.tokens_out - tokens[number]).abs().max() < 1e-5, f"block {number}"
        probabilities, numbers = attention[number]
        window_of = torch.empty(layer.tokens_count, dtype=torch.long)
        place_of = torch.empty(layer.tokens_count, dtype=torch.long)
        window_of[numbers] = torch.arange(len(numbers))[:, None].expand_as(numbers)
        place_of[numbers] = torch.arange(numbers.shape[1]).expand_as(numbers)
        covered = 0
        for folded in layer.windows():
            group = folded.group or layer.info.groups[0]
            for found, members in zip(folded.attention, torch.from_numpy(group.tokens), strict=True):
                window = window_of[members]
                assert bool((window == window[0]).all()), "a set of tokens lies in several windows"
                place = place_of[members]
                wanted = probabilities[0, window[0]][:, place][:, :, place]
                assert wanted.sum(-1).min() > 1 - 1e-9, "the set leaves out tokens that attend to each other"
                assert (found - wanted).abs().max() < 1e-5, f"block {number}"
                covered += len(members)
        assert covered == layer.tokens_count

    watcher = Watcher(model.module, images, forward=model.forward)
    out = watcher.run(images, [Visitor(frozenset({"tokens_out", "attention"}), see)])
    assert len(seen) == 12 and not watcher.anatomy.warnings
    assert (out - logits).abs().max() < 1e-5
    middle = attention[6][0]
    assert middle.amax(-1).mean() * middle.shape[-1] > 2, (
        "the attention is uniform: it would show no difference"
    )
    return watcher.anatomy


def facts(anatomy):
    return list(dict.fromkeys((i.heads, i.prefix, i.grid, i.stride, i.windows) for i in anatomy.layers))


def test_swins_published_file_gives_the_reference_tokens_and_attention(tmp_path):
    state = weights(1)
    torch.save({"model": state, "config": {"MODEL": "swin"}}, tmp_path / "swin_tiny_patch4_window7_224.pth")
    model = load_model(f"swin:tiny@{tmp_path}/swin_tiny_patch4_window7_224.pth", Catalog())
    anatomy = assert_same(model, state, False, 7, 224, (224, 224))
    assert facts(anatomy) == [
        (3, 0, (56, 56), (4, 4), 64),
        (6, 0, (28, 28), (8, 8), 16),
        (12, 0, (14, 14), (16, 16), 4),
        (24, 0, (7, 7), (32, 32), 1),
    ]
    assert {g.size for g in anatomy.layers[1].groups} == {9, 12, 16, 21, 28, 49}
    assert {m.eps for m in model.module.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}
    ignored = {key for key in state if key.endswith(BUFFERS)}
    assert set(model.accounting.ignored) == ignored and len(ignored) == 12 + 1 + 1 + 3
    assert len(model.accounting.used) == len(state) - len(ignored)

    wide = load_model(
        f"swin:tiny@{tmp_path}/swin_tiny_patch4_window7_224.pth", Catalog(), image_size=(224, 448)
    )
    watcher = Watcher(wide.module, torch.zeros(2, 3, 224, 448))
    assert facts(watcher.anatomy)[-1] == (24, 0, (7, 14), (32, 32), 2) and not watcher.anatomy.warnings
    table = "layers.2.blocks.3.attn.relative_position_bias_table"
    assert torch.equal(wide.module.state_dict()[table], state[table])


@pytest.mark.parametrize("pixels", [256, 128])
def test_swin_v2s_published_file_gives_the_reference_tokens_and_attention(tmp_path, pixels):
    state = weights(2, True, 8, 256)
    torch.save({"model": state}, tmp_path / "w.pth")
    model = load_model(f"swin:v2-tiny@{tmp_path}/w.pth", Catalog(), image_size=(pixels, pixels))
    anatomy = assert_same(model, state, True, 8, 256, (pixels, pixels))
    last = (24, 0, (pixels // 32,) * 2, (32, 32), 1)
    assert facts(anatomy)[0] == (3, 0, (pixels // 4,) * 2, (4, 4), (pixels // 32) ** 2)
    assert facts(anatomy)[-1] == last
    assert {m.eps for m in model.module.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}
    assert sum(key.endswith("relative_coords_table") for key in model.accounting.ignored) == 12


def test_sizes_the_windows_do_not_divide_are_refused_with_the_nearest():
    for text, size, hint in (
        ("swin:tiny", (256, 256), "take `--image-size 224x224` or `--image-size 448x448`;"),
        ("swin:tiny", (224, 500), "take `--image-size 224x448` or `--image-size 224x672`;"),
        ("swin:tiny", (100, 100), "take `--image-size 224x224`;"),
        ("swin:v2-tiny", (224, 224), "take `--image-size 128x128` or `--image-size 256x256`;"),
        ("swin:v2-tiny-w16", (300, 256), "take `--image-size 256x256` or `--image-size 512x256`;"),
        ("swin:base-384", (224, 224), "take `--image-size 192x192` or `--image-size 384x384`;"),
    ):
        with pytest.raises(UsageError, match=f"don't divide the stages of '{text}' at {size[0]} x") as caught:
            load_model(f"{text}@random", Catalog(), image_size=size)
        assert caught.value.hint.startswith(hint) and f"'{text}:padding=drop'" in caught.value.hint
    with pytest.raises(UsageError, match="4 x 4 px, which don't tile 255 x 256"):
        load_model("swin:tiny:padding=drop@random", Catalog(), image_size=(255, 256))


def test_padded_keys_are_dropped_when_asked_for():
    model = load_model("swin:tiny:padding=drop@random", Catalog(), image_size=(256, 256))
    images = torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    watcher = Watcher(model.module, images)
    assert "padded keys are dropped" in watcher.anatomy.warnings[0]
    assert all(layer.padded for layer in watcher.anatomy.layers)
    shares = []

    def see(layer):
        for folded in layer.windows():
            total = folded.attention.sum(-1)
            assert bool(((total - 1).abs() < 1e-4).all())
        shares.append(sum(folded.window_share for folded in layer.windows()))

    watcher.run(images, [Visitor(frozenset({"attention"}), see)])
    assert shares == pytest.approx([1.0] * 12)


def test_other_files_are_refused(tmp_path):
    state = weights(3)
    torch.save({"model": state}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="doesn't fit the model as a Swin V2 checkpoint") as caught:
        load_model(f"swin:v2-tiny@{tmp_path}/w.pth", Catalog())
    assert "variants of their own" in caught.value.hint
    with pytest.raises(WeightsError, match=r"of another shape \('head.fc.weight' \(1000, 768\)"):
        load_model(f"swin:tiny-22k@{tmp_path}/w.pth", Catalog())
    del state["layers.1.downsample.norm.bias"]
    torch.save({"model": state}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"1 missing \('layers.2.downsample.norm.bias' \(768\)\)"):
        load_model(f"swin:tiny@{tmp_path}/w.pth", Catalog())


@pytest.mark.parametrize("spec", probekit_models(), ids=lambda spec: spec.variant)
def test_every_variant_builds_and_says_what_it_is(spec):
    module = Catalog().resolve_target(SimpleNamespace(spec=spec))
    with torch.device("meta"):
        network = module(spec.variant)
    depths = [len(stage.blocks) for stage in network.layers]
    assert sum(depths) == spec.layers
    width, heads = {
        "tiny": (96, 3), "small": (96, 3), "base": (128, 4), "large": (192, 6),
    }[spec.variant.removeprefix("v2-").partition("-")[0]]  # fmt: skip
    assert network.embed_dim == width
    assert [stage.blocks[0].attn.num_heads for stage in network.layers] == [heads << i for i in range(4)]
    window = int(spec.weights.filename.partition("_window")[2].partition("_")[0])
    pixels = spec.preprocessing.size[0]
    assert [stage.blocks[0].window_size[0] for stage in network.layers] == windows_at(pixels, window)
    assert f"_window{window}_{pixels}" in spec.weights.url
    assert network.head.fc.out_features == (21841 if spec.weights.filename.endswith("_22k.pth") else 1000)
    assert spec.objective == "supervised" and spec.weights.licence == "MIT" and spec.citation
    assert spec.preprocessing.crop_mode == ("squash" if pixels == 384 else "center")
    if spec.variant in ("tiny", "v2-tiny"):
        expected = {}
        for key, shape in shapes(spec.variant == "v2-tiny", window, pixels).items():
            if not key.endswith(BUFFERS):
                stage = key.split(".")[1]
                if ".downsample." in key:
                    key = key.replace(f"layers.{stage}", f"layers.{int(stage) + 1}")
                expected[key.replace("head.", "head.fc.")] = shape
        assert {key: tuple(value.shape) for key, value in network.state_dict().items()} == expected


def test_a_bare_name_is_one_variant():
    assert [spec.variant for spec in probekit_models() if spec.default] == ["base"]
