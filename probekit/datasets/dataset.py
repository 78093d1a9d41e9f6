"""What a dataset is: ordered images with ids, maybe labels, and a fingerprint. Subclass `Dataset`."""

from __future__ import annotations

import contextlib
import errno
import operator
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
import xxhash
from PIL import Image, ImageFile, UnidentifiedImageError

from probekit.errors import DataError, PluginError, ProbekitError, UsageError

# Containers Pillow only stubs, or hands to another program: not something to probe a network with.
BLOCKED_FORMATS = frozenset({"EPS", "WMF", "MPEG", "HDF5", "GRIB", "BUFR"})

# What `Dataset.image` may raise for one bad image. Anything else is a fault of the dataset's own code.
UNREADABLE = (DataError, OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


_APART = "a probe is trained on other images than it is scored on"


class BadImage(DataError):
    """One image of a dataset can't be used; the others can. `reason` is the cause alone."""

    def __init__(self, id: str, reason: str, *, hint: str | None = None):
        super().__init__(f"image {id!r} can't be used: {reason}", hint=hint)
        self.id = id
        self.reason = reason

    def __reduce__(self):
        return _rebuild_bad_image, (self.id, self.reason, self.hint)


def _rebuild_bad_image(id: str, reason: str, hint: str | None) -> BadImage:
    return BadImage(id, reason, hint=hint)


class Dataset:
    """Ordered images. A subclass gives `name`, `ids` and `image`; the rest has defaults.

    Complete, in eight lines::

        class Greys(Dataset):
            name = "greys"
            ids = [f"grey-{value}" for value in range(0, 256, 32)]
            labels = [int(value >= 128) for value in range(0, 256, 32)]
            classes = ["dark", "light"]

            def image(self, index):
                return Image.new("RGB", (64, 64), (32 * index,) * 3)

    With several workers `image` is called in forked (or, off Linux, unpickled) copies of the object:
    open archives and HDF5 files inside `image`, once a process, not in ``__init__``.
    """

    name: str
    ids: Sequence[str]
    """One name an image, unique, stable between machines (no absolute paths)."""
    labels: Sequence[int] | None = None
    """One class number an image, or None."""
    classes: Sequence[str] | None = None
    """Names of the class numbers, or None."""
    notes: Sequence[str] = ()
    """What a reader should know about how the images were found; shown before a run and in the report."""
    train: Dataset | None = None
    """Images to fit a probe on, none of them among `ids`; where there are none, a run may bring others."""
    cues: Mapping[str, Sequence[int]] = {}
    """Class numbers by cue, one an image, for images that show two things at once:
    ``{"shape": [...], "texture": [...]}``. The numbers are those of `classes`."""
    has_masks: bool = False
    """Whether `mask` gives every image's class map."""
    mask_ignore: int | None = None
    """The number in a mask that stands for no class, if any. Negative numbers never do."""

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, index: int) -> Image.Image:
        """The image at `index`, in any mode (it goes through `to_rgb` afterwards).

        Raises `DataError` (better: `BadImage`) for an image that can't be read.
        """
        raise NotImplementedError(f"{type(self).__name__}.image")

    def class_of(self, name: str) -> int | None:
        """The own class number that another dataset's class `name` means, None where there is none.

        By it a probe trained on one dataset is scored on another: probabilities of classes that mean the
        same are averaged. Default: the class of the same name, capitals apart.
        """
        wanted = name.casefold()
        names = [own.casefold() for own in self.classes or ()]
        return names.index(wanted) if wanted in names else None

    def mask(self, index: int) -> Image.Image:
        """A class number for each pixel of ``image(index)``: same size, one channel ("L", "P", "I").

        Only where `has_masks`. Raises `DataError` (better: `BadImage`) for one that can't be read.
        """
        raise NotImplementedError(f"{type(self).__name__}.mask")

    def fingerprint(self, indices: Sequence[int]) -> str:
        """32 hex digits that change when a listed image's id, label or pixels do, or their order.

        This default decodes every listed image; override it where hashing files is cheaper. An image
        that can't be read counts as such, so that repairing it changes the fingerprint.
        """
        return combine(self, indices, (self._pixels(index) for index in indices))

    def _pixels(self, index: int) -> bytes:
        try:
            image = image_of(self, index)
            if "P" in image.mode:  # the same indices with another palette are another image
                image = image.convert("RGBA")
            digest = xxhash.xxh3_128(f"{image.mode} {image.size}".encode())
            digest.update(image.tobytes())
        except (MemoryError, *UNREADABLE) as error:
            if is_shortage(error):
                raise fault(self, index, error) from error
            return b"unreadable"
        return digest.digest()

    def check(self) -> None:
        """Raise `PluginError` where the parts contradict each other; the engine calls it once."""
        name = getattr(self, "name", None)
        if not isinstance(name, str) or not name:
            raise PluginError(f"dataset class {type(self).__name__!r} has no 'name'")
        if getattr(self, "ids", None) is None:
            raise PluginError(f"dataset {name!r} has no 'ids'")
        ids = self._texts("ids", self.ids)
        if len(self) != len(ids):
            raise PluginError(f"dataset {name!r} has {len(ids)} ids but says it has {len(self)} images")
        if len(set(ids)) != len(ids):
            seen: set[str] = set()
            twice = next(id for id in ids if id in seen or seen.add(id))
            raise PluginError(f"dataset {name!r} has the id {twice!r} more than once")
        if self.classes is not None:
            self._texts("classes", self.classes)
        self._texts("notes", self.notes)
        if not isinstance(self.cues, Mapping):
            given = type(self.cues).__name__
            raise PluginError(f"dataset {name!r} has a {given!r} as its 'cues', not class numbers by cue")
        self._check_classes("label", self.labels)
        for cue, numbers in self.cues.items():
            self._check_classes(f"{cue} cue", numbers)
        if self.has_masks and type(self).mask is Dataset.mask:
            raise PluginError(f"dataset {name!r} says it has masks but has no method 'mask'")
        if self.train is not None:
            if not isinstance(self.train, Dataset):
                given = type(self.train).__name__
                raise PluginError(f"dataset {name!r} has a {given!r} as its train split, not a dataset")
            if self.train is self:
                raise PluginError(f"dataset {name!r} is its own train split", hint=_APART)
            self.train.check()
            self._check_apart(self.train)

    def _texts(self, what: str, values: Any) -> list[str]:
        found = self._list(what, values)
        if not all(isinstance(value, str) for value in found):
            raise PluginError(f"dataset {self.name!r} has {what} that are not strings")
        return found

    def _list(self, what: str, values: Any) -> list[Any]:
        """The values of a part that has to be a list: neither one text nor what can be read once only."""
        with contextlib.suppress(TypeError):
            if len(values) >= 0 and hasattr(values, "__getitem__") and not isinstance(values, str | Mapping):
                return list(values)
        given = type(values).__name__
        raise PluginError(f"dataset {self.name!r} has a {given!r} as its {what!r}, not a list")

    def _check_apart(self, train: Dataset) -> None:
        """Raise where the first id that both have is one image. Splits may name different files alike."""
        place = {id: index for index, id in enumerate(train.ids)}
        shared = next((index for index, id in enumerate(self.ids) if id in place), None)
        if shared is None:
            return
        id = self.ids[shared]
        if fingerprint_of(self, [shared]) == fingerprint_of(train, [place[id]]):
            raise PluginError(f"dataset {self.name!r} has image {id!r} in its train split too", hint=_APART)

    def _check_classes(self, what: str, numbers: Sequence[int] | None) -> None:
        if numbers is None:
            return
        numbers = self._list(f"{what}s", numbers)
        if len(numbers) != len(self.ids):
            raise PluginError(
                f"dataset {self.name!r} has {len(self.ids)} ids but {len(numbers)} {what}s",
            )
        for number in numbers:
            try:
                operator.index(number)
            except TypeError:
                message = f"dataset {self.name!r} has the {what} {number!r}, which is no whole number"
                raise PluginError(message, hint="names of classes go into 'classes'") from None
        if self.classes is not None and len(numbers):
            low, high = min(numbers), max(numbers)
            if low < 0 or high >= len(self.classes):
                wrong = low if low < 0 else high
                raise PluginError(f"dataset {self.name!r} has {what} {wrong} but {len(self.classes)} classes")


