"""CIFAR-10's Python batches: pickles, read without running what a pickle may say."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable, Sequence

import numpy as np
import xxhash
from PIL import Image

from probekit.datasets.archive import said
from probekit.datasets.dataset import Dataset, combine
from probekit.errors import DataError


class Batches(Dataset):
    """Images from the official Python batches, held in memory.

    batches: (name, (n, 3072) uint8 pixels: 1,024 of red, green and blue each, n labels) in order
    """

    def __init__(
        self, batches: Iterable[tuple[str, np.ndarray, Sequence[int]]], classes: Sequence[str], name: str
    ):
        self.name = name
        self.classes = list(classes)
        self.ids, self.labels = [], []
        pixels = []
        for batch, rows, labels in batches:
            pixels.append(rows)
            self.labels += labels
            self.ids += [f"{batch}/{number:05d}" for number in range(len(labels))]
        self._pixels_of = np.concatenate(pixels)

    def image(self, index: int) -> Image.Image:
        planes = self._pixels_of[index].reshape(3, 32, 32)
        return Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0)))

    def fingerprint(self, indices: Sequence[int]) -> str:
        return combine(self, indices, (xxhash.xxh3_128_digest(self._pixels_of[i].tobytes()) for i in indices))


def read_batch(content: bytes) -> tuple[np.ndarray, list[int]]:
    """Pixels, (n, 3072) uint8, and labels of one batch. Raises `DataError`, the cause alone."""
    try:
        found = _Batch(io.BytesIO(content), encoding="bytes").load()
        found = {key.decode() if isinstance(key, bytes) else key: value for key, value in found.items()}
        pixels, labels = found["data"].array(), [int(label) for label in found["labels"]]
        if pixels.shape != (len(labels), 3072) or not set(labels) <= set(range(10)):
            raise ValueError(f"{pixels.shape} pixels and {len(labels)} labels")
    except DataError:
        raise
    except Exception as error:  # a pickle of anything can fail anywhere
        raise DataError(
            f"it is damaged, or no batch of CIFAR-10 ({said(error)})", hint="download or copy it again"
        ) from error
    return pixels, labels


class _Batch(pickle.Unpickler):
    """Reads dictionaries, lists, numbers, texts and arrays of bytes, and refuses every other object.

    Not even numpy's own functions are called: an array becomes an `_Array` that remembers its parts.
    """

    def find_class(self, module: str, name: str) -> object:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _Array
        if module == "numpy" and name in ("ndarray", "dtype"):
            return _Dtype
        raise DataError(
            f"it holds {f'{module}.{name}'!r}, which could run code and isn't loaded",
            hint="use the official file, or a zip of images",
        )


class _Dtype:
    def __init__(self, code: object = None, *_: object):
        self.code = code

    def __setstate__(self, state: object) -> None:
        pass


class _Array:
    def __init__(self, *_: object):
        self.state: tuple = ()

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        _, shape, dtype, columns_first, content = self.state
        if dtype.code not in ("u1", b"u1"):
            raise ValueError(f"pixels of type {dtype.code!r}")
        if isinstance(content, str):
            content = content.encode("latin-1")
        return np.frombuffer(content, np.uint8).reshape(shape, order="F" if columns_first else "C")
