"""SimMIM's Swin Transformers from the published layout, against a reference over all pairs of tokens."""

from __future__ import annotations

import argparse
import importlib
import math
import os
from types import SimpleNamespace

import pytest
import torch
from probekit_simmim.models import build, build_swin, fit
from probekit_simmim.plugin import probekit_models

from probekit.errors import UsageError, WeightsError
from probekit.models.checkpoints import landing
from probekit.models.model import load_model
from probekit.names import parse_model, read_options
from probekit.watch import Visitor, Watcher

DEPTHS = (2, 2, 18, 2)
WIDTHS = {"swin-b": 128, "swin-l": 192}
HEADS = {"swin-b": (4, 8, 16, 32), "swin-l": (6, 12, 24, 48)}
WINDOWS = {"swin-b": (6, 6, 6, 6), "swin-l": (12, 12, 12, 6)}  # the last stage of 192 px has 6 x 6 tokens


class Catalog:
    """The two calls `load_model` makes, over this pack's specs alone."""

    def model(self, ref):
        ref = parse_model(ref)
        spec = next(s for s in probekit_models() if s.variant == ref.variant)
        options = read_options(spec.options, ref.options, spec.full_name)
        return SimpleNamespace(
            spec=spec, pack="simmim", version="0", ref=ref, options=options, variant=spec.variant
        )

    def resolve_target(self, entry):
        module, _, attribute = entry.spec.target.partition(":")
        return getattr(importlib.import_module(module), attribute)


def shapes(variant: str, windows: tuple[int, ...] | None = None) -> dict[str, tuple[int, ...]]:
    """METRICS.md part II, "Key shapes", SimMIM Swin, without "encoder."; buffers apart."""
    width = WIDTHS[variant]
    found: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (width, 3, 4, 4),
        "patch_embed.proj.bias": (width,),
        "patch_embed.norm.weight": (width,),
        "patch_embed.norm.bias": (width,),
        "norm.weight": (8 * width,),
        "norm.bias": (8 * width,),
    }
    for stage, (depth, heads, window) in enumerate(
        zip(DEPTHS, HEADS[variant], windows or WINDOWS[variant], strict=True)
    ):
        c = width << stage
        for block in range(depth):
            name = f"layers.{stage}.blocks.{block}"
            found |= {
                f"{name}.norm1.weight": (c,),
                f"{name}.norm1.bias": (c,),
                f"{name}.attn.relative_position_bias_table": ((2 * window - 1) ** 2, heads),
                f"{name}.attn.qkv.weight": (3 * c, c),
                f"{name}.attn.qkv.bias": (3 * c,),
                f"{name}.attn.proj.weight": (c, c),
                f"{name}.attn.proj.bias": (c,),
                f"{name}.norm2.weight": (c,),
                f"{name}.norm2.bias": (c,),
                f"{name}.mlp.fc1.weight": (4 * c, c),
                f"{name}.mlp.fc1.bias": (4 * c,),
                f"{name}.mlp.fc2.weight": (c, 4 * c),
                f"{name}.mlp.fc2.bias": (c,),
            }
        if stage < 3:
            found |= {
                f"layers.{stage}.downsample.norm.weight": (4 * c,),
                f"layers.{stage}.downsample.norm.bias": (4 * c,),
                f"layers.{stage}.downsample.reduction.weight": (2 * c, 4 * c),
            }
    return found


def buffers(variant: str) -> dict[str, torch.Tensor]:
    """Keys of the buffers that the authors' modules register; what they hold isn't read."""
    found = {}
    for stage, (depth, window) in enumerate(zip(DEPTHS, WINDOWS[variant], strict=True)):
        for block in range(depth):
            name = f"layers.{stage}.blocks.{block}"
            found[f"{name}.attn.relative_position_index"] = torch.zeros(
                window**2, window**2, dtype=torch.long
            )
            if block % 2 and 48 >> stage > window:
                found[f"{name}.attn_mask"] = torch.zeros(1, window**2, window**2)
    return found


