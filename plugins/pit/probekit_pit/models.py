"""PiT's networks as timm's, and their files' position embeddings."""

from __future__ import annotations

from collections.abc import Mapping

from timm.layers import resample_abs_pos_embed
from timm.models.pit import PoolingVisionTransformer
from torch import Tensor

from probekit.errors import UsageError

NETWORKS = {
    "ti": (8, 32, (2, 6, 4), (2, 4, 8)),
    "xs": (8, 48, (2, 6, 4), (2, 4, 8)),
    "s": (8, 48, (2, 6, 4), (3, 6, 12)),
    "b": (7, 64, (3, 6, 4), (4, 8, 16)),
}
"""Stride of the patches in px, half their size; channels of a head; layers and heads of each stage."""


def build(variant: str, *, image_size: tuple[int, int] | None = None) -> PoolingVisionTransformer:
    """PiT with its classifier of 1,000 classes; LayerNorm's eps is 1e-6.

    Patches overlap by half, without padding: 27 x 27 tokens of 224 px at a stride of 8, 31 x 31 at 7
    (b). Pooling halves the grid, rounding up: 27, 14, 7 and 31, 16, 8 (Heo et al. 2021, section 3).
    The distilled networks have a second prefix token and a second classifier.
    image_size: (rows, columns), multiples of the stride; 224 x 224 by default
    """
    size, _, distilled = variant.partition("-")
    stride, channels, layers, heads = NETWORKS[size]
    pixels = tuple(image_size or (224, 224))
    if any(length % stride or length < 2 * stride for length in pixels):
        near = [max(round(length / stride), 2) * stride for length in pixels]
        raise UsageError(
            f"'pit:{variant}' has patches of {2 * stride} px every {stride} px, which don't end at the"
            f" borders of {pixels[0]} x {pixels[1]}",
            hint=f"take `--image-size {near[0]}x{near[1]}`",
        )
    return PoolingVisionTransformer(
        img_size=pixels,
        patch_size=2 * stride,
        stride=stride,
        base_dims=(channels,) * 3,
        depth=layers,
        heads=heads,
        num_classes=1000,
        distilled=bool(distilled),
    )


def fit(state: Mapping[str, Tensor], module: PoolingVisionTransformer) -> dict[str, Tensor]:
    """A layout's `convert`: the position embedding (1, C, rows, columns) resampled to the module's grid.

    Bicubic and antialiased, as timm does for other networks; the authors publish no other size.
    """
    state = dict(state)
    positions = state.get("pos_embed")
    grid = module.patch_embed.grid_size
    if positions is not None and positions.dim() == 4 and positions.shape[-2:] != tuple(grid):
        flat = positions.float().flatten(2).transpose(1, 2)
        old = list(positions.shape[-2:])
        flat = resample_abs_pos_embed(flat, new_size=list(grid), old_size=old, num_prefix_tokens=0)
        state["pos_embed"] = flat.transpose(1, 2).unflatten(2, tuple(grid))
    return state
