"""DINO's and DINOv2's networks as timm Vision Transformers, and their files' position embeddings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from probekit.models.timm import check_multiple


@dataclass(frozen=True)
class _Network:
    width: int
    heads: int
    layers: int
    patch: int
    registers: int | None = None  # None: DINO, which has no layer scale


_NETWORKS = {
    "vit-s16": _Network(384, 6, 12, 16),
    "vit-s8": _Network(384, 6, 12, 8),
    "vit-b16": _Network(768, 12, 12, 16),
    "vit-b8": _Network(768, 12, 12, 8),
    **{
        f"v2-{size}14{'-reg' if registers else ''}": _Network(*shape, 14, registers)
        for size, shape in {"s": (384, 6, 12), "b": (768, 12, 12), "l": (1024, 16, 24)}.items()
        for registers in (0, 4)
    },
}


def build(
    variant: str, *, network: str = "teacher", image_size: tuple[int, int] | None = None
) -> VisionTransformer:
    """A Vision Transformer without a classifier; LayerNorm's eps is 1e-6.

    network:    "teacher" or "student"; they are built alike and differ in the weights loaded
    image_size: (rows, columns), multiples of the patch; 224 x 224 by default, at which the authors
                evaluate, for DINOv2 as well, whose file's position embedding is of 518 x 518
    """
    shape = _NETWORKS[variant]
    size = tuple(image_size or (224, 224))
    check_multiple(size, (shape.patch, shape.patch), f"dino:{variant}")
    return VisionTransformer(
        img_size=size,
        patch_size=shape.patch,
        embed_dim=shape.width,
        depth=shape.layers,
        num_heads=shape.heads,
        num_classes=0,
        init_values=None if shape.registers is None else 1e-5,
        reg_tokens=shape.registers or 0,
        # With registers timm adds positions to the patches alone: the class token's is folded into it.
        no_embed_class=bool(shape.registers),
    )


def fit(state: Mapping[str, Tensor], module: VisionTransformer) -> dict[str, Tensor]:
    """A layout's `convert`: the position embedding for the module's grid, the class token's part folded.

    DINOv2 adds `pos_embed` (1, 1 + N, C) to class token and patches, and puts the registers, which
    have no position, between them; timm's module with registers adds it to the patches only. So the
    first row goes into `cls_token`: the same sum, formed once (Darcet et al. 2024, section 2.2).
    """
    state = dict(state)
    positions = state.get("pos_embed")
    if positions is None or positions.dim() != 3:
        return state
    registers = module.reg_token is not None
    positions = resample(positions.float(), module.patch_embed.grid_size, antialias=registers)
    if registers and "cls_token" in state:
        state["cls_token"] = state["cls_token"].float() + positions[:, :1]
        positions = positions[:, 1:]
    state["pos_embed"] = positions
    return state


def resample(positions: Tensor, grid: tuple[int, int], *, antialias: bool) -> Tensor:
    """Positions (1, 1 + M * M, C) for another grid, (rows, columns), as the authors' code does it.

    Bicubic. DINO, and DINOv2 without registers: scale factors of (length + 0.1) / M and no
    antialiasing; DINOv2 with registers: by output size, antialiased (`interpolate_offset` and
    `interpolate_antialias` of its vision_transformer.py). timm's own function does neither. What isn't
    a square grid with a class token is left for the accounting to refuse.
    """
    side = math.isqrt(positions.shape[1] - 1)
    if side * side != positions.shape[1] - 1 or tuple(grid) == (side, side):
        return positions
    square = positions[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if antialias:
        patches = F.interpolate(square, size=tuple(grid), mode="bicubic", antialias=True)
    else:
        scale = tuple((length + 0.1) / side for length in grid)
        patches = F.interpolate(square, scale_factor=scale, mode="bicubic")
    return torch.cat([positions[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)
