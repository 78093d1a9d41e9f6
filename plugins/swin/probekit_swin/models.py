"""Swin's networks as timm's, at sizes their windows divide."""

from __future__ import annotations

from dataclasses import dataclass

from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2

from probekit.errors import UsageError
from probekit.models.timm import check_multiple

PATCH = 4
STAGES = 4
_SHAPES = {
    "tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "small": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "base": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "large": (192, (2, 2, 18, 2), (6, 12, 24, 48)),
}


@dataclass(frozen=True)
class Network:
    """What a variant's name says: ``base-384-22k``, ``v2-tiny-w16``."""

    width: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int
    size: int
    classes: int
    second: bool

    @classmethod
    def named(cls, variant: str) -> Network:
        second = variant.startswith("v2-")
        size, *rest = variant.removeprefix("v2-").split("-")
        window = 16 if "w16" in rest else 8 if second else 12 if "384" in rest else 7
        pixels = 256 if second else 384 if "384" in rest else 224
        return cls(*_SHAPES[size], window, pixels, 21841 if "22k" in rest else 1000, second)

    def stages(self, length: int) -> list[int]:
        """Tokens along an axis of `length` px at each stage."""
        return [length // (PATCH << stage) for stage in range(STAGES)]


def build(
    variant: str, *, padding: str = "refuse", image_size: tuple[int, int] | None = None
) -> SwinTransformer | SwinTransformerV2:
    """Swin with its classifier; LayerNorm's eps is 1e-5.

    padding:    "refuse" a size that needs any, or "drop": timm pads the windows at the right and the
                bottom, and the watcher leaves padded keys out of every map, with a warning
    image_size: (rows, columns); the network's own by default. Along an axis where a stage has no more
                tokens than the window, the window is the whole axis and isn't shifted.
    Swin V2 computes its position bias from coordinates relative to the window; they stay relative to the
    window the network was trained with, as its authors do (Liu et al. 2022, section 3.3).
    Raises UsageError for a size the windows don't divide, with the nearest that they do.
    """
    network = Network.named(variant)
    size = tuple(image_size or (network.size, network.size))
    if padding == "refuse":
        _check_windows(size, network.window, variant)
    check_multiple(size, (PATCH, PATCH), f"swin:{variant}")
    shape = {
        "img_size": size,
        "patch_size": PATCH,
        "embed_dim": network.width,
        "depths": network.depths,
        "num_heads": network.heads,
        "window_size": network.window,
        "num_classes": network.classes,
        "drop_path_rate": 0.0,
    }
    if not network.second:
        return SwinTransformer(**shape)
    trained = tuple(min(network.window, tokens) for tokens in network.stages(network.size))
    return SwinTransformerV2(**shape, pretrained_window_sizes=trained)


def _divides(length: int, window: int) -> bool:
    """Whether every stage's tokens along an axis halve evenly and make whole windows."""
    if length < PATCH << (STAGES - 1) or length % (PATCH << (STAGES - 1)):
        return False
    tokens = [length // (PATCH << stage) for stage in range(STAGES)]
    return all(count <= window or count % window == 0 for count in tokens)


def _check_windows(size: tuple[int, int], window: int, variant: str) -> None:
    if all(_divides(length, window) for length in size):
        return
    step = PATCH << (STAGES - 1)
    below = [next((n for n in range(length, 0, -1) if _divides(n, window)), 0) for length in size]
    # step * window always fits: its last stage is one window
    above = [
        next(n for n in range(length, length + step * window + 1) if _divides(n, window)) for length in size
    ]
    shown = [f"`--image-size {rows}x{columns}`" for rows, columns in (below, above) if rows and columns]
    raise UsageError(
        f"windows of {window} x {window} tokens don't divide the stages of 'swin:{variant}' at"
        f" {size[0]} x {size[1]} px",
        hint=f"take {' or '.join(dict.fromkeys(shown))}; 'swin:{variant}:padding=drop' pads the windows and"
        " leaves padded keys out",
    )