def image_of(dataset: Dataset, index: int) -> Image.Image:
    """``dataset.image(index)``. Raises one of `UNREADABLE`, `MemoryError`, or `PluginError` for a mistake in
    the dataset's code."""
    try:
        image = dataset.image(index)
    except (ProbekitError, MemoryError, *UNREADABLE):
        raise
    except Exception as error:
        raise fault(dataset, index, error) from error
    if not isinstance(image, Image.Image):
        given, id = type(image).__name__, dataset.ids[index]
        raise PluginError(
            f"dataset {dataset.name!r} gave a {given!r} for image {id!r}, not an image",
            hint="'image' returns a PIL.Image.Image",
        )
    return image


def renumbered(other: Dataset, dataset: Dataset) -> dict[int, int]:
    """The labels of another dataset's images in the numbering of `dataset`, where it has that class.

    By the classes' names (`Dataset.class_of`); of two datasets without any, the numbers as they are.
    """
    if dataset.classes is None or other.classes is None:
        same = dict(enumerate(other.labels)) if dataset.classes is other.classes else {}
        return {i: int(label) for i, label in same.items()}
    numbers = [dataset.class_of(name) for name in other.classes]
    found = ((i, numbers[label]) for i, label in enumerate(other.labels))
    return {i: number for i, number in found if number is not None}