def random_state(variant: str, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in shapes(variant).items():
        scale = 1.0 if "bias_table" in key else 0.05 if key.endswith("qkv.weight") else 0.02
        state[key] = torch.randn(shape, generator=generator) * scale + ("norm" in key and "weight" in key)
    return state


def checkpoint(variant: str, state: dict[str, torch.Tensor]) -> dict:
    """As SimMIM's save_checkpoint writes it."""
    encoder = state | buffers(variant) | {"mask_token": torch.zeros(1, 1, WIDTHS[variant])}
    width = 8 * WIDTHS[variant]
    decoder = {"decoder.0.weight": torch.zeros(3072, width, 1, 1), "decoder.0.bias": torch.zeros(3072)}
    return {
        "model": {f"encoder.{key}": value for key, value in encoder.items()} | decoder,
        "optimizer": {"state": {0: {"step": 9, "exp_avg": torch.zeros(4)}}, "param_groups": [{"lr": 1e-4}]},
        "lr_scheduler": {"base_values": [1e-4]},
        "max_accuracy": 0.0,
        "epoch": 799,
        "args": argparse.Namespace(amp="O1"),
    }


def reference(variant: str, state: dict[str, torch.Tensor], images: torch.Tensor):
    """(layers, output) in float64: per layer tokens between and after (B, N, C), and the map (B, H, N, N).

    Tokens are in raster order. The map is over all pairs of the stage's tokens, 0 where two don't attend to
    each other: those of other windows of the shifted grid, and of one that the shift made of two ends.
    """
    w = {key: value.double() for key, value in state.items()}

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scale = torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5)
        return centred / scale * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    side, count = 48, len(images)
    patches = images.double().reshape(count, 3, 48, 4, 48, 4).permute(0, 2, 4, 1, 3, 5).reshape(count, -1, 48)
    x = norm(
        patches @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"], "patch_embed.norm"
    )
    layers = []
    for stage, (depth, heads, window) in enumerate(
        zip(DEPTHS, HEADS[variant], WINDOWS[variant], strict=True)
    ):
        row, column = torch.arange(side * side) // side, torch.arange(side * side) % side
        offset = [t[:, None] - t[None] + window - 1 for t in (row, column)]
        inside = [(o >= 0) & (o < 2 * window - 1) for o in offset]
        number = (offset[0] * (2 * window - 1) + offset[1]).clamp(0, (2 * window - 1) ** 2 - 1)
        for block in range(depth):
            name = f"layers.{stage}.blocks.{block}"
            shift = window // 2 if block % 2 and side > window else 0
            allowed = inside[0] & inside[1]
            for t in (row, column):
                place, wrapped = (t - shift) % side // window, t < shift
                allowed = allowed & (place[:, None] == place[None]) & (wrapped[:, None] == wrapped[None])
            qkv = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv")
            q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            bias = w[f"{name}.attn.relative_position_bias_table"][number].permute(2, 0, 1)
            logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias
            attention = logits.masked_fill(~allowed, -math.inf).softmax(-1)
            mid = x + linear((attention @ v).transpose(1, 2).flatten(2), f"{name}.attn.proj")
            hidden = linear(norm(mid, f"{name}.norm2"), f"{name}.mlp.fc1")
            x = mid + linear(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))), f"{name}.mlp.fc2")
            layers.append((mid, x, attention))
        if stage < 3:
            grid = x.unflatten(1, (side, side))
            four = [grid[:, r::2, c::2] for c in (0, 1) for r in (0, 1)]  # down before right
            merged = norm(torch.cat(four, -1).flatten(1, 2), f"layers.{stage}.downsample.norm")
            x = merged @ w[f"layers.{stage}.downsample.reduction.weight"].T
            side //= 2
    return layers, norm(x, "norm").mean(1)


def test_the_published_layout_gives_the_reference_tokens_and_attention(tmp_path):
    state = random_state("swin-b", 1)
    path = tmp_path / "simmim_pretrain__swin_base.pth"
    torch.save(checkpoint("swin-b", state), path)
    model = load_model(f"simmim:swin-b@{path}", Catalog())
    path.unlink()
    assert len(model.accounting.used) == len(state)
    ignored = {f"encoder.{key}" for key in buffers("swin-b")}
    ignored |= {"encoder.mask_token", "decoder.0.weight", "decoder.0.bias"}
    assert set(model.accounting.ignored) == ignored
    assert model.preprocessing.size == (192, 192)

    images = torch.randn(2, 3, 192, 192, generator=torch.Generator().manual_seed(5))
    expected, output = reference("swin-b", state, images)
    seen = []

    def visit(layer):
        mid, out, attention = expected[len(seen)]
        seen.append(layer.info.name)
        for site, want in (("tokens_mid", mid), ("tokens_out", out)):
            assert (getattr(layer, site) - want).abs().max() < 1e-5, f"{site} of {layer.info.name}"
        covered = torch.zeros(layer.info.tokens, dtype=torch.bool)
        for part in layer.windows():
            tokens = torch.from_numpy((part.group or part.info.groups[0]).tokens)
            want = attention[:, :, tokens[:, :, None], tokens[:, None, :]].transpose(1, 2).flatten(0, 1)
            assert (part.attention - want).abs().max() < 1e-5, f"attention of {layer.info.name}"
            assert torch.allclose(want.sum(-1), torch.ones(()).double()), "part of its keys is missing"
            covered[tokens] = True
        assert covered.all()

    needs = frozenset({"attention", "tokens_mid", "tokens_out"})
    found = Watcher(model.module, images).run(images, [Visitor(needs, visit)])
    assert seen == [f"layers.{s}.blocks.{b}.attn" for s, depth in enumerate(DEPTHS) for b in range(depth)]
    assert (found - output).abs().max() < 1e-5
    sharpest = (expected[4][2].amax(-1) * 36).mean()
    assert sharpest > 2, "the attention is uniform: it would show no difference"


