"""The miniatures' network: one small ViT for all methods, so that only what they learned differs."""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer

from probekit.models.sincos import sincos_positions
from probekit.models.timm import check_multiple

SIDE, PATCH, WIDTH, DEPTH, HEADS = 64, 8, 96, 12, 3


def build(variant: str, *, image_size: tuple[int, int] | None = None) -> VisionTransformer:
    """12 blocks of 3 heads, 96 wide, 8 x 8 tokens of 8 px and a class token; truncated normals of 0.02.

    image_size: (rows, columns), multiples of 8; 64 x 64 by default
    """
    size = image_size or (SIDE, SIDE)
    check_multiple(size, (PATCH, PATCH), f"the miniature '{variant}'")
    module = VisionTransformer(
        img_size=size, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=0
    )
    module.pos_embed.data.copy_(sincos_positions(module.patch_embed.grid_size, WIDTH))
    module.pos_embed.requires_grad = False
    return module
