"""From a dataset's indices to batches of network input, in order, the same bits however many workers."""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from probekit.datasets.dataset import (
    UNREADABLE,
    BadImage,
    Dataset,
    decode_failure,
    fault,
    image_of,
    is_shortage,
    to_rgb,
)
from probekit.errors import DataError, PluginError, ProbekitError, UsageError
from probekit.specs import Preprocessing

if TYPE_CHECKING:
    from torch import Tensor

Variant = Callable[["Tensor", int], "Tensor"]

# Pillow's own limit for a decompression bomb. A 1 x 10,000 image resized to 256 pixels across would have
# 655 million: the eval transform enlarges before it crops.
_MOST_PIXELS = 2 * 89_478_485


@dataclass(frozen=True)
class Bad:
    """An image that could not be used: where, which, and why (one clause)."""

    index: int
    id: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """The usable images of one chunk of indices.

    indices: the dataset index of each row of `pixels`, in the order asked for
    pixels:  (B, 3, rows, cols) float32, normalised; B is ``len(indices)``, 0 when none could be read
    bad:     the chunk's other images, in order
    """

    indices: list[int]
    pixels: Tensor
    bad: list[Bad] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.indices)


class Prepared:
    """Images as the network takes them, for the passes to come that show them again with a variant each.

    Noise in eleven bands is eleven passes over the same images. The first ones are kept as long as there is
    room; the rest are prepared anew.
    """

    def __init__(self, room: int = 320_000_000):
        self.room = room  # bytes: some 500 images of 224 x 224
        self._pixels: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._pixels)

    def get(self, index: int) -> Tensor | None:
        """A copy, for a variant to change as it likes."""
        found = self._pixels.get(index)
        return None if found is None else found.clone()

    def put(self, index: int, pixels: Tensor) -> None:
        if pixels.nbytes <= self.room:
            self.room -= pixels.nbytes
            self._pixels[index] = pixels.clone()


def transform(preprocessing: Preprocessing, normalize: bool = True) -> Callable[[Image.Image], Tensor]:
    """timm's evaluation transform: RGB image -> (3, rows, cols) float32, normalised, or else uint8.

    center: the side that needs least shrinking goes to ``floor(size / crop_pct)``, then a centre crop;
    squash: both sides go there, whatever the aspect; border: the whole image, padded with the mean.
    """
    from timm.data import create_transform

    return create_transform(
        input_size=(3, *preprocessing.size),
        is_training=False,
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
        crop_pct=preprocessing.crop_pct,
        crop_mode=preprocessing.crop_mode,
        normalize=normalize,
    )


def masks(dataset: Dataset, index: int, preprocessing: Preprocessing) -> np.ndarray:
    """The class map of image `index` at the network's input: (rows, cols) int64, -1 where none counts.

    Resized (nearest pixel) and cropped by the very transform of the image; -1 stands for the dataset's
    `mask_ignore`, for negative numbers and for what `border` adds around the image.
    Raises `BadImage` for a mask that can't be read or isn't one number a pixel.
    """
    id = dataset.ids[index]
    try:
        mask = dataset.mask(index)
        numbers = np.asarray(mask)
    except BadImage as error:
        raise BadImage(id, error.reason) from error
    except DataError as error:
        raise BadImage(id, error.message) from error
    except UNREADABLE as error:
        if is_shortage(error):
            raise
        raise BadImage(id, f"its mask: {decode_failure(error)}") from error
    except ProbekitError:
        raise
    except Exception as error:
        raise fault(dataset, index, error, "the mask of ") from error
    if numbers.ndim != 2 or numbers.dtype.kind not in "iub":
        kind = f"mode {mask.mode!r}" if isinstance(mask, Image.Image) else f"type {type(mask).__name__!r}"
        raise BadImage(id, f"its mask has {kind}, not one class number a pixel")
    numbers = numbers.astype(np.int64)
    if dataset.mask_ignore is not None:
        numbers[numbers == dataset.mask_ignore] = -1
    # A class number + 1 as the three bytes of a colour, black for none: so a mask goes through the image's
    # own transform, padding included, and "nearest" mixes no two colours.
    code = np.maximum(numbers, -1) + 1
    if code.max(initial=0) >= 1 << 24:
        raise BadImage(id, f"its mask has class number {int(numbers.max())}")
    colours = np.stack([code >> 16, code >> 8 & 255, code & 255], axis=-1).astype(np.uint8)
    exact = preprocessing.model_copy(update={"mean": (0.0, 0.0, 0.0), "interpolation": "nearest"})
    red, green, blue = transform(exact, normalize=False)(Image.fromarray(colours)).numpy().astype(np.int64)
    return (red << 16 | green << 8 | blue) - 1


