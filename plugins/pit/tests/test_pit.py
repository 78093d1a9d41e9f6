"""The published layout of PiT rebuilt with random weights, against a reference forward in plain torch."""

from __future__ import annotations

import importlib
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from probekit_pit.plugin import probekit_models

from probekit.errors import UsageError, WeightsError
from probekit.models.model import load_model
from probekit.names import parse_model
from probekit.watch import Visitor, Watcher

# patch, stride, channels of a head, layers and heads of each stage
NETWORKS = {
    "ti": (16, 8, 32, (2, 6, 4), (2, 4, 8)),
    "xs": (16, 8, 48, (2, 6, 4), (2, 4, 8)),
    "s": (16, 8, 48, (2, 6, 4), (3, 6, 12)),
    "b": (14, 7, 64, (3, 6, 4), (4, 8, 16)),
}


class Catalog:
    """The two calls `load_model` makes, over this pack's specs alone."""

    def model(self, ref):
        ref = parse_model(ref)
        spec = next(s for s in probekit_models() if s.variant == ref.variant)
        return SimpleNamespace(spec=spec, pack="pit", version="0", ref=ref, options={}, variant=spec.variant)

    def resolve_target(self, entry):
        module, _, attribute = entry.spec.target.partition(":")
        return getattr(importlib.import_module(module), attribute)


def shapes(variant: str) -> dict[str, tuple[int, ...]]:
    """Keys of a published file: stages in `transformers`, between them `pools`."""
    size, _, distilled = variant.partition("-")
    patch, stride, channels, layers, heads = NETWORKS[size]
    widths = [channels * count for count in heads]
    side = (224 - patch) // stride + 1
    found: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, widths[0], side, side),
        "cls_token": (1, 2 if distilled else 1, widths[0]),
        "patch_embed.conv.weight": (widths[0], 3, patch, patch),
        "patch_embed.conv.bias": (widths[0],),
        "norm.weight": (widths[2],),
        "norm.bias": (widths[2],),
        "head.weight": (1000, widths[2]),
        "head.bias": (1000,),
    }
    if distilled:
        found |= {"head_dist.weight": (1000, widths[2]), "head_dist.bias": (1000,)}
    for stage, (width, depth) in enumerate(zip(widths, layers, strict=True)):
        for block in range(depth):
            name = f"transformers.{stage}.blocks.{block}"
            found |= {
                f"{name}.norm1.weight": (width,),
                f"{name}.norm1.bias": (width,),
                f"{name}.attn.qkv.weight": (3 * width, width),
                f"{name}.attn.qkv.bias": (3 * width,),
                f"{name}.attn.proj.weight": (width, width),
                f"{name}.attn.proj.bias": (width,),
                f"{name}.norm2.weight": (width,),
                f"{name}.norm2.bias": (width,),
                f"{name}.mlp.fc1.weight": (4 * width, width),
                f"{name}.mlp.fc1.bias": (4 * width,),
                f"{name}.mlp.fc2.weight": (width, 4 * width),
                f"{name}.mlp.fc2.bias": (width,),
            }
        if stage < 2:
            found |= {
                f"pools.{stage}.conv.weight": (widths[stage + 1], 1, 3, 3),
                f"pools.{stage}.conv.bias": (widths[stage + 1],),
                f"pools.{stage}.fc.weight": (widths[stage + 1], width),
                f"pools.{stage}.fc.bias": (widths[stage + 1],),
            }
    return found