@pytest.mark.parametrize("variant", ["swin-b", "swin-l"])
def test_keys_heads_and_norms(variant):
    with torch.device("meta"):
        module = build_swin(variant).module
    file = {f"encoder.{key}": torch.empty(shape, device="meta") for key, shape in shapes(variant).items()}
    assert len(module.state_dict()) == len(file)
    spec = next(spec for spec in probekit_models() if spec.variant == variant)
    assert landing(module, {"model": file}, spec.weights.layout) == len(file)
    sizes = sorted(tuple(value.shape) for value in module.state_dict().values())
    assert sizes == sorted(shapes(variant).values())
    assert [blocks[0].attn.num_heads for blocks in (s.blocks for s in module.layers)] == list(HEADS[variant])
    assert [s.blocks[1].window_size[0] for s in module.layers] == list(WINDOWS[variant])
    assert {m.eps for m in module.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}


def test_files_of_other_variants_are_named():
    with torch.device("meta"):
        modules = {"swin-b": build_swin("swin-b").module, "vit-b16": build("vit-b16")}
        files = {name: {key: torch.empty(s) for key, s in shapes(name).items()} for name in WIDTHS}
    for file, wanted in (("swin-l", "swin-b"), ("swin-b", "vit-b16"), ("vit-b16", "swin-b")):
        state = files[file] if file in files else modules[file].state_dict()
        with pytest.raises(WeightsError, match=f"is a file of 'simmim:{file}', not of 'simmim:{wanted}'"):
            fit(state, modules[wanted])


@pytest.mark.skipif(not os.environ.get("PROBEKIT_SLOW"), reason="1 GB; PROBEKIT_SLOW=1 runs it")
def test_the_large_file_loads(tmp_path):
    state = {key: torch.zeros(shape) for key, shape in shapes("swin-l").items()}
    torch.save(checkpoint("swin-l", state), tmp_path / "large.pth")
    model = load_model(f"simmim:swin-l@{tmp_path}/large.pth", Catalog())
    assert len(model.accounting.used) == len(state)


def test_sizes_that_windows_do_not_divide_are_refused_with_those_that_work():
    with pytest.raises(UsageError, match=r"windows of 6 x 6 tokens .* don't divide 224 x 224") as caught:
        load_model("simmim:swin-b@random", Catalog(), image_size=(224, 224))
    assert "`--image-size 192x192`" in caught.value.hint and "'simmim:swin-b:window=7'" in caught.value.hint
    with pytest.raises(UsageError, match="windows of 12 x 12") as caught:
        load_model("simmim:swin-l@random", Catalog(), image_size=(224, 300))
    assert "`--image-size 192x384`" in caught.value.hint and "window" not in caught.value.hint
    with pytest.raises(UsageError, match="can't have windows of 1 x 1"):
        load_model("simmim:swin-b:window=1@random", Catalog())


def small_file(tmp_path, windows: tuple[int, ...], rising: bool = False):
    """A Swin-B checkpoint of zeros, whose tables rise with the row offset where asked."""
    state = {key: torch.zeros(()).expand(shape).clone() for key, shape in shapes("swin-b", windows).items()}
    if rising:
        for key in [key for key in state if "bias_table" in key]:
            side = math.isqrt(len(state[key]))
            state[key] += torch.linspace(-1, 1, side).repeat_interleave(side)[:, None]
    torch.save(
        {"model": state | {"head.weight": torch.zeros(9, 1024), "head.bias": torch.zeros(9)}},
        tmp_path / "f.pth",
    )
    return tmp_path / "f.pth"


def test_windows_of_7_for_224_px(tmp_path):
    path = small_file(tmp_path, (6, 6, 6, 6), rising=True)
    model = load_model(f"simmim:swin-b:window=7@{path}", Catalog())
    assert model.preprocessing.size == (224, 224)
    assert "fine-tuned" in model.accounting.layout
    for stage in model.module.layers:
        table = stage.blocks[1].attn.relative_position_bias_table.detach().reshape(13, 13, -1)
        assert torch.allclose(table, table[:, :1].expand_as(table)), (
            "the columns' offsets took the rows' place"
        )
        along = table[:, 0, 0]
        assert bool((along.diff() > 0).all()) and [float(along[i]) for i in (0, 6, 12)] == pytest.approx(
            [-1, 0, 1], abs=1e-6
        )
    with torch.inference_mode():
        assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 1024)


def test_a_file_with_other_windows_is_not_resampled_unasked(tmp_path):
    path = small_file(tmp_path, (7, 7, 7, 7))
    with pytest.raises(
        WeightsError, match=r"f.pth' has windows of 7 x 7 tokens, and the model 6 x 6"
    ) as caught:
        load_model(f"simmim:swin-b@{path}", Catalog())
    assert "'simmim:swin-b:window=7@PATH'" in caught.value.hint
    model = load_model(f"simmim:swin-b:window=7@{path}", Catalog())
    assert model.accounting.ignored == ("head.weight", "head.bias")