def batches(
    dataset: Dataset,
    indices: Sequence[int],
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    workers: int = 0,
    on_bad: Literal["skip", "fail"] = "skip",
    variant: Variant | None = None,
    prepared: Prepared | None = None,
) -> Iterator[Batch]:
    """Yield one `Batch` for every `batch_size` of `indices`, in order.

    A bad image shifts no other: batch k is always about ``indices[k * batch_size : (k + 1) * batch_size]``.
    Each image is prepared alone, so neither `batch_size` nor `workers` changes a bit of it. No random
    number is drawn from torch's global generator.

    workers: processes that decode (0: this one). They are gone when the iterator is exhausted, closed,
             or left by an exception, Ctrl-C included.
    on_bad:  ``skip`` lists bad images in their batch; ``fail`` raises `BadImage` at the first.
    variant: called with each normalised (3, rows, cols) tensor and its index, returns another of that
             shape (noise in a frequency band); with workers it must survive fork or pickle.
    prepared: kept from earlier calls with the same dataset and preprocessing, and for later ones; without
             effect where workers decode, who share no memory.

    Raises `UsageError` for arguments that make no sense (at once), `PluginError` when the dataset or the
    variant fails in a way that is no image's fault, `DataError` when a worker dies.
    """
    if batch_size < 1:
        raise UsageError(f"a batch size of {batch_size} is not possible", hint="give --batch-size 1 or more")
    if workers < 0:
        raise UsageError(f"{workers} workers are not possible", hint="give --workers 0 or more")
    if on_bad not in ("skip", "fail"):
        raise UsageError(f"a bad image can be 'skip' or 'fail', not {on_bad!r}")
    indices = [int(index) for index in indices]
    if indices and not 0 <= min(indices) <= max(indices) < len(dataset):
        wrong = min(indices) if min(indices) < 0 else max(indices)
        raise UsageError(f"dataset {dataset.name!r} has {len(dataset)} images, so no index {wrong}")
    chunks = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    # imports timm here, before any fork: the workers share it
    kept = Prepared(room=0) if workers or prepared is None else prepared
    loader = _Loader(dataset, chunks, preprocessing, transform(preprocessing), variant, kept)
    return _iterate(loader, min(workers, len(chunks)), on_bad)


def _iterate(loader: _Loader, workers: int, on_bad: str) -> Iterator[Batch]:
    source = _parallel(loader, workers) if workers else (loader[k] for k in range(len(loader)))
    with contextlib.closing(source):
        for batch, failure in source:
            if failure is not None:
                raise failure
            if batch.bad and on_bad == "fail":
                first = batch.bad[0]
                hint = "--on-bad-image skip leaves such images out and lists them in the report"
                raise BadImage(first.id, first.reason, hint=hint)
            yield batch


