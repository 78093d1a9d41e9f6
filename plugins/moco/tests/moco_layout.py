"""MoCo v3's published layout with random weights, and the reference forward, in plain torch."""

from __future__ import annotations

import argparse
import importlib
import itertools
import math
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from probekit_moco.plugin import probekit_models

from probekit.names import parse_model


class Shape(NamedTuple):
    width: int
    depth: int
    heads: int
    stem: bool


SHAPES = {
    "vit-ti16": Shape(192, 12, 3, False),
    "vit-s16": Shape(384, 12, 12, False),
    "vit-b16": Shape(768, 12, 12, False),
    "vit-l16": Shape(1024, 24, 16, False),
    "conv-s": Shape(384, 11, 12, True),
    "conv-b": Shape(768, 11, 12, True),
}


class Catalog:
    """The two calls `load_model` makes, over this pack's specs alone."""

    def model(self, ref):
        ref = parse_model(ref)
        spec = next(s for s in probekit_models() if s.variant == (ref.variant or "vit-b16"))
        options = {key: option.default for key, option in spec.options.items()} | ref.options
        return SimpleNamespace(
            spec=spec, pack="moco", version="0", ref=ref, options=options, variant=spec.variant
        )

    def resolve_target(self, entry):
        module, _, attribute = entry.spec.target.partition(":")
        return getattr(importlib.import_module(module), attribute)


