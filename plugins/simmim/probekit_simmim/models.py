"""SimMIM's networks: its ViT as timm's Beit, its Swin Transformers as timm's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from probekit import Model
from probekit.errors import UsageError, WeightsError
from probekit.models.timm import check_multiple, fit_grid
from probekit_simmim.plugin import SWIN_PREPROCESSING

_PATCH = 16


class Swin(NamedTuple):
    """A Swin's channels in its first stage, heads in each, and window side in tokens when pre-trained."""

    width: int
    heads: tuple[int, int, int, int]
    window: int


SWINS = {"swin-b": Swin(128, (4, 8, 16, 32), 6), "swin-l": Swin(192, (6, 12, 24, 48), 12)}
_SWIN_SIZE = 192  # the side in pixels of the images that both were pre-trained on


def build(variant: str, *, image_size: tuple[int, int] | None = None) -> Beit:
    """ViT-B/16 with relative-position biases, layer scale, and no bias on the keys.

    variant:    "vit-b16" as it was pre-trained, with one table of biases for all blocks and a norm at
                the end; "vit-b16-ft" as it was fine-tuned, with a table in each block, averaged patch
                tokens normed after that, and a classifier of 1000 classes
    image_size: (rows, columns), multiples of 16; 224 x 224 by default
    """
    rows, columns = image_size or (224, 224)
    check_multiple((rows, columns), (_PATCH, _PATCH), f"simmim:{variant}")
    tuned = variant == "vit-b16-ft"
    module = Beit(
        img_size=(rows, columns),
        patch_size=_PATCH,
        embed_dim=768,
        depth=12,
        num_heads=12,
        num_classes=1000 if tuned else 0,
        global_pool="avg" if tuned else "token",  # with which come `fc_norm` and `norm`
        init_values=0.1,
        use_abs_pos_emb=False,
        use_rel_pos_bias=tuned,
        use_shared_rel_pos_bias=not tuned,
    )
    _initialise(module, tuned)
    return module


def build_swin(
    variant: str, *, window: int | None = None, image_size: tuple[int, int] | None = None
) -> Model:
    """Swin-B or Swin-L; timm's initialisation is the authors'.

    window:     side of the attention windows in tokens; where it isn't the pre-training's, tables of
                relative positions are resampled, as the authors do before fine-tuning
    image_size: (rows, columns), which the windows must divide in every stage; by default as many
                windows as in pre-training, so 192 x 192 with the pre-training's window
    Raises UsageError for a size that windows don't divide.
    """
    shape = SWINS[variant]
    window = shape.window if window is None else window
    if window < 2:
        raise UsageError(f"'simmim:{variant}' can't have windows of {window} x {window} tokens")
    side = _SWIN_SIZE * window // shape.window
    size = image_size or (side, side)
    _check_windows(variant, size, window)
    module = SwinTransformer(
        img_size=size,
        patch_size=4,
        embed_dim=shape.width,
        depths=(2, 2, 18, 2),
        num_heads=shape.heads,
        window_size=window,
        num_classes=0,
        drop_path_rate=0.0,
    )
    module.windows = (window, shape.window)  # for `fit`
    return Model(module, preprocessing=SWIN_PREPROCESSING.model_copy(update={"size": tuple(size)}))


def fit(state: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The layouts' `convert`: relative-position tables at the module's grid or window. See `fit_grid`.

    Raises WeightsError for a SimMIM file of another kind than the module's, and for a Swin's whose
    windows are neither the module's nor those of pre-training: nobody asked for those to be resampled.
    """
    found, wanted = _kind_of(state), _kind_of(module.state_dict())
    if found and found != wanted:
        raise WeightsError(
            f"is a file of 'simmim:{found}', not of 'simmim:{wanted}'", hint=f"take 'simmim:{found}@PATH'"
        )
    if isinstance(module, SwinTransformer):
        table, (window, own) = state.get(_SWIN_TABLE), module.windows
        given = (math.isqrt(len(table)) + 1) // 2 if table is not None else window
        if given not in (window, own):
            raise WeightsError(
                f"has windows of {given} x {given} tokens, and the model {window} x {window}",
                hint=f"take 'simmim:{wanted}:window={given}@PATH'",
            )
    return fit_grid(state, module)


_SWIN_TABLE = "layers.0.blocks.0.attn.relative_position_bias_table"


def _kind_of(state: Mapping[str, Tensor]) -> str | None:
    """The variant whose keys these are; None where they are no SimMIM's."""
    names = {key.removeprefix("encoder."): key for key in state}
    if _SWIN_TABLE in names:
        width = state[names["patch_embed.proj.weight"]].shape[0] if "patch_embed.proj.weight" in names else 0
        return next((name for name, shape in SWINS.items() if shape.width == width), "swin-b")
    if "blocks.0.attn.relative_position_bias_table" in names:
        return "vit-b16-ft"
    return "vit-b16" if "rel_pos_bias.relative_position_bias_table" in names else None


def _check_windows(variant: str, size: tuple[int, int], window: int) -> None:
    """Raises UsageError where windows don't divide a stage's grid: timm would attend to padding there."""
    if all(_divides(length, window) for length in size):
        return
    fitting = [_nearest(length, window) for length in size]
    other = size[0] * SWINS[variant].window / _SWIN_SIZE
    wider = f", or other windows, 'simmim:{variant}:window={other:.0f}'" if _fits(size, other) else ""
    raise UsageError(
        f"'simmim:{variant}' has windows of {window} x {window} tokens of 4 px and four stages, which don't"
        f" divide {size[0]} x {size[1]}",
        hint=f"take `--image-size {fitting[0]}x{fitting[1]}`{wider}",
    )


def _nearest(length: int, window: int) -> int:
    fitting = [side for side in range(32, length + 64 * window, 32) if _divides(side, window)]
    return min(fitting, key=lambda side: abs(side - length))


def _fits(size: tuple[int, int], window: float) -> bool:
    return window >= 2 and window == int(window) and all(_divides(length, int(window)) for length in size)


def _divides(length: int, window: int) -> bool:
    """Whether windows divide all four stages' grids of `length` pixels, or cover them whole."""
    sides = [length // step for step in (4, 8, 16, 32)]
    return length >= 32 and length % 32 == 0 and all(n <= window or n % window == 0 for n in sides)


@torch.no_grad()
def _initialise(module: Beit, tuned: bool) -> None:
    """The authors' initialisation, from which timm's differs in the patch projection and in the tails.

    Normal with 0.02, in pre-training cut off there already; then each block's two outputs are divided
    by sqrt(2 l), l = 1 ... 12, and a classifier by 1000.
    """
    draw = partial(nn.init.normal_, std=0.02) if tuned else _normal_cut_off
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            draw(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    draw(module.cls_token)
    for number, block in enumerate(module.blocks, start=1):
        block.attn.proj.weight.div_(math.sqrt(2 * number))
        block.mlp.fc2.weight.div_(math.sqrt(2 * number))
    if tuned:
        module.head.weight.mul_(1e-3)


def _normal_cut_off(weight: Tensor, std: float = 0.02) -> None:
    """Normal values within one standard deviation. PyTorch's own draws again and again until all are."""
    inside = math.erf(math.sqrt(0.5))
    weight.uniform_(-inside, inside).erfinv_().mul_(std * math.sqrt(2)).clamp_(-std, std)
