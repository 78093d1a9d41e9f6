"""MAE's published layouts with random weights, and the reference forward, in plain torch."""

from __future__ import annotations

import argparse
import importlib
import math
from types import SimpleNamespace

import torch
from probekit_mae.plugin import probekit_models

from probekit.names import parse_model, read_options

SIZES = {"vit-b16": (768, 12, 12, 16), "vit-l16": (1024, 24, 16, 16), "vit-h14": (1280, 32, 16, 14)}
FILES = {"vit-b16": "vit_base", "vit-l16": "vit_large", "vit-h14": "vit_huge"}


class Catalog:
    """The two calls `load_model` makes, over this pack's specs alone."""

    def model(self, ref):
        ref = parse_model(ref)
        spec = next(s for s in probekit_models() if s.variant == (ref.variant or "vit-b16"))
        options = read_options(spec.options, ref.options, spec.full_name)
        return SimpleNamespace(
            spec=spec, pack="mae", version="0", ref=ref, options=options, variant=spec.variant
        )

    def resolve_target(self, entry):
        module, _, attribute = entry.spec.target.partition(":")
        return getattr(importlib.import_module(module), attribute)


def block_shapes(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {
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


def shapes(variant: str) -> dict[str, tuple[int, ...]]:
    """METRICS.md part II, "Key shapes": the encoder, and what the decoder or fine-tuning adds."""
    size = variant.rpartition("-")[0] if variant.count("-") == 2 else variant
    width, depth, _, patch = SIZES[size]
    tokens = 1 + (224 // patch) ** 2
    found: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, tokens, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
    }
    for block in range(depth):
        found |= block_shapes(f"blocks.{block}", width)
    if variant.endswith("-ft"):
        head = {"head.weight": (1000, width), "head.bias": (1000,)}
        return found | {"fc_norm.weight": (width,), "fc_norm.bias": (width,)} | head
    found |= {"norm.weight": (width,), "norm.bias": (width,)}
    if not variant.endswith(("-full", "-visualize")):
        return found
    found |= {
        "mask_token": (1, 1, 512),
        "decoder_pos_embed": (1, tokens, 512),
        "decoder_embed.weight": (512, width),
        "decoder_embed.bias": (512,),
        "decoder_norm.weight": (512,),
        "decoder_norm.bias": (512,),
        "decoder_pred.weight": (patch * patch * 3, 512),
        "decoder_pred.bias": (patch * patch * 3,),
    }
    for block in range(8):
        found |= block_shapes(f"decoder_blocks.{block}", 512)
    return found


def random_state(variant: str, seed: int) -> dict[str, torch.Tensor]:
    """Random tensors, the position tables too: what the file has is what counts."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in shapes(variant).items():
        scale = 0.05 if ".qkv.weight" in key else 0.3 if "pos_embed" in key else 0.02
        if key.endswith(("attn.proj.weight", "mlp.fc2.weight")):
            scale = 0.01  # so that the residual stream doesn't grow until float32 shows
        state[key] = torch.randn(shape, generator=generator) * scale + ("norm" in key and "weight" in key)
    return state


def save(path, state, **more):
    """As the authors' util/misc.py writes a checkpoint."""
    content = {
        "model": state,
        "optimizer": {"state": {0: {"step": 9, "exp_avg": torch.zeros(4)}}, "param_groups": [{"lr": 1e-4}]},
        "epoch": 1599,
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(model="mae_vit_base_patch16", norm_pix_loss=True),
    }
    torch.save(content | more, path)
    return path


def reference(state: dict[str, torch.Tensor], images: torch.Tensor, visible: list[int] | None = None):
    """(layers, output) of ViT-B/16 in float64: per layer tokens before, between and after, and map.

    visible: numbers of the patches that the encoder sees, ascending
    """
    w = {key: value.double() for key, value in state.items()}
    count, width = images.shape[0], 768
    layers = []

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scale = torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)
        return centred / scale * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def block(x, name, heads):
        qkv = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv")
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        logits = torch.exp(logits - logits.amax(-1, keepdim=True))
        attention = logits / logits.sum(-1, keepdim=True)
        mid = x + linear((attention @ v).transpose(1, 2).flatten(2), f"{name}.attn.proj")
        hidden = linear(norm(mid, f"{name}.norm2"), f"{name}.mlp.fc1")
        out = mid + linear(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))), f"{name}.mlp.fc2")
        layers.append((x, mid, out, attention))
        return out

    patches = images.double().reshape(count, 3, 14, 16, 14, 16).permute(0, 2, 4, 1, 3, 5)
    patches = patches.reshape(count, 196, 768)
    x = patches @ w["patch_embed.proj.weight"].reshape(width, 768).T + w["patch_embed.proj.bias"]
    x = torch.cat([w["cls_token"].expand(count, 1, width), x], dim=1) + w["pos_embed"]
    seen = list(range(196)) if visible is None else visible
    x = x[:, [0, *(1 + n for n in seen)]]
    for number in range(12):
        x = block(x, f"blocks.{number}", 12)
    if "head.weight" in w:
        return layers, linear(norm(x[:, 1:].mean(1), "fc_norm"), "head")
    x = norm(x, "norm")
    if "decoder_embed.weight" not in w:
        return layers, x[:, 0]
    x = linear(x, "decoder_embed")
    tokens = w["mask_token"].expand(count, 197, 512).clone()
    tokens[:, 0] = x[:, 0]
    for place, number in enumerate(seen):
        tokens[:, 1 + number] = x[:, 1 + place]
    x = tokens + w["decoder_pos_embed"]
    for number in range(8):
        x = block(x, f"decoder_blocks.{number}", 16)
    return layers, linear(norm(x, "decoder_norm"), "decoder_pred")[:, 1:]