def weights(seed: int, variant: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in shapes(variant).items():
        wide = ".qkv.weight" in key or "pools" in key
        scale = 0.08 if wide else 0.2 if "token" in key or "pos" in key else 0.02
        centre = 1.0 if "norm" in key and "weight" in key else 0.0
        state[key] = torch.randn(shape, generator=generator) * scale + centre
    return state


def reference(state: dict[str, torch.Tensor], images: torch.Tensor, size: str):
    """Tokens after each block, attention of each block, and logits, float64, from the file's tensors."""
    w = {key: value.double() for key, value in state.items()}
    patch, stride, channels, layers, heads = NETWORKS[size]
    count = len(images)

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scale = torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)
        return centred / scale * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    kernel = w["patch_embed.conv.weight"].flatten(1)
    cut = F.unfold(images.double(), patch, stride=stride).transpose(1, 2)
    rows, columns = ((length - patch) // stride + 1 for length in images.shape[-2:])
    x = cut @ kernel.T + w["patch_embed.conv.bias"] + w["pos_embed"].flatten(2).transpose(1, 2)
    prefix = w["cls_token"].expand(count, -1, -1)
    number = prefix.shape[1]
    tokens, attention = [], []
    for stage in range(3):
        x = torch.cat([prefix, x], dim=1)
        for block in range(layers[stage]):
            name = f"transformers.{stage}.blocks.{block}"
            qkv = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv")
            q, k, v = qkv.reshape(count, -1, 3, heads[stage], channels).permute(2, 0, 3, 1, 4)
            logits = q @ k.transpose(-1, -2) / math.sqrt(channels)
            logits = torch.exp(logits - logits.amax(-1, keepdim=True))
            probabilities = logits / logits.sum(-1, keepdim=True)
            x = x + linear((probabilities @ v).transpose(1, 2).reshape(x.shape), f"{name}.attn.proj")
            hidden = linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
            x = x + linear(hidden, f"{name}.mlp.fc2")
            tokens.append(x)
            attention.append(probabilities)
        prefix, x = x[:, :number], x[:, number:]
        if stage < 2:  # every input channel makes as many output channels as the width grows by
            name = f"pools.{stage}"
            ratio = heads[stage + 1] // heads[stage]
            padded = F.pad(x.transpose(1, 2).unflatten(2, (rows, columns)), (1, 1, 1, 1))
            rows, columns = (rows + 1) // 2, (columns + 1) // 2
            x = w[f"{name}.conv.bias"][:, None, None].repeat(1, rows, columns)[None]
            for i in range(3):
                for j in range(3):
                    part = padded[:, :, i : i + 2 * rows - 1 : 2, j : j + 2 * columns - 1 : 2]
                    taps = w[f"{name}.conv.weight"][:, 0, i, j, None, None]
                    x = x + part.repeat_interleave(ratio, dim=1) * taps
            x = x.flatten(2).transpose(1, 2)
            prefix = linear(prefix, f"{name}.fc")
    final = norm(prefix, "norm")
    logits = linear(final[:, 0], "head")
    if number == 2:
        logits = (logits + linear(final[:, 1], "head_dist")) / 2
    return tokens, attention, logits


@pytest.mark.parametrize("variant", ["s", "ti-distilled"])
def test_a_published_file_gives_the_reference(tmp_path, variant):
    size, _, distilled = variant.partition("-")
    state = weights(1, variant)
    torch.save(state, tmp_path / "w.pth")
    model = load_model(f"pit:{variant}@{tmp_path}/w.pth", Catalog())
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(5))
    *expected, logits = reference(state, images, size)
    tokens, attention = [], []

    def see(layer):
        tokens.append(torch.cat([layer.prefix_tokens("tokens_out"), layer.tokens_out], dim=1))
        attention.append(layer.attention_full)

    watcher = Watcher(model.module, images, forward=model.forward)
    out = watcher.run(images, [Visitor(frozenset({"tokens_out", "attention_full"}), see)])
    for want, have in zip(expected, (tokens, attention), strict=True):
        assert len(have) == len(want) == 12
        for layer in range(12):
            assert have[layer].shape == want[layer].shape
            assert (have[layer] - want[layer]).abs().max() < 1e-5, f"block {layer}"
    assert (out - logits).abs().max() < 1e-5
    for layer in (1, 7, 11):
        maps = expected[1][layer]
        assert maps.amax(-1).mean() * maps.shape[-1] > 2, (
            "the attention is uniform: it would show no difference"
        )
    prefix, heads = (2 if distilled else 1), NETWORKS[size][4]
    facts = list(
        dict.fromkeys((i.heads, i.prefix, i.grid, i.stride, i.stage) for i in watcher.anatomy.layers)
    )
    assert facts == [
        (heads[0], prefix, (27, 27), (8, 8), 0),
        (heads[1], prefix, (14, 14), (16, 16), 1),
        (heads[2], prefix, (7, 7), (32, 32), 2),
    ]
    assert len(model.accounting.used) == len(state) and not model.accounting.ignored
    assert {m.eps for m in model.module.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}


