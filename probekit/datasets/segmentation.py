"""``segmentation:PATH``: images and, for each, a picture of class numbers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash
from PIL import Image

from probekit.datasets.dataset import BadImage, Dataset, combine, decode_failure, formats, is_shortage
from probekit.datasets.folder import FolderDataset, find_folder
from probekit.errors import DataError

_NO_CLASS = 255
"""In the masks given out; what files of whole labels (Pascal VOC, Cityscapes) say too."""

_LOSSLESS = ("PNG", "BMP", "GIF", "TIFF", "PPM")
_FOLDERS = (("images", "annotations"), ("images", "masks"))
_TRAIN = ("training", "train")
_HELD_OUT = ("validation", "val", "test")
_NAMES = "objectInfo150.txt"  # of the scene parsing benchmark: a table with the names in its last column
_LAYOUTS = (
    "it holds images/ and masks/ (or ADE20K's images/ and annotations/) with files of the same names, "
    "each maybe with train/ and val/ in it"
)


class Segmentation(Dataset):
    """The images below one folder, with the masks of the same relative names, less the suffix, in another.

    A mask is a PNG (or another lossless picture) of the image's size, grey or with a palette; its numbers are
    classes, 255 none. In ADE20K's files 0 is none and the first class 1: `from_one` makes that 255 and 0.

    classes: names of the classes, or None
    Raises `DataError` where an image has no mask.
    """

    has_masks = True
    mask_ignore = _NO_CLASS

    def __init__(
        self,
        images: Path,
        masks: Path,
        *,
        name: str,
        from_one: bool = False,
        classes: Sequence[str] | None = None,
    ):
        self.name, self.from_one, self.classes = name, from_one, classes
        self._images, self._masks = (FolderDataset(root, name=name) for root in (images, masks))
        number = {_stem(id): k for k, id in enumerate(self._masks.ids)}
        self.ids = self._images.ids
        missing = [id for id in self.ids if _stem(id) not in number]
        if missing:
            some = f"{len(missing)} of {len(self.ids)}"
            raise DataError(
                f"{some} images in {str(images)!r} have no mask, {missing[0]!r} the first",
                hint=f"a mask has its image's name, and lies in {str(masks)!r}",
            )
        self._mask_of = [number[_stem(id)] for id in self.ids]
        self.notes = self._images.notes

    def image(self, index: int) -> Image.Image:
        return self._images.image(index)

    def mask(self, index: int) -> Image.Image:
        """Mode "L", 255 for no class. Raises `BadImage` for a damaged one and for other sizes and classes."""
        id = self.ids[index]
        try:
            with self._images.open(index) as file, Image.open(file, formats=formats()) as image:
                size = image.size
            with self._masks.open(self._mask_of[index]) as file, Image.open(file, formats=_LOSSLESS) as image:
                if image.size != size:
                    raise BadImage(id, f"its mask has {_by(image.size)} pixels, the image {_by(size)}")
                if image.mode not in ("L", "P", "1"):
                    raise BadImage(id, f"its mask has mode {image.mode!r}, not 8-bit class numbers")
                numbers = np.array(image).astype(np.uint8)
        except BadImage:
            raise
        except Exception as error:  # decoders raise nearly anything
            if is_shortage(error):
                raise
            raise BadImage(id, f"its mask: {decode_failure(error)}") from error
        if self.from_one:
            numbers = numbers - np.uint8(1)  # 0 becomes 255
        if self.classes is not None:
            most = int(numbers[numbers != _NO_CLASS].max(initial=0))
            if most >= len(self.classes):
                raise BadImage(id, f"its mask has class {most}, and there are {len(self.classes)}")
        return Image.fromarray(numbers)

    def fingerprint(self, indices: Sequence[int]) -> str:
        """Hash over the bytes of the images' and the masks' files."""
        contents = self._images.contents(indices), self._masks.contents([self._mask_of[i] for i in indices])
        both = (xxhash.xxh3_128_digest(image + mask) for image, mask in zip(*contents, strict=True))
        return combine(self, indices, both)


def load(argument: str, classes: int = 0) -> Segmentation:
    """The held-out images of ``segmentation:argument``, the others as `train`; all where there are no splits.

    classes: how many there are, where that is known; a mask with more is then a bad one
    Raises `DataError` where no such folder or layout is there.
    """
    root = find_folder("segmentation", argument)
    found = next((pair for pair in _FOLDERS if all((root / part).is_dir() for part in pair)), None)
    if found is None:
        raise DataError(f"folder {argument!r} holds no images with masks", hint=_LAYOUTS)
    images, masks = (root / part for part in found)
    from_one = found[1] == "annotations"
    names = _names(root, from_one) if not classes else [str(number) for number in range(classes)]

    def split(folder: str, name: str) -> Segmentation:
        for part in (images, masks):
            if not (part / folder).is_dir():
                raise DataError(f"there is no folder {str(part / folder)!r}", hint=_LAYOUTS)
        return Segmentation(images / folder, masks / folder, name=name, from_one=from_one, classes=names)

    name = f"segmentation:{argument}"
    train, held_out = (
        next((folder for folder in folders if (images / folder).is_dir()), None)
        for folders in (_TRAIN, _HELD_OUT)
    )
    data = split(held_out or train or "", name)
    if not len(data):
        raise DataError(f"folder {argument!r} holds no images with masks", hint=_LAYOUTS)
    if held_out and train:
        data.train = split(train, f"{name}/{train}")
    return data


def _names(root: Path, from_one: bool) -> list[str] | None:
    """Of ADE20K's classes: the first of each one's names in the table, their numbers where there is none."""
    if not from_one:
        return None
    try:
        lines = (root / _NAMES).read_text("utf-8").splitlines()[1:]
        names = [line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip()]
    except (OSError, UnicodeDecodeError):
        names = []
    return names or [str(number) for number in range(1, 151)]


def _stem(id: str) -> str:
    return os.path.splitext(id)[0]


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
