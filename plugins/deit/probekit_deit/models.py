"""DeiT's networks as timm's, and AugReg's through timm's own weights."""

from __future__ import annotations

from pathlib import Path

from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

from probekit.models import timm
from probekit.models.model import Model, WeightsIdentity, settle, state_sha256

SHAPES = {"ti": (192, 3, 12), "s": (384, 6, 12), "b": (768, 12, 12), "l": (1024, 16, 24)}
"""Width, heads, layers."""

_AUGREG = {"ti": "tiny", "s": "small", "b": "base", "l": "large"}
_PATCH = 16


def size_of(variant: str) -> str:
    """``"s"`` of ``"vit-s16"``, ``"v3-s16-21k"``."""
    return variant.split("-")[1].removesuffix("16")


def build(variant: str, *, image_size: tuple[int, int] | None = None) -> VisionTransformer:
    """DeiT, distilled DeiT or DeiT III with its classifier of 1,000 classes; LayerNorm's eps is 1e-6.

    The distilled networks have a second prefix token and a second classifier; DeiT III has layer scale,
    and no position for its class token (Touvron et al. 2021, section 3; 2022, section 3).
    image_size: (rows, columns), multiples of 16; 224 x 224 by default
    """
    size = tuple(image_size or (224, 224))
    timm.check_multiple(size, (_PATCH, _PATCH), f"deit:{variant}")
    width, heads, layers = SHAPES[size_of(variant)]
    third = variant.startswith("v3-")
    network = VisionTransformerDistilled if variant.endswith("-distilled") else VisionTransformer
    return network(
        img_size=size,
        patch_size=_PATCH,
        embed_dim=width,
        depth=layers,
        num_heads=heads,
        num_classes=1000,
        init_values=1e-6 if third else None,
        no_embed_class=third,
    )


def build_augreg(variant: str, *, weights: str | Path, image_size: tuple[int, int] | None = None) -> Model:
    """AugReg's ViT, pre-trained on ImageNet-21k and fine-tuned on ImageNet-1k, as timm converted it.

    `weights` and `image_size` as in `probekit.models.timm.build`.
    """
    name = f"vit_{_AUGREG[size_of(variant)]}_patch{_PATCH}_224.augreg_in21k_ft_in1k"
    model = timm.build(name, weights=weights, image_size=image_size)
    if weights == "published":
        model.weights = WeightsIdentity("hub", f"timm/{name}", state_sha256(settle(model.module)))
    return model
