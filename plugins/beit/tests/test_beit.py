"""The published layouts of BEiT rebuilt with random weights, against a reference forward in plain torch."""

from __future__ import annotations

import importlib
import math
from types import SimpleNamespace

import pytest
import torch
from probekit_beit.plugin import probekit_models

from probekit.errors import UsageError, WeightsError
from probekit.models.checkpoints import adopt
from probekit.models.model import load_model
from probekit.names import parse_model
from probekit.watch import Visitor, Watcher

SHAPES = {"b": (768, 12, 12), "l": (1024, 16, 24)}


class Catalog:
    """The two calls `load_model` makes, over this pack's specs alone."""

    def model(self, ref):
        ref = parse_model(ref)
        spec = next(s for s in probekit_models() if s.variant == ref.variant)
        return SimpleNamespace(spec=spec, pack="beit", version="0", ref=ref, options={}, variant=spec.variant)

    def resolve_target(self, entry):
        module, _, attribute = entry.spec.target.partition(":")
        return getattr(importlib.import_module(module), attribute)


def block_shapes(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.gamma_1": (width,),
        f"{name}.gamma_2": (width,),
        f"{name}.norm1.weight": (width,),
        f"{name}.norm1.bias": (width,),
        f"{name}.attn.q_bias": (width,),
        f"{name}.attn.v_bias": (width,),
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


def shapes(tuned: bool, width: int = 768, heads: int = 12, layers: int = 12) -> dict[str, tuple[int, ...]]:
    """Keys of the published files that are used (METRICS.md part II)."""
    found: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "patch_embed.proj.weight": (width, 3, 16, 16),
        "patch_embed.proj.bias": (width,),
    }
    last = "fc_norm" if tuned else "norm"
    found |= {f"{last}.weight": (width,), f"{last}.bias": (width,)}
    if tuned:
        found |= {"head.weight": (1000, width), "head.bias": (1000,)}
    else:
        found["rel_pos_bias.relative_position_bias_table"] = (732, heads)
    for block in range(layers):
        found |= block_shapes(f"blocks.{block}", width)
        if tuned:
            found[f"blocks.{block}.attn.relative_position_bias_table"] = (732, heads)
    return found


