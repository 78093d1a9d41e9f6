"""The published layouts of DeiT rebuilt with random weights, against a reference forward in plain torch."""

from __future__ import annotations

import importlib
import math
from types import SimpleNamespace

import pytest
import timm
import torch
from probekit_deit.plugin import probekit_models
from safetensors.torch import save_file

from probekit.errors import UsageError, WeightsError
from probekit.models.model import load_model
from probekit.names import parse_model
from probekit.watch import Visitor, Watcher

SHAPES = {"ti": (192, 3, 12), "s": (384, 6, 12), "b": (768, 12, 12), "l": (1024, 16, 24)}


class Catalog:
    """The two calls `load_model` makes, over this pack's specs alone."""

    def model(self, ref):
        ref = parse_model(ref)
        spec = next(s for s in probekit_models() if (s.name, s.variant) == (ref.name, ref.variant))
        return SimpleNamespace(spec=spec, pack="deit", version="0", ref=ref, options={}, variant=spec.variant)

    def resolve_target(self, entry):
        module, _, attribute = entry.spec.target.partition(":")
        return getattr(importlib.import_module(module), attribute)


def shapes(width: int, kind: str, layers: int = 12) -> dict[str, tuple[int, ...]]:
    """Keys of a published file (METRICS.md part II). kind: "deit", "distilled" or "third"."""
    tokens = {"deit": 197, "distilled": 198, "third": 196}[kind]
    found: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, tokens, width),
        "patch_embed.proj.weight": (width, 3, 16, 16),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "head.weight": (1000, width),
        "head.bias": (1000,),
    }
    if kind == "distilled":
        found |= {"dist_token": (1, 1, width), "head_dist.weight": (1000, width), "head_dist.bias": (1000,)}
    for block in range(layers):
        name = f"blocks.{block}"
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
        if kind == "third":
            found |= {f"{name}.gamma_1": (width,), f"{name}.gamma_2": (width,)}
    return found


def weights(seed: int, width: int, kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in shapes(width, kind).items():
        scale = 0.06 if ".qkv.weight" in key else 0.2 if "token" in key or "pos" in key else 0.02
        centre = 1.0 if "norm" in key and "weight" in key else 0.5 if "gamma" in key else 0.0
        state[key] = torch.randn(shape, generator=generator) * scale + centre
    return state


def reference(state: dict[str, torch.Tensor], images: torch.Tensor, heads: int):
    """Tokens after each block, attention of each block, and logits, float64, from the file's tensors."""
    w = {key: value.double() for key, value in state.items()}
    width, count = w["cls_token"].shape[-1], len(images)
    size = width // heads

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scale = torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)
        return centred / scale * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    cut = images.double().reshape(count, 3, 14, 16, 14, 16).permute(0, 2, 4, 1, 3, 5)
    x = cut.reshape(count, 196, 768) @ w["patch_embed.proj.weight"].reshape(width, 768).T
    x = x + w["patch_embed.proj.bias"]
    prefix = [w[key].expand(count, 1, width) for key in ("cls_token", "dist_token") if key in w]
    if w["pos_embed"].shape[1] == 196:
        x = torch.cat([*prefix, x + w["pos_embed"]], dim=1)
    else:
        x = torch.cat([*prefix, x], dim=1) + w["pos_embed"]
    tokens, attention = [], []
    for block in range(12):
        name = f"blocks.{block}"
        qkv = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv")
        q, k, v = qkv.reshape(count, -1, 3, heads, size).permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(-1, -2) / math.sqrt(size)
        logits = torch.exp(logits - logits.amax(-1, keepdim=True))
        probabilities = logits / logits.sum(-1, keepdim=True)
        mixed = linear((probabilities @ v).transpose(1, 2).reshape(x.shape), f"{name}.attn.proj")
        x = x + mixed * w.get(f"{name}.gamma_1", 1.0)
        hidden = linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + linear(hidden, f"{name}.mlp.fc2") * w.get(f"{name}.gamma_2", 1.0)
        tokens.append(x)
        attention.append(probabilities)
    final = norm(x, "norm")
    logits = linear(final[:, 0], "head")
    if "dist_token" in w:
        logits = (logits + linear(final[:, 1], "head_dist")) / 2
    return tokens, attention, logits


@pytest.mark.parametrize(
    ("variant", "kind", "prefix"),
    [("vit-ti16", "deit", 1), ("vit-ti16-distilled", "distilled", 2), ("v3-s16", "third", 1)],
)
def test_a_published_file_gives_the_reference(tmp_path, variant, kind, prefix):
    width, heads, _ = SHAPES[variant.split("-")[1][:-2]]
    state = weights(1, width, kind)
    torch.save({"model": state}, tmp_path / "w.pth")
    model = load_model(f"deit:{variant}@{tmp_path}/w.pth", Catalog())
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(5))
    *expected, logits = reference(state, images, heads)
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
    assert (out - logits).abs().max() < 1e-5
    assert expected[1][-1].amax(-1).mean() * 196 > 2, "the attention is uniform: it would show no difference"
    assert {(layer.heads, layer.prefix, layer.grid, layer.stride) for layer in watcher.anatomy.layers} == {
        (heads, prefix, (14, 14), (16, 16))
    }
    assert len(model.accounting.used) == len(state) and not model.accounting.ignored
    assert {m.eps for m in model.module.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}


