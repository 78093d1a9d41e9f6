"""Random views of images: torchvision's and timm's augmentations as a recipe says."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import gaussian_blur, rand_augment_transform
from torchvision.transforms import v2

from probekit.errors import UsageError
from probekit_train.recipe import View

_GREY = (124, 116, 104)  # ImageNet's mean: what shifted images are filled with
_INTERPOLATION = {
    "bilinear": v2.InterpolationMode.BILINEAR,
    "bicubic": v2.InterpolationMode.BICUBIC,
}


def transform(view: View, size: int) -> Callable[[Image.Image], Image.Image]:
    """An RGB image to a random view of it, `size` x `size`; draws from torch, Python and numpy."""
    steps: list[Callable] = [
        v2.RandomResizedCrop(size, scale=view.scale, interpolation=_INTERPOLATION[view.interpolation])
    ]
    if view.flip:
        steps.append(v2.RandomHorizontalFlip(view.flip))
    if view.randaugment:
        steps.append(_randaugment(view, size))
    if any(view.jitter):
        steps.append(v2.RandomApply([v2.ColorJitter(*view.jitter)], view.jitter_chance))
    if view.grey:
        steps.append(v2.RandomGrayscale(view.grey))
    if view.blur:
        steps.append(v2.RandomApply([v2.Lambda(_Blur(*view.blur_radius))], view.blur))
    if view.solarise:
        steps.append(v2.RandomSolarize(128, view.solarise))
    return v2.Compose(steps)


class _Blur:
    """PIL's filter through timm, as in MoCo's own code: twenty times as fast as torchvision's.

    A class, because workers that are spawned get the transforms pickled.
    """

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def __call__(self, image: Image.Image) -> Image.Image:
        return gaussian_blur(image, torch.empty(1).uniform_(self.low, self.high).item())


def _randaugment(view: View, size: int) -> Callable:
    hints = {"translate_const": int(size * 0.45), "img_mean": _GREY}
    try:
        return rand_augment_transform(view.randaugment, hints)
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise UsageError(
            f"timm has no RandAugment '{view.randaugment}'", hint="write for example 'rand-m9-mstd0.5-inc1'"
        ) from error


def seed_everything(*numbers: int) -> None:
    """Make what augmentation, masks, dropout and mixing draw next a function of these numbers alone."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def views_of(
    image: Image.Image, transforms: Sequence[Callable[[Image.Image], Image.Image]]
) -> list[np.ndarray]:
    """One array (size, size, 3) uint8 a transform."""
    return [np.asarray(one(image)) for one in transforms]