def fingerprint_of(dataset: Dataset, indices: Sequence[int]) -> str:
    """``dataset.fingerprint(indices)``. Raises `PluginError` for an answer that would be the same whatever
    became of the images."""
    found = dataset.fingerprint(indices)
    if not isinstance(found, str) or not found:
        given = "an empty text" if found == "" else f"a {type(found).__name__!r}"
        raise PluginError(
            f"dataset {dataset.name!r} gave {given} as its fingerprint",
            hint="'fingerprint' returns a text that changes when the images do",
        )
    return found


def fault(dataset: Dataset, index: int, error: BaseException, what: str = "") -> ProbekitError:
    """What to raise where a dataset's code, or the machine, failed at an image whose file may be fine."""
    where = f"{what}dataset {dataset.name!r} failed at image {dataset.ids[index]!r}"
    text = " ".join(str(error).split()) or type(error).__name__
    if is_shortage(error):
        return DataError(f"{where}: {text}", hint="use fewer workers or smaller batches")
    found = PluginError(f"{where}: {type(error).__name__}: {text}", hint="--debug shows where")
    found.add_note("".join(traceback.format_exception(error)))  # survives the way from a worker
    return found


def select(total: int, limit: int | None) -> list[int]:
    """The indices a run with ``--limit`` uses: ``floor(i * total / limit)``, evenly spaced.

    No randomness: the same numbers everywhere. In a dataset ordered by class each class gets its share
    to within one image. A limit of None or beyond `total` selects everything.
    Raises `UsageError` for a limit below 1.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"a limit of {limit} images selects nothing", hint="give --limit 1 or more")
    if limit is None or limit >= total:
        return list(range(total))
    return [i * total // limit for i in range(limit)]


def combine(dataset: Dataset, indices: Sequence[int], contents: Iterable[bytes]) -> str:
    """The fingerprint of `indices` in order, from each one's id, label and content digest: 32 hex digits.

    Fields carry their length, so that no two different lists give the same stream of bytes.
    """
    digest = xxhash.xxh3_128(b"probekit dataset 1")
    for index, content in zip(indices, contents, strict=True):
        label = b"" if dataset.labels is None else str(int(dataset.labels[index])).encode()
        for field in (dataset.ids[index].encode("utf-8", "surrogatepass"), label, content):
            digest.update(len(field).to_bytes(8, "little"))
            digest.update(field)
    return digest.hexdigest()


def decode(file: BinaryIO, id: str) -> Image.Image:
    """Read an open image file into an RGB image in memory (`to_rgb`); of several frames, the first.

    EXIF orientation is ignored on purpose: the ImageNet loaders of torchvision, timm and the papers
    ignore it, and the published numbers were measured that way. (TIFF is the exception: Pillow itself
    turns a TIFF when it loads it.)
    Raises `BadImage` for an empty, truncated, damaged or unknown file and for a decompression bomb.
    """
    strict, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        image = Image.open(file, formats=formats())
        image.load()
        rgb = to_rgb(image)
        # a plain image: the decoder's object would keep its (closed) file and could not be pickled
        return rgb.copy() if rgb is image else rgb
    except DataError as error:
        raise BadImage(id, error.message) from error
    except (Exception, Image.DecompressionBombWarning) as error:  # decoders raise nearly anything
        if is_shortage(error):
            raise
        raise BadImage(id, decode_failure(error, file)) from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = strict


def is_shortage(error: BaseException) -> bool:
    """Whether the machine, not the image, is at fault: out of memory or of file handles."""
    if isinstance(error, OSError):
        return error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
    return isinstance(error, MemoryError)


def decode_failure(error: BaseException, file: BinaryIO | None = None) -> str:
    """One clause on why an image could not be decoded."""
    if isinstance(error, UnidentifiedImageError):
        if file is not None and not file.closed and file.seek(0, 2) == 0:
            return "the file is empty"
        return "not an image that Pillow can identify"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return "it has so many pixels that it may be a decompression bomb"
    text = " ".join(str(error).split())
    if "truncated" in text.lower():
        return "the file is truncated"
    return f"the file is damaged ({text or type(error).__name__})"


def openable() -> Iterator[tuple[str, str]]:
    """(suffix, format) of everything this Pillow can read, with the plugins registered so far."""
    for suffix, name in Image.registered_extensions().items():
        if name in Image.OPEN and name not in BLOCKED_FORMATS:
            yield suffix.lower(), name


def formats() -> list[str]:
    """What Pillow may take a file's content for, whatever its name."""
    Image.init()
    return [name for name in Image.ID if name not in BLOCKED_FORMATS]


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` as 8-bit RGB, the same object when it is RGB already.

    - alpha is dropped, not composited, like ImageFolder's ``convert("RGB")`` (LA, RGBA, PA, P with
      transparency in any form);
    - 1-bit, grey, palette, CMYK, YCbCr, HSV, LAB as Pillow converts them (no colour management);
    - 16-bit grey is divided by 257 and rounded, where Pillow's own conversion may clip at 255;
    - 32-bit integers (I) are 8-bit when all are within 0..255, else 16-bit within 0..65535; a 16-bit
      PNG or PNM that Pillow gives as I is always 16-bit;
    - floats (F) are brightness 0..1 when all are within it, else 0..255.
    Raises `DataError` (the cause alone) for values outside these ranges or not finite.
    """
    mode = image.mode
    if mode == "RGB":
        return image
    if mode.startswith("I") or mode == "F":
        return _grey(image).convert("RGB")
    if mode == "La":  # premultiplied: Pillow converts it to LA only
        image = image.convert("LA")
    if "transparency" in image.info:  # Pillow warns about, or trips over, some forms of it
        image = image.copy()
        del image.info["transparency"]
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise DataError(f"its mode {mode!r} has no conversion to RGB") from error


def _grey(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if image.mode == "F":
        if not np.isfinite(values).all():
            raise DataError("it holds values that are not finite")
        low, high = float(values.min()), float(values.max())
        if low < 0 or high > 255:
            raise DataError(f"its floating-point values run from {low:g} to {high:g}, not 0..1 or 0..255")
        grey = values.astype(np.float64) * (255 if high <= 1 else 1)
        return Image.fromarray(np.rint(grey).astype(np.uint8))
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise DataError(f"its integer values run from {low} to {high}, not 0..255 or 0..65535")
    sixteen = image.mode != "I" or high > 255 or getattr(image, "format", None) in ("PNG", "PPM")
    values = values.astype(np.uint32)
    return Image.fromarray(((values + 128) // 257 if sixteen else values).astype(np.uint8))
