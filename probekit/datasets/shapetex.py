"""``shapetex``: drawn images whose shape and texture are known and independent. No files, no downloads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from probekit.datasets.dataset import Dataset, combine
from probekit.datasets.shapetex_drawing import SHAPES, TEXTURES, draw, figure
from probekit.errors import UsageError

VERSION = 1
"""Changes when a pixel does."""

KINDS = ("independent", "paired", "cue-conflict")
CUES = ("shape", "texture")

# Each list of images has random numbers of its own, so that no two share a scene.
_STREAMS = {
    ("independent", "test"): 0,
    ("independent", "train"): 1,
    ("paired", "test"): 2,
    ("paired", "train"): 3,
    ("cue-conflict", "test"): 4,
}
_PAIRS = (1 << 40) - 1  # in place of an index: the numbers that decide shapes and textures


class ShapeTex(Dataset):
    """`images` drawings of one kind, and as `train` as many more as it says.

    independent:  shape and texture drawn independently; the train split likewise
    paired:       class k has shape k and texture k, so that either tells it; the train split likewise
    cue-conflict: shape and texture drawn so that they differ, with both as `cues`; the train split is paired

    shapes, textures: (images,) int64, of every kind
    classes: names of the shapes or of the textures, by `labels`; of the pairs where classes are pairs
    masks:   0 is the ground, k + 1 the shape k

    The image at an index is the same whatever the number of images, and the same scene at every size.
    Raises `UsageError` for sizes and counts that make no sense.
    """

    has_masks = True

    def __init__(
        self,
        kind: str = "independent",
        *,
        images: int = 2048,
        train: int = 50_000,
        size: int = 64,
        classes: int = 8,
        labels: str = "shape",
        seed: int = 0,
        split: str = "test",
    ):
        for name, value, low, high in (
            ("images", images, 1, 1 << 24),
            ("train", train, 0, 1 << 24),
            ("size", size, 8, 1024),
            ("classes", classes, 2, len(SHAPES)),
            ("seed", seed, 0, (1 << 64) - 1),
        ):
            if not low <= value <= high:
                raise UsageError(f"shapetex can't have {name}={value}", hint=f"it is {low} to {high}")
        if labels not in CUES:
            raise UsageError(f"shapetex can't have labels={labels}", hint=f"it is {' or '.join(CUES)}")
        self.size, self.seed = size, seed
        self.stream = _STREAMS[kind, split]
        self.name = "shapetex" if kind == "independent" else f"shapetex:{kind}"
        self.shapes, self.textures = _pairs(self._bits(_PAIRS).random_raw(images), kind, classes)
        self.labels = (self.shapes if labels == "shape" else self.textures).tolist()
        shapes, textures = list(SHAPES)[:classes], list(TEXTURES)[:classes]
        if kind == "independent":
            self.classes = shapes if labels == "shape" else textures
        else:
            self.classes = [f"{shape}-{texture}" for shape, texture in zip(shapes, textures, strict=True)]
        if kind == "cue-conflict":
            self.cues = {"shape": self.shapes.tolist(), "texture": self.textures.tolist()}
        self.ids = [f"{split}-{index:06d}" for index in range(images)]
        if split == "test" and train:
            again = {"size": size, "classes": classes, "labels": labels, "seed": seed, "split": "train"}
            self.train = ShapeTex("paired" if kind == "cue-conflict" else kind, images=train, **again)

    def image(self, index: int) -> Image.Image:
        shape, texture = int(self.shapes[index]), int(self.textures[index])
        return Image.fromarray(draw(self._bits(index), self.size, shape, texture))

    def mask(self, index: int) -> Image.Image:
        shape = int(self.shapes[index])
        return Image.fromarray(
            figure(self._bits(index), self.size, shape).view(np.uint8) * np.uint8(shape + 1)
        )

    def fingerprint(self, indices: Sequence[int]) -> str:
        """From what decides the pixels, without drawing them."""
        scene = f"shapetex {VERSION} {self.seed} {self.stream} {self.size}"
        contents = (f"{scene} {i} {self.shapes[i]} {self.textures[i]}".encode() for i in indices)
        return combine(self, indices, contents)

    def _bits(self, index: int) -> np.random.Philox:
        # Philox counts up from its key: any image's numbers are at hand. numpy keeps its raw stream as it is.
        return np.random.Philox(key=np.array([self.seed, self.stream << 40 | index], np.uint64))


def _pairs(raw: np.ndarray, kind: str, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Shape and texture numbers, (images,) int64, from one 64-bit random number each."""
    count = np.uint64(classes)
    shapes = (raw % count).astype(np.int64)
    rest = raw // count
    if kind == "independent":
        return shapes, (rest % count).astype(np.int64)
    if kind == "paired":
        return shapes, shapes
    return shapes, (shapes + 1 + (rest % (count - np.uint64(1))).astype(np.int64)) % classes


def load(argument: str | None, **options: str | int) -> ShapeTex:
    """The dataset ``shapetex[:KIND]``. Raises `UsageError` for a kind or option there is not."""
    kind = argument or "independent"
    if kind not in KINDS:
        raise UsageError(
            f"shapetex has no kind {kind!r}",
            hint=f"its kinds are {', '.join(KINDS)}; options follow a '?', as in 'shapetex?size=32'",
        )
    return ShapeTex(kind, **options)