def test_b_has_strides_of_its_own_and_other_sizes_true_grids():
    model = load_model("pit:b@random", Catalog())
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    anatomy = Watcher(model.module, images).anatomy
    facts = list(dict.fromkeys((i.heads, i.prefix, i.grid, i.stride) for i in anatomy.layers))
    assert facts == [(4, 1, (31, 31), (7, 7)), (8, 1, (16, 16), (14, 14)), (16, 1, (8, 8), (28, 28))]
    assert len(anatomy.layers) == 13
    model = load_model("pit:ti@random", Catalog(), image_size=(160, 240))
    anatomy = Watcher(model.module, images[..., :160, :].repeat(1, 1, 1, 2)[..., :240]).anatomy
    facts = list(dict.fromkeys((i.grid, i.stride) for i in anatomy.layers))
    assert facts == [((19, 29), (8, 8)), ((10, 15), (16, 16)), ((5, 8), (32, 32))]


def test_another_size_interpolates_the_positions(tmp_path):
    state = weights(2, "ti")
    ramp = torch.linspace(-1, 1, 27)[:, None].expand(27, 27)
    state["pos_embed"] = ramp.expand(1, 64, 27, 27).clone()
    torch.save(state, tmp_path / "w.pth")
    module = load_model(f"pit:ti@{tmp_path}/w.pth", Catalog(), image_size=(224, 336)).module
    assert module.pos_embed.shape == (1, 64, 27, 41)
    assert torch.allclose(module.pos_embed, ramp[:, :1].expand(1, 64, 27, 41), atol=1e-5)
    with pytest.raises(
        UsageError, match="patches of 16 px every 8 px, which don't end at the borders"
    ) as caught:
        load_model("pit:ti@random", Catalog(), image_size=(230, 224))
    assert caught.value.hint == "take `--image-size 232x224`"


def test_other_files_are_refused(tmp_path):
    torch.save(weights(3, "ti-distilled"), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"2 unexpected \('head_dist.weight'") as caught:
        load_model(f"pit:ti@{tmp_path}/w.pth", Catalog())
    assert "_distill_" in caught.value.hint
    state = weights(3, "ti")
    del state["pools.1.fc.bias"]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"1 missing \('transformers.2.pool.fc.bias' \(256\)\)"):
        load_model(f"pit:ti@{tmp_path}/w.pth", Catalog())


@pytest.mark.parametrize("spec", probekit_models(), ids=lambda spec: spec.variant)
def test_every_variant_builds_and_says_what_it_is(spec):
    with torch.device("meta"):
        module = Catalog().resolve_target(SimpleNamespace(spec=spec))(spec.variant)
    expected = {
        key.replace("pools.0", "transformers.1.pool").replace("pools.1", "transformers.2.pool"): shape
        for key, shape in shapes(spec.variant).items()
    }
    assert {key: tuple(value.shape) for key, value in module.state_dict().items()} == expected
    size = spec.variant.partition("-")[0]
    assert [stage.blocks[0].attn.num_heads for stage in module.transformers] == list(NETWORKS[size][4])
    assert spec.layers == sum(NETWORKS[size][3])
    assert spec.objective == "supervised" and spec.weights.licence == "Apache-2.0" and spec.citation
    assert spec.weights.url.endswith(f"/{spec.weights.filename}")
    assert ("_distill_" in spec.weights.filename) == spec.variant.endswith("-distilled")
    assert spec.weights.filename.split("_")[1] == size
    assert (spec.preprocessing.interpolation, spec.preprocessing.crop_pct) == ("bicubic", 0.875)