class _Loader:
    """A map-style dataset of whole batches. Errors are returned, not raised: a DataLoader would rebuild
    them in the parent from their text alone, without hint or exit code."""

    def __init__(
        self,
        dataset: Dataset,
        chunks: list[list[int]],
        preprocessing: Preprocessing,
        transform: Callable[[Image.Image], Tensor],
        variant: Variant | None,
        prepared: Prepared,
    ):
        self.dataset = dataset
        self.chunks = chunks
        self.preprocessing = preprocessing
        self.transform = transform
        self.variant = variant
        self.prepared = prepared

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, k: int) -> tuple[Batch | None, ProbekitError | None]:
        try:
            return self._batch(self.chunks[k]), None
        except ProbekitError as error:
            return None, _portable(error)

    def _batch(self, chunk: list[int]) -> Batch:
        import torch

        indices, pixels, bad = [], [], []
        for index in chunk:
            try:
                pixels.append(self._pixels(index))
                indices.append(index)
            except BadImage as error:
                bad.append(Bad(index, self.dataset.ids[index], error.reason))
        stacked = torch.stack(pixels) if pixels else torch.empty(0, 3, *self.preprocessing.size)
        return Batch(indices, stacked.float(), bad)

    def _pixels(self, index: int) -> Tensor:
        pixels = self.prepared.get(index)
        if pixels is None:
            image = self._image(index)
            _check_shape(image, self.preprocessing, self.dataset.ids[index])
            try:
                pixels = self.transform(image)
            except MemoryError as error:
                raise fault(self.dataset, index, error) from error
            self.prepared.put(index, pixels)
        if self.variant is None:
            return pixels
        try:
            changed = self.variant(pixels, index)
        except ProbekitError:
            raise
        except Exception as error:
            raise fault(self.dataset, index, error, "a variant of ") from error
        if getattr(changed, "shape", None) != pixels.shape:
            shape = tuple(getattr(changed, "shape", ()))
            expected = tuple(pixels.shape)
            raise PluginError(
                f"a variant of dataset {self.dataset.name!r} returned shape {shape}, not {expected}"
            )
        return changed.detach()

    def _image(self, index: int) -> Image.Image:
        """The image as RGB in memory. Raises `BadImage`, or `PluginError` where the dataset is at fault."""
        id = self.dataset.ids[index]
        try:
            image = image_of(self.dataset, index)
        except BadImage as error:
            raise BadImage(id, error.reason) from error
        except DataError as error:
            raise BadImage(id, error.message) from error
        except (MemoryError, *UNREADABLE) as error:
            if is_shortage(error):
                raise fault(self.dataset, index, error) from error
            raise BadImage(id, decode_failure(error)) from error
        try:  # a dataset may hand out an image that Pillow has only opened
            image.load()
            return to_rgb(image)
        except DataError as error:
            raise BadImage(id, error.message) from error
        except Exception as error:
            if is_shortage(error):
                raise fault(self.dataset, index, error) from error
            raise BadImage(id, decode_failure(error)) from error


def _check_shape(image: Image.Image, preprocessing: Preprocessing, id: str) -> None:
    """Refuse an image so long and thin that resizing it would fill the memory, or leave nothing of it."""
    width, height = image.size
    if not width or not height:
        raise BadImage(id, f"it has {width} x {height} pixels")
    if preprocessing.crop_mode == "squash":
        return
    ratios = [size / crop for size, crop in zip(preprocessing.size, (height, width), strict=True)]
    if preprocessing.crop_mode == "border":
        scale = min(ratios) / preprocessing.crop_pct
        if round(min(width, height) * scale) < 1:  # as timm rounds
            raise BadImage(id, f"its {width} x {height} pixels are too long and thin to be shrunk to fit")
        return
    scale = max(ratios) / preprocessing.crop_pct
    if width * height * scale**2 > _MOST_PIXELS:
        raise BadImage(id, f"its {width} x {height} pixels are too long and thin to be enlarged and cropped")


def _parallel(loader: _Loader, workers: int) -> Iterator[tuple[Batch | None, ProbekitError | None]]:
    import torch
    from torch.utils.data import DataLoader

    # Fork where it is safe: nothing to pickle or import again, and no __main__ guard asked of scripts.
    method = "fork" if sys.platform == "linux" else "spawn"
    loading = iter(
        DataLoader(
            loader,  # type: ignore[arg-type]
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_is,
            worker_init_fn=_start_worker,
            multiprocessing_context=multiprocessing.get_context(method),
            generator=torch.Generator(),  # else the loader draws its seed from the global one
        )
    )
    try:
        while True:
            try:
                item = next(loading)
            except StopIteration:
                return
            except RuntimeError as error:
                raise DataError(
                    f"a process that prepares images died ({' '.join(str(error).split())})",
                    hint="memory or shared memory (/dev/shm) may be full: --workers 0, or smaller batches",
                ) from error
            yield item
    finally:
        # Dropping the iterator would do the same, but an exception's traceback can keep it alive for long.
        loading._shutdown_workers()


def _portable(error: ProbekitError) -> ProbekitError:
    """`error`, or its text in one of our own classes where a pack's class can't be pickled: the queue to
    the parent would drop it without a word, and the parent would wait for ever."""
    try:
        copy = pickle.loads(pickle.dumps(error))
        if str(copy) == str(error):
            return error
    except Exception:
        pass
    plain = next(cls for cls in type(error).__mro__ if cls.__module__ == ProbekitError.__module__)
    return plain(error.message, hint=error.hint)


def _as_is(item: object) -> object:
    return item


def _start_worker(_: int) -> None:
    # Ctrl-C reaches the whole group; the parent alone handles it, and then stops the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _unless_parent_left


def _unless_parent_left(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """For the thread that hands images over: a parent that stops while it takes one is no failure."""
    if not issubclass(kind, ConnectionError):
        sys.__excepthook__(kind, error, trace)