def encoder_shapes(variant: str) -> dict[str, tuple[int, ...]]:
    """METRICS.md part II, "Key shapes", and the table's row on conv-S/B: cls_token to norm."""
    width, depth, _, stem = SHAPES[variant]
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 197, width),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    if stem:
        for index, (before, after) in enumerate(
            ((3, width // 8), (width // 8, width // 4), (width // 4, width // 2), (width // 2, width))
        ):
            shapes[f"patch_embed.proj.{3 * index}.weight"] = (after, before, 3, 3)
            for name in ("weight", "bias", "running_mean", "running_var"):
                shapes[f"patch_embed.proj.{3 * index + 1}.{name}"] = (after,)
            shapes[f"patch_embed.proj.{3 * index + 1}.num_batches_tracked"] = ()
        shapes |= {"patch_embed.proj.12.weight": (width, width, 1, 1), "patch_embed.proj.12.bias": (width,)}
    else:
        shapes |= {"patch_embed.proj.weight": (width, 3, 16, 16), "patch_embed.proj.bias": (width,)}
    for block in range(depth):
        shapes |= {
            f"blocks.{block}.norm1.weight": (width,),
            f"blocks.{block}.norm1.bias": (width,),
            f"blocks.{block}.attn.qkv.weight": (3 * width, width),
            f"blocks.{block}.attn.qkv.bias": (3 * width,),
            f"blocks.{block}.attn.proj.weight": (width, width),
            f"blocks.{block}.attn.proj.bias": (width,),
            f"blocks.{block}.norm2.weight": (width,),
            f"blocks.{block}.norm2.bias": (width,),
            f"blocks.{block}.mlp.fc1.weight": (4 * width, width),
            f"blocks.{block}.mlp.fc1.bias": (4 * width,),
            f"blocks.{block}.mlp.fc2.weight": (width, 4 * width),
            f"blocks.{block}.mlp.fc2.bias": (width,),
        }
    return shapes


def moco_positions(width: int) -> torch.Tensor:
    """Fixed sines and cosines, the row's half of the channels first, zeros for the class token."""
    table = torch.zeros(1, 197, width)
    quarter = width // 4
    for row in range(14):
        for column in range(14):
            for i in range(quarter):
                speed = 10000 ** (-i / quarter)
                table[0, 1 + 14 * row + column, i] = math.sin(row * speed)
                table[0, 1 + 14 * row + column, quarter + i] = math.cos(row * speed)
                table[0, 1 + 14 * row + column, 2 * quarter + i] = math.sin(column * speed)
                table[0, 1 + 14 * row + column, 3 * quarter + i] = math.cos(column * speed)
    return table


POSITIONS = {width: moco_positions(width) for width in (192, 384, 768)}


def encoder(variant: str, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in encoder_shapes(variant).items():
        one = key.endswith(".weight") and len(shape) == 1  # a norm's scale
        scale = 0.05 if ".qkv.weight" in key else 0.02
        if key.startswith("patch_embed.proj.") and len(shape) == 4:  # the stem: neither growing nor fading
            scale = math.prod(shape[1:]) ** -0.5
        state[key] = torch.randn(shape, generator=generator) * scale + one
        if key.endswith("running_var"):
            state[key] = 0.5 + torch.rand(shape, generator=generator)
        elif key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(7)
    state["pos_embed"] = POSITIONS[SHAPES[variant].width].clone()
    return state


def mlp(sizes: list[int]) -> dict[str, torch.Tensor]:
    """A projector or predictor: Linear without bias, BatchNorm, ReLU, ...; thin, since nothing reads it."""
    state = {}
    for layer, (before, after) in enumerate(itertools.pairwise(sizes)):
        state[f"{3 * layer}.weight"] = torch.zeros(after, before)
        for name in ("weight", "bias", "running_mean", "running_var"):
            state[f"{3 * layer + 1}.{name}"] = torch.ones(after)
        state[f"{3 * layer + 1}.num_batches_tracked"] = torch.tensor(7)
    return state


def checkpoint(base: dict, momentum: dict) -> dict:
    state = {}
    for name, weights in (("base", base), ("momentum", momentum)):
        state |= {f"module.{name}_encoder.{key}": value for key, value in weights.items()}
        state |= {f"module.{name}_encoder.head.{key}": value for key, value in mlp([384, 16, 16, 4]).items()}
    state |= {f"module.predictor.{key}": value for key, value in mlp([4, 16, 4]).items()}
    return {
        "epoch": 300,
        "arch": "vit_base",
        "state_dict": state,
        "optimizer": {
            "state": {0: {"step": 3, "exp_avg": torch.zeros(4)}},
            "param_groups": [{"lr": 1e-4, "params": [0]}],
        },
        "scaler": {"scale": 65536.0, "growth_factor": 2.0},
        "args": argparse.Namespace(arch="vit_base", moco_m=0.99),
    }


def embedded(w: dict[str, torch.Tensor], images: torch.Tensor, width: int) -> torch.Tensor:
    """Tokens (B, 196, width) of images, before class token and positions."""
    count = images.shape[0]
    if "patch_embed.proj.bias" in w:
        patches = images.reshape(count, 3, 14, 16, 14, 16).permute(0, 2, 4, 1, 3, 5).reshape(count, 196, 768)
        return patches @ w["patch_embed.proj.weight"].reshape(width, 768).T + w["patch_embed.proj.bias"]
    x = images
    for index in (0, 3, 6, 9):
        padded = F.pad(x, (1, 1, 1, 1))
        columns = F.unfold(padded, 3, stride=2)  # (B, channels * 9, places)
        kernel = w[f"patch_embed.proj.{index}.weight"].flatten(1)
        side = x.shape[-1] // 2
        x = (kernel @ columns).unflatten(-1, (side, side))
        norm = f"patch_embed.proj.{index + 1}"
        mean, var, scale, shift = (
            w[f"{norm}.{name}"].view(-1, 1, 1) for name in ("running_mean", "running_var", "weight", "bias")
        )
        x = ((x - mean) / torch.sqrt(var + 1e-5) * scale + shift).clamp(min=0)
    x = x.flatten(2).transpose(1, 2)
    return x @ w["patch_embed.proj.12.weight"].flatten(1).T + w["patch_embed.proj.12.bias"]


def reference(variant: str, state: dict[str, torch.Tensor], images: torch.Tensor):
    """Tokens after each attention and each MLP, and attention, of every block; float64, from the file."""
    w = {key: value.double() for key, value in state.items()}
    width, depth, heads, _ = SHAPES[variant]
    count, size = images.shape[0], width // heads

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scale = torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)
        return centred / scale * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = embedded(w, images.double(), width)
    x = torch.cat([w["cls_token"].expand(count, 1, width), x], dim=1) + w["pos_embed"]
    found = []
    for block in range(depth):
        name = f"blocks.{block}"
        qkv = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv")
        q, k, v = qkv.reshape(count, 197, 3, heads, size).permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(-1, -2) / math.sqrt(size)
        logits = torch.exp(logits - logits.amax(-1, keepdim=True))
        probabilities = logits / logits.sum(-1, keepdim=True)
        mixed = (probabilities @ v).transpose(1, 2).reshape(count, 197, width)
        mid = x + linear(mixed, f"{name}.attn.proj")
        hidden = linear(norm(mid, f"{name}.norm2"), f"{name}.mlp.fc1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = mid + linear(hidden, f"{name}.mlp.fc2")
        found.append((mid, x, probabilities))
    return found
