"""A dataset of drawn 16-px images as a plugin, and settings of a network that trains on it in seconds."""

from __future__ import annotations

import numpy as np
from PIL import Image

from probekit import hookimpl
from probekit.datasets.dataset import Dataset
from probekit.specs import DatasetSpec

PROBEKIT_API = 1

SMALL = [
    *("--set", "model_args={patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}", "--set", "img_size=16"),
    *("--set", "batch_size=16", "--set", "warmup_epochs=0"),
]


class Pictures(Dataset):
    """Waves along one of two directions at one of two frequencies: four classes."""

    classes = ("a", "b", "c", "d")

    def __init__(self, count: int, seed: int, *, labelled: bool = True, train: Dataset | None = None) -> None:
        self.name = "tiny-pictures"
        self.ids = [f"{seed}-{number}" for number in range(count)]
        self.labels = [number % 4 for number in range(count)] if labelled else None
        self.seed = seed
        self.train = train

    def image(self, index: int) -> Image.Image:
        random = np.random.default_rng([self.seed, index])
        down, right = np.mgrid[:16, :16] / 16
        along = (down, right)[index % 2] * (1, 3)[index // 2 % 2]
        wave = np.sin(2 * np.pi * (along + random.random()))[..., None] * random.uniform(30, 100, 3)
        return Image.fromarray((128 + wave).clip(0, 255).astype(np.uint8))


def load(argument: str | None) -> Pictures:
    """``tiny-pictures:64``, ``tiny-pictures:64-unlabelled``"""
    count, _, kind = (argument or "64").partition("-")
    return Pictures(32, 1, labelled=not kind, train=Pictures(int(count), 0, labelled=not kind))


@hookimpl
def probekit_datasets() -> list[DatasetSpec]:
    return [DatasetSpec(name="tiny-pictures", summary="waves", target="tiny_pictures:load", argument="COUNT")]
