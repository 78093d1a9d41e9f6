"""MoCo v3's networks as timm Vision Transformers."""

from __future__ import annotations

import math

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from probekit.models.timm import check_multiple
from probekit.sincos import sincos_positions

_WIDTHS = {"vit-s16": 384, "vit-b16": 768}
_PATCH = 16


def build(
    variant: str, *, encoder: str = "base", image_size: tuple[int, int] | None = None
) -> VisionTransformer:
    """ViT-S/16 or ViT-B/16 with MoCo's 12 heads, its initialisation and its fixed position embedding.

    encoder:    "base" or "momentum"; they are built alike and differ in the weights loaded
    image_size: (rows, columns), multiples of 16; 224 x 224 by default
    """
    rows, columns = image_size or (224, 224)
    check_multiple((rows, columns), (_PATCH, _PATCH), f"moco:{variant}")
    module = VisionTransformer(
        img_size=(rows, columns),
        patch_size=_PATCH,
        embed_dim=_WIDTHS[variant],
        depth=12,
        num_heads=12,  # of ViT-S as well, where timm and everybody else has 6
        num_classes=0,
        weight_init="moco",
    )
    _initialise(module)
    return module


@torch.no_grad()
def _initialise(module: VisionTransformer) -> None:
    """What timm's "moco" leaves to do: the patch projection and the fixed position embedding.

    So that an untrained network is the one MoCo starts from (Chen et al. 2021, section 4 and
    appendix A).
    """
    projection = module.patch_embed.proj
    bound = math.sqrt(6 / (3 * _PATCH * _PATCH + module.embed_dim))
    nn.init.uniform_(projection.weight, -bound, bound)
    nn.init.zeros_(projection.bias)
    module.pos_embed.copy_(sincos_positions(module.patch_embed.grid_size, module.embed_dim))
    module.pos_embed.requires_grad = False
