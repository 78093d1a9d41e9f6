"""MoCo v3's networks as timm Vision Transformers."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from probekit.models.sincos import sincos_positions
from probekit.models.timm import check_multiple

_PATCH = 16


class Shape(NamedTuple):
    """Channels, blocks and heads of a variant, and whether convolutions stand where patches are cut."""

    width: int
    depth: int
    heads: int
    stem: bool = False


SHAPES = {
    "vit-ti16": Shape(192, 12, 3),
    "vit-s16": Shape(384, 12, 12),  # heads of 32 channels, where timm and everybody else has 6 of 64
    "vit-b16": Shape(768, 12, 12),
    "vit-l16": Shape(1024, 24, 16),
    "conv-s": Shape(384, 11, 12, stem=True),  # the stem costs about what a block does: one fewer
    "conv-b": Shape(768, 11, 12, stem=True),
}


class ConvStem(nn.Module):
    """Four 3 x 3 convolutions of stride 2 in place of the patch projection (Xiao et al. 2021, fig. 2).

    From width / 8 channels the width doubles up to all of them, each convolution followed by batch
    norm and ReLU; a 1 x 1 convolution ends it. Images (B, 3, H, W) become tokens (B, H W / 256, width)
    in raster order, as timm's `PatchEmbed` gives them.
    """

    def __init__(
        self, img_size: tuple[int, int], patch_size: int, in_chans: int, embed_dim: int, **_: Any
    ) -> None:
        super().__init__()
        self.img_size, self.patch_size = img_size, (patch_size, patch_size)
        self.grid_size = (img_size[0] // patch_size, img_size[1] // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        widths = [in_chans, *(embed_dim >> shift for shift in (3, 2, 1, 0))]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [
                nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            ]
        self.proj = nn.Sequential(*layers, nn.Conv2d(embed_dim, embed_dim, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


def build(
    variant: str, *, encoder: str = "base", image_size: tuple[int, int] | None = None
) -> VisionTransformer:
    """A ViT with MoCo's heads, its initialisation, its fixed position embedding and perhaps its stem.

    variant:    a key of `SHAPES`
    encoder:    "base" or "momentum"; they are built alike and differ in the weights loaded
    image_size: (rows, columns), multiples of 16; 224 x 224 by default
    """
    rows, columns = image_size or (224, 224)
    check_multiple((rows, columns), (_PATCH, _PATCH), f"moco:{variant}")
    shape = SHAPES[variant]
    module = VisionTransformer(
        img_size=(rows, columns),
        patch_size=_PATCH,
        embed_dim=shape.width,
        depth=shape.depth,
        num_heads=shape.heads,
        num_classes=0,
        weight_init="moco",
        **({"embed_layer": ConvStem} if shape.stem else {}),
    )
    _initialise(module)
    return module


@torch.no_grad()
def _initialise(module: VisionTransformer) -> None:
    """What timm's "moco" leaves to do: the patch projection and the fixed position embedding.

    So that an untrained network is the one MoCo starts from (Chen et al. 2021, section 4 and
    appendix A). A stem keeps PyTorch's initialisation, as there.
    """
    projection = module.patch_embed.proj
    if isinstance(projection, nn.Conv2d):
        bound = math.sqrt(6 / (3 * _PATCH * _PATCH + module.embed_dim))
        nn.init.uniform_(projection.weight, -bound, bound)
        nn.init.zeros_(projection.bias)
    module.pos_embed.copy_(sincos_positions(module.patch_embed.grid_size, module.embed_dim))
    module.pos_embed.requires_grad = False
