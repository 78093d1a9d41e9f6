"""MAE's networks: its encoder as a timm Vision Transformer, encoder and decoder as one module."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from probekit import Declared, Model
from probekit.errors import UsageError, WeightsError
from probekit.models import miniature
from probekit.models.sincos import sincos_positions
from probekit.models.timm import check_multiple, fit_grid
from probekit_mae.network import LAYER_NORM, Decoder, MaskedAutoencoder, Shape

SHAPES = {
    "vit-b16": Shape(768, 12, 12, 16),
    "vit-l16": Shape(1024, 24, 16, 16),
    "vit-h14": Shape(1280, 32, 16, 14),
}
_SIDE = 224


def build(variant: str, *, image_size: tuple[int, int] | None = None) -> VisionTransformer:
    """The encoder alone: as it was pre-trained, or with ``-ft`` as it was fine-tuned.

    variant:    a key of `SHAPES`, perhaps with ``-ft``: averaged patch tokens, normed after that, and a
                classifier of 1000 classes
    image_size: (rows, columns), multiples of the patch's side; 224 x 224 by default
    """
    size, shape = _size(variant, image_size)
    tuned = variant.endswith("-ft")
    module = VisionTransformer(
        img_size=size,
        patch_size=shape.patch,
        embed_dim=shape.width,
        depth=shape.depth,
        num_heads=shape.heads,
        num_classes=1000 if tuned else 0,
        global_pool="avg" if tuned else "token",
        norm_layer=LAYER_NORM,
        weight_init="skip",
    )
    _initialise(module)
    if tuned:
        nn.init.trunc_normal_(module.head.weight, std=2e-5)  # as the authors start fine-tuning
    return module


def build_full(
    variant: str, *, mask_ratio: float = 0.0, seed: int = 0, image_size: tuple[int, int] | None = None
) -> Model:
    """Encoder and decoder, declared as the two parts of one model.

    mask_ratio: share of patches hidden from the encoder; with 0 it sees them all, in the image's order
    seed:       which ones; the same of every image, because a model is watched by the places its
                tokens have, and so that an image's values don't depend on the batch it is in
    image_size: as in `build`
    """
    size, shape = _size(variant, image_size)
    count = (size[0] // shape.patch) * (size[1] // shape.patch)
    module = MaskedAutoencoder(size, shape, _visible(count, mask_ratio, seed))
    _initialise(module)
    return Model(module, declared=Declared(parts={"decoder_blocks": "decoder"}))


def build_miniature(
    variant: str, *, mask_ratio: float = 0.0, seed: int = 0, image_size: tuple[int, int] | None = None
) -> Model:
    """The miniature, with its decoder of two blocks. Arguments as of `build_full`."""
    size = image_size or (miniature.SIDE, miniature.SIDE)
    check_multiple(size, (miniature.PATCH, miniature.PATCH), f"mae:{variant}")
    shape = Shape(miniature.WIDTH, miniature.DEPTH, miniature.HEADS, miniature.PATCH)
    count = (size[0] // shape.patch) * (size[1] // shape.patch)
    module = MaskedAutoencoder(size, shape, _visible(count, mask_ratio, seed), Decoder(64, 2, 2))
    _initialise(module)
    return Model(module, declared=Declared(parts={"decoder_blocks": "decoder"}))


def fit(state: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The layouts' `convert`: both position tables at the module's grid. See `fit_grid`.

    Raises WeightsError for a MAE file of another kind than the module's, whose encoder is another too.
    """
    found, wanted = _kind_of(state), _kind_of(module.state_dict())
    if found is not None and found != wanted:
        width = state["cls_token"].shape[-1] if "cls_token" in state else 0
        size = next((name for name, shape in SHAPES.items() if shape.width == width), "vit-b16")
        raise WeightsError(
            f"is a MAE {_KINDS[found]}, not a MAE {_KINDS[wanted]}",
            hint=f"take 'mae:{size}{found}@PATH'; the authors trained the encoder of each kind of file anew",
        )
    state = fit_grid(state, module)
    table = state.get("decoder_pos_embed")
    if table is not None and isinstance(module, MaskedAutoencoder) and table.dim() == 3:
        grid = module.patch_embed.grid_size
        state["decoder_pos_embed"] = resample_abs_pos_embed(table.float(), new_size=grid)
    return state


_KINDS = {
    "": "encoder without a decoder",
    "-full": "autoencoder with its decoder",
    "-ft": "encoder fine-tuned as a classifier",
}


def _kind_of(state: Mapping[str, Tensor]) -> str | None:
    """The suffix of the variant whose keys these are; None where they are no MAE's."""
    if "cls_token" not in state or "blocks.0.attn.qkv.weight" not in state:
        return None
    if any(key.startswith("decoder_") for key in state):
        return "-full"
    return "-ft" if "fc_norm.weight" in state else ""


def _size(variant: str, image_size: tuple[int, int] | None) -> tuple[tuple[int, int], Shape]:
    shape = SHAPES[variant.removesuffix("-ft").removesuffix("-full").removesuffix("-visualize")]
    rows, columns = image_size or (_SIDE, _SIDE)
    check_multiple((rows, columns), (shape.patch, shape.patch), f"mae:{variant}")
    return (rows, columns), shape


def _visible(count: int, mask_ratio: float, seed: int) -> Tensor | None:
    """Which of `count` patches are seen, ascending; None where nothing is hidden. Raises UsageError."""
    kept = int(count * (1 - mask_ratio)) if 0 <= mask_ratio < 1 else 0
    if kept < 1:
        raise UsageError(
            f"a masking ratio can't be {mask_ratio:g}: of {count} patches the encoder has to see some",
            hint="it is at least 0 and below 1; MAE was trained at 0.75",
        )
    if kept == count:
        return None
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[:kept].sort().values


@torch.no_grad()
def _initialise(module: VisionTransformer | MaskedAutoencoder) -> None:
    """MAE's initialisation (He et al. 2022, appendix A.1): uniform after Glorot, fixed sines for positions.

    The patch projection counts as a linear layer and keeps PyTorch's bias.
    """
    nn.init.normal_(module.cls_token, std=0.02)
    nn.init.xavier_uniform_(module.patch_embed.proj.weight.flatten(1))
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)
    for name in ("pos_embed", "decoder_pos_embed"):
        table = getattr(module, name, None)
        if table is not None:
            grid = module.patch_embed.grid_size
            table.copy_(sincos_positions(grid, table.shape[-1], rows_first=False))
            table.requires_grad = False
    if isinstance(module, MaskedAutoencoder):
        nn.init.normal_(module.mask_token, std=0.02)
