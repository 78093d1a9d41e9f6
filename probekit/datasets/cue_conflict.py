"""``cue-conflict:PATH`` and ``stylized:PATH``: photographs that show one thing with another's texture.

They are not the same. Cue-conflict images (Geirhos et al. 2019, ICLR, arXiv:1811.12231, section 2) are made
with Gatys' style transfer from a photograph of one category and the texture of another, and have both labels.
Stylized-ImageNet (ibid., section 3) is all of ImageNet, each image through AdaIN with a random painting: its
style is no class.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from probekit.datasets.folder import FolderDataset, find_folder, open_folder
from probekit.errors import DataError

# The ImageNet classes that count as each category, by their numbers in the order of their WordNet ids: the
# published assignment (rgeirhos/texture-vs-shape, code/helper/human_categories.py). 207 of the 1,000.
_IMAGENET = {
    "airplane": "404",
    "bear": "294-297",
    "bicycle": "444 671",
    "bird": "8 10-16 18-20 22-24 80-83 87-96 98-100 127-133 135-145",
    "boat": "472 554 625 814 914",
    "bottle": "440 720 737 898-899 901 907",
    "car": "436 511 817",
    "cat": "281-286",
    "chair": "423 559 765 857",
    "clock": "409 530 892",
    "dog": "152-191 193-203 205-226 228-241 243-250 252-257 259 261-263 265-268",
    "elephant": "385-386",
    "keyboard": "508 878",
    "knife": "499",
    "oven": "766",
    "truck": "555 569 656 675 717 734 864 867",
}
CATEGORIES = tuple(_IMAGENET)

# What CIFAR-10 and its kin call them.
_ALSO = {"automobile": "car", "ship": "boat", "plane": "airplane", "aeroplane": "airplane"}


def category(name: str) -> int | None:
    """The number of the category that a class of ImageNet or CIFAR-10 counts as, None where it is none.

    name: one of the 16, a WordNet id (``n02690373``), a class's name in words (``airliner``, or all of its
          names, as lists of classes have them: ``tench, Tinca tinca``), or one of CIFAR-10's
    """
    name = " ".join(name.casefold().replace("_", " ").split())
    name = _ALSO.get(name, name)
    return CATEGORIES.index(name) if name in CATEGORIES else _imagenet_names().get(name)


@cache
def _imagenet_names() -> dict[str, int]:
    """Category by WordNet id and by name in words; names that classes of two categories have are left out."""
    from timm.data import ImageNetInfo

    imagenet = ImageNetInfo()
    by_number = {k: number for number, text in enumerate(_IMAGENET.values()) for k in _numbers(text)}
    found: dict[str, int | None] = {}
    for k, wnid in enumerate(imagenet.label_names()):
        words = imagenet.index_to_description(k).casefold()
        for name in {wnid, words, *words.split(", ")}:
            here = by_number.get(k)
            found[name] = here if found.get(name, here) == here else None
    return {name: number for name, number in found.items() if number is not None}


def _numbers(text: str) -> list[int]:
    ranges = [part.partition("-") for part in text.split()]
    return [k for first, _, last in ranges for k in range(int(first), int(last or first) + 1)]


class CueConflict(FolderDataset):
    """Images ``SHAPE/SHAPE1-TEXTURE2.png`` in folders named by the 16 categories.

    labels: the shape's category
    cues:   ``shape`` and ``texture``, by the folder and by what follows the ``-`` in the name, digits dropped
    classes: the 16 categories, all of them, whichever folders there are

    keep_same: keep the images whose texture is of the shape's own category, on which the two can't be told
               apart (80 of the published 1,280; the published measure leaves them out)

    Raises `DataError` where a folder or a name is none of a category.
    """

    def __init__(self, root: Path, *, name: str | None = None, keep_same: bool = False):
        super().__init__(root, name=name)
        if self.labels is None:
            return
        for folder in self.classes:
            if folder not in CATEGORIES:
                raise DataError(
                    f"folder {folder!r} in {str(root)!r} is none of the 16 categories",
                    hint=f"cue-conflict images lie in folders named {', '.join(CATEGORIES)}",
                )
        shapes = [CATEGORIES.index(self.classes[label]) for label in self.labels]
        textures = [_texture(id) for id in self.ids]
        kept = [k for k in range(len(shapes)) if keep_same or shapes[k] != textures[k]]
        if same := len(shapes) - len(kept):
            self.notes = [
                *self.notes,
                f"left out {same} of {len(shapes)} images: shape and texture are the same",
            ]
        self.keep(kept)
        self.classes = list(CATEGORIES)
        self.labels = [shapes[k] for k in kept]
        self.cues = {"shape": self.labels, "texture": [textures[k] for k in kept]}

    def class_of(self, name: str) -> int | None:
        return category(name)


def _texture(id: str) -> int:
    stem = id.rpartition("/")[2].rpartition(".")[0]
    texture = stem.rpartition("-")[2].rstrip("0123456789")
    if "-" not in stem or texture not in CATEGORIES:
        raise DataError(
            f"the name of image {id!r} doesn't say its texture",
            hint="cue-conflict images are named like 'cat/cat7-elephant1.png': shape, then texture",
        )
    return CATEGORIES.index(texture)


class Stylized(FolderDataset):
    """ImageNet through AdaIN, in class folders: the labels are the shapes' classes."""

    def __init__(self, root: Path, *, name: str | None = None):
        super().__init__(root, name=name)
        if self.labels is not None:
            self.cues = {"shape": self.labels}
        self.notes = [*self.notes, "labels are of shapes; the styles are AdaIN's, of paintings, and no class"]


def load(argument: str, keep_same: bool = False) -> CueConflict:
    """The dataset ``cue-conflict:argument``. Raises `DataError` where that is no folder of such images."""
    found = CueConflict(
        find_folder("cue-conflict", argument), name=f"cue-conflict:{argument}", keep_same=keep_same
    )
    if found.labels is None or not len(found):
        raise DataError(
            f"folder {argument!r} holds no cue-conflict images",
            hint=f"they lie in folders named {', '.join(CATEGORIES)}",
        )
    return found


def load_stylized(argument: str) -> FolderDataset:
    """The dataset ``stylized:argument``. Raises `DataError` where that is no folder of class folders."""
    found = open_folder("stylized", argument, Stylized)
    if found.labels is None:
        raise DataError(
            f"folder {argument!r} has no class folders",
            hint="Stylized-ImageNet has one for each class: n01440764",
        )
    return found