def relative_index() -> torch.Tensor:
    """Rows of the table for each pair of tokens: offsets row by row, CLS->token, token->CLS, CLS->CLS."""
    index = torch.empty(197, 197, dtype=torch.long)
    index[0, 1:], index[1:, 0], index[0, 0] = 729, 730, 731
    at = torch.arange(196)
    down = (at // 14)[:, None] - (at // 14)[None, :]
    right = (at % 14)[:, None] - (at % 14)[None, :]
    index[1:, 1:] = (down + 13) * 27 + right + 13
    return index


INDEX = relative_index()


def weights(seed: int, tuned: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in shapes(tuned).items():
        scale = 0.04 if ".qkv.weight" in key else 1.0 if "bias_table" in key else 0.02
        centre = 1.0 if "norm" in key and "weight" in key else 0.1 if "gamma" in key else 0.0
        state[key] = torch.randn(shape, generator=generator) * scale + centre
    return state


def published(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With what the file holds besides: the mask token, the head over visual words, the index buffers."""
    if "fc_norm.weight" in state:
        return state | {f"blocks.{i}.attn.relative_position_index": INDEX for i in range(12)}
    return state | {
        "mask_token": torch.zeros(1, 1, 768),
        "lm_head.weight": torch.zeros(8192, 768),
        "lm_head.bias": torch.zeros(8192),
        "rel_pos_bias.relative_position_index": INDEX,
    }


def reference(state: dict[str, torch.Tensor], images: torch.Tensor):
    """Tokens after each block, attention of each block, and the output, float64, from the file's tensors."""
    w = {key: value.double() for key, value in state.items()}
    count = len(images)

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scale = torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)
        return centred / scale * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    cut = images.double().reshape(count, 3, 14, 16, 14, 16).permute(0, 2, 4, 1, 3, 5)
    x = cut.reshape(count, 196, 768) @ w["patch_embed.proj.weight"].reshape(768, 768).T
    x = torch.cat([w["cls_token"].expand(count, 1, 768), x + w["patch_embed.proj.bias"]], dim=1)
    tokens, attention = [], []
    for block in range(12):
        name = f"blocks.{block}"
        own = w.get(f"{name}.attn.relative_position_bias_table")
        table = w["rel_pos_bias.relative_position_bias_table"] if own is None else own
        q, k, v = (norm(x, f"{name}.norm1") @ w[f"{name}.attn.qkv.weight"].T).split(768, dim=-1)
        q, v = q + w[f"{name}.attn.q_bias"], v + w[f"{name}.attn.v_bias"]
        q, k, v = (part.reshape(count, 197, 12, 64).transpose(1, 2) for part in (q, k, v))
        logits = q @ k.transpose(-1, -2) / 8 + table[INDEX].permute(2, 0, 1)
        logits = torch.exp(logits - logits.amax(-1, keepdim=True))
        probabilities = logits / logits.sum(-1, keepdim=True)
        mixed = linear((probabilities @ v).transpose(1, 2).reshape(x.shape), f"{name}.attn.proj")
        x = x + w[f"{name}.gamma_1"] * mixed
        hidden = linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + w[f"{name}.gamma_2"] * linear(hidden, f"{name}.mlp.fc2")
        tokens.append(x)
        attention.append(probabilities)
    if "fc_norm.weight" in w:
        return tokens, attention, linear(norm(x[:, 1:].mean(1), "fc_norm"), "head")
    return tokens, attention, norm(x, "norm")[:, 0]


@pytest.fixture(scope="module", params=["vit-b16", "vit-b16-ft"])
def checkpoint(request, tmp_path_factory):
    """(variant, weights, path)"""
    state = weights(1, request.param.endswith("-ft"))
    path = tmp_path_factory.mktemp(request.param) / "checkpoint.pth"
    torch.save({"model": published(state)}, path)
    yield request.param, state, path
    path.unlink()


def test_a_published_file_gives_the_reference(checkpoint):
    variant, state, path = checkpoint
    model = load_model(f"beit:{variant}@{path}", Catalog())
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(5))
    *expected, output = reference(state, images)
    tokens, attention = [], []

    def see(layer):
        tokens.append(torch.cat([layer.prefix_tokens("tokens_out"), layer.tokens_out], dim=1))
        attention.append(layer.attention_full)

    watcher = Watcher(model.module, images, forward=model.forward)
    out = watcher.run(images, [Visitor(frozenset({"tokens_out", "attention_full"}), see)])
    for want, have in zip(expected, (tokens, attention), strict=True):
        assert len(have) == 12
        for layer in range(12):
            assert have[layer].shape == want[layer].shape
            assert (have[layer] - want[layer]).abs().max() < 1e-5, f"block {layer}"
    assert (out - output).abs().max() < 1e-5
    assert expected[1][-1].amax(-1).mean() * 197 > 2, "the attention is uniform: it would show no difference"
    assert {(layer.heads, layer.prefix, layer.grid, layer.stride) for layer in watcher.anatomy.layers} == {
        (12, 1, (14, 14), (16, 16))
    }
    assert len(model.accounting.used) == len(state)
    assert len(model.accounting.ignored) == (12 if variant.endswith("-ft") else 4)
    assert {m.eps for m in model.module.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}
    assert model.preprocessing.mean == model.preprocessing.std == (0.5, 0.5, 0.5)


def test_pre_trained_and_fine_tuned_files_do_not_fit_each_other(checkpoint):
    variant, _, path = checkpoint
    other = "vit-b16" if variant.endswith("-ft") else "vit-b16-ft"
    with pytest.raises(WeightsError, match="doesn't fit the model as a BEiT") as caught:
        load_model(f"beit:{other}@{path}", Catalog())
    assert "fc_norm" in caught.value.hint


def test_another_size_interpolates_the_tables(checkpoint):
    variant, state, path = checkpoint
    model = load_model(f"beit:{variant}@{path}", Catalog(), image_size=(224, 112))
    key = ("blocks.3.attn" if variant.endswith("-ft") else "rel_pos_bias") + ".relative_position_bias_table"
    table, found = state[key], model.module.state_dict()[key]
    assert found.shape == (27 * 13 + 3, 12)
    assert torch.equal(found[-3:], table[-3:])
    middle = table[:729].reshape(27, 27, 12)[:, 7:20]  # fewer columns: the offsets that are left
    assert torch.allclose(found[:-3].reshape(27, 13, 12), middle)
    anatomy = Watcher(model.module, torch.zeros(2, 3, 224, 112)).anatomy
    assert (anatomy.layers[0].grid, anatomy.layers[0].stride) == ((14, 7), (16, 16))
    with pytest.raises(UsageError, match="16 x 16 px, which don't tile 230 x 224"):
        load_model(f"beit:{variant}@random", Catalog(), image_size=(230, 224))


def test_v2_leaves_the_class_tokens_extra_blocks_out(tmp_path):
    state = weights(2, tuned=False)
    extra = {}
    for block in (0, 1):
        extra |= {
            key: torch.zeros(shape) for key, shape in block_shapes(f"cls_pt_layers.{block}", 768).items()
        }
    content = {"model": published(state) | extra}
    torch.save(content, tmp_path / "beitv2_base_patch16_224_pt1k.pth")
    model = load_model(f"beit:v2-b16@{tmp_path}/beitv2_base_patch16_224_pt1k.pth", Catalog())
    assert all(torch.equal(value, state[key]) for key, value in model.module.state_dict().items())
    assert len(model.accounting.ignored) == 4 + 30
    assert model.preprocessing.mean == (0.485, 0.456, 0.406)
    with pytest.raises(WeightsError, match=r"30 unexpected \('cls_pt_layers.0.gamma_1'"):
        adopt(model.module, content, probekit_models()[0].weights.layout, source="v2")


@pytest.mark.parametrize("spec", probekit_models(), ids=lambda spec: spec.variant)
def test_every_variant_builds_and_says_what_it_is(spec):
    with torch.device("meta"):
        module = Catalog().resolve_target(SimpleNamespace(spec=spec))(spec.variant)
    width, heads, layers = SHAPES[spec.variant.split("-")[1][0]]
    expected = shapes(spec.variant.endswith("-ft"), width, heads, layers)
    assert {key: tuple(value.shape) for key, value in module.state_dict().items()} == expected
    assert (
        (spec.heads, spec.layers) == (heads, layers) == (module.blocks[0].attn.num_heads, len(module.blocks))
    )
    assert spec.objective == ("supervised" if spec.variant.endswith("-ft") else "MIM")
    assert spec.weights.licence == "MIT" and spec.citation
    assert spec.weights.url.endswith(f"/{spec.weights.filename}")
    assert spec.preprocessing.mean[0] == (0.485 if spec.variant.startswith("v2") else 0.5)
    assert (spec.preprocessing.interpolation, spec.preprocessing.crop_pct) == ("bicubic", 0.875)


def test_a_bare_name_is_one_variant():
    assert [spec.variant for spec in probekit_models() if spec.default] == ["vit-b16"]