def test_another_size_interpolates_the_positions_and_keeps_the_prefix(tmp_path):
    for variant, kind, prefix in (("vit-ti16-distilled", "distilled", 2), ("v3-s16", "third", 0)):
        state = weights(2, SHAPES[variant.split("-")[1][:-2]][0], kind)
        torch.save(state, tmp_path / "w.pth")
        module = load_model(f"deit:{variant}@{tmp_path}/w.pth", Catalog(), image_size=(224, 448)).module
        assert module.pos_embed.shape[1] == prefix + 14 * 28
        assert torch.equal(module.pos_embed[:, :prefix], state["pos_embed"][:, :prefix])
    with pytest.raises(UsageError, match="16 x 16 px, which don't tile 230 x 224"):
        load_model("deit:vit-ti16@random", Catalog(), image_size=(230, 224))


def test_files_of_a_sibling_are_refused(tmp_path):
    plain, distilled = weights(3, 192, "deit"), weights(3, 192, "distilled")
    torch.save({"model": distilled}, tmp_path / "distilled.pth")
    torch.save({"model": plain}, tmp_path / "plain.pth")
    with pytest.raises(WeightsError, match=r"3 unexpected \('dist_token'") as caught:
        load_model(f"deit:vit-ti16@{tmp_path}/distilled.pth", Catalog())
    assert "-distilled" in caught.value.hint
    with pytest.raises(WeightsError, match=r"3 missing \('dist_token'"):
        load_model(f"deit:vit-ti16-distilled@{tmp_path}/plain.pth", Catalog())
    with pytest.raises(WeightsError, match=r"24 missing \('blocks.0.ls1.gamma'"):
        load_model(f"deit:v3-s16@{tmp_path}/plain.pth", Catalog())
    small = {**plain, "head.weight": torch.zeros(10, 192), "head.bias": torch.zeros(10)}
    torch.save({"model": small}, tmp_path / "small.pth")
    with pytest.raises(WeightsError, match=r"of another shape \('head.weight' \(10, 192\)") as caught:
        load_model(f"deit:vit-ti16@{tmp_path}/small.pth", Catalog())
    assert "timm:deit_" in caught.value.hint


def test_augreg_takes_timms_file_and_its_preprocessing(tmp_path):
    torch.manual_seed(0)
    theirs = timm.create_model("vit_tiny_patch16_224")
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    model = load_model(f"augreg:vit-ti16@{tmp_path}/model.safetensors", Catalog())
    assert torch.equal(model.module.blocks[5].mlp.fc1.weight, theirs.blocks[5].mlp.fc1.weight)
    assert model.preprocessing == next(s for s in probekit_models() if s.name == "augreg").preprocessing
    assert model.weights.kind == "file" and model.module.blocks[0].attn.num_heads == 3


def test_augreg_weights_come_from_timms_repository(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match=r"'timm/vit_small_patch16_224.augreg_in21k_ft_in1k'"):
        load_model("augreg:vit-s16", Catalog())


@pytest.mark.parametrize(
    "variant", [s.variant for s in probekit_models() if s.name == "deit" and s.weights.url]
)
def test_every_variant_builds_and_says_what_it_is(variant):
    spec = next(s for s in probekit_models() if (s.name, s.variant) == ("deit", variant))
    with torch.device("meta"):
        module = Catalog().resolve_target(SimpleNamespace(spec=spec))(variant)
    width, heads, layers = SHAPES[variant.split("-")[1][:-2]]
    assert (
        (spec.heads, spec.layers) == (heads, layers) == (module.blocks[0].attn.num_heads, len(module.blocks))
    )
    third = variant.startswith("v3")
    kind = "third" if third else "distilled" if variant.endswith("distilled") else "deit"
    expected = shapes(width, kind, layers)
    expected = {key.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma"): shape
                for key, shape in expected.items()}  # fmt: skip
    assert {key: tuple(value.shape) for key, value in module.state_dict().items()} == expected
    assert spec.objective == "supervised" and spec.citation and spec.weights.licence == "Apache-2.0"
    assert spec.weights.url.endswith(f"/deit/{spec.weights.filename}")
    assert spec.preprocessing.crop_pct == (1.0 if third else 0.875)
    assert spec.preprocessing.interpolation == "bicubic"


def test_one_variant_of_each_family_is_the_default():
    defaults = [spec.full_name for spec in probekit_models() if spec.default]
    assert defaults == ["deit:mini", "augreg:vit-b16"]
