"""A dataset's images as a stream of training batches that is a function of seed and step alone."""

from __future__ import annotations

import multiprocessing
import random
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from probekit.datasets.dataset import UNREADABLE, BadImage, Dataset, decode_failure, is_shortage, to_rgb
from probekit.errors import DataError, ProbekitError
from probekit.specs import Preprocessing
from probekit_train.recipe import Training
from probekit_train.views import transform, views_of

_MEMORY = 2_000_000_000  # bytes of decoded pixels that are kept


class Pictures:
    """The images of a dataset, decoded once where their pixels take at most 2 GB.

    progress: called with (images decoded, images in all)
    Raises DataError for an image that can't be read: a training has no use for "most images".
    """

    def __init__(self, dataset: Dataset, progress: Callable[[int, int], None] = lambda done, total: None):
        self.dataset = dataset
        self._pixels: np.ndarray | None = None
        if not len(dataset):
            raise DataError(f"dataset '{dataset.name}' holds no images to train on")
        first = self._decoded(0)
        if first.size * len(dataset) <= _MEMORY:
            self._fill(first, progress)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Image.Image:
        if self._pixels is None:
            return Image.fromarray(self._decoded(index))
        start, rows, columns = self._places[index]
        return Image.fromarray(self._pixels[start : start + rows * columns * 3].reshape(rows, columns, 3))

    def _fill(self, first: np.ndarray, progress: Callable[[int, int], None]) -> None:
        count = len(self.dataset)
        pixels = np.empty(first.size * count, dtype=np.uint8)  # enough where all are of one size
        self._places = np.empty((count, 3), dtype=np.int64)
        end = 0
        for index in range(count):
            image = self._decoded(index)
            if end + image.size > _MEMORY:
                return
            if end + image.size > len(pixels):
                room = min(_MEMORY, max(end + image.size, len(pixels) * 3 // 2))
                pixels = np.concatenate([pixels, np.empty(room - len(pixels), dtype=np.uint8)])
            pixels[end : end + image.size] = image.ravel()
            self._places[index] = end, *image.shape[:2]
            end += image.size
            if index % 256 == 255 or index + 1 == count:
                progress(index + 1, count)
        self._pixels = pixels

    def _decoded(self, index: int) -> np.ndarray:
        id = self.dataset.ids[index]
        try:
            return np.asarray(to_rgb(self.dataset.image(index)))
        except BadImage:
            raise
        except UNREADABLE as error:
            if is_shortage(error):
                raise DataError(f"no memory or file handles left at image '{id}'") from error
            reason = error.message if isinstance(error, DataError) else decode_failure(error)
            raise BadImage(id, reason) from error


class Order:
    """Which image stands where in the endless stream: epoch after epoch, each shuffled anew by the seed."""

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self.seed = seed
        self._shuffled: dict[int, np.ndarray] = {}

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self.count)
        if epoch not in self._shuffled:
            if len(self._shuffled) > 1:
                self._shuffled.pop(min(self._shuffled))
            shuffled = np.random.default_rng([self.seed, epoch]).permutation(self.count)
            self._shuffled[epoch] = shuffled
        return int(self._shuffled[epoch][place])


class Share:
    """One process's part of every step, as a map from the number of the part to its images.

    Number n is part ``n % accumulate`` of step ``n // accumulate``. An image's views are a function of the
    seed and of its place in the stream, so that neither workers nor a restart change them.
    """

    def __init__(
        self, pictures: Pictures, recipe: Training, size: int, *, rank: int = 0, processes: int = 1
    ) -> None:
        self.pictures = pictures
        self.recipe = recipe
        self.transforms = [transform(view, size) for view in recipe.views]
        self.order = Order(len(pictures), recipe.seed)
        self.count = recipe.batch_size // (recipe.accumulate * processes)
        self.rank, self.processes = rank, processes

    def __getitem__(self, number: int) -> tuple[list[Tensor], Tensor | None] | ProbekitError:
        start = (number * self.processes + self.rank) * self.count
        chosen = [self.order[position] for position in range(start, start + self.count)]
        views: list[list[np.ndarray]] = [[] for _ in self.transforms]
        try:
            for position, index in enumerate(chosen, start):
                _seed(self.recipe.seed, position)
                for kept, view in zip(views, views_of(self.pictures[index], self.transforms), strict=True):
                    kept.append(view)
        except ProbekitError as error:  # a DataLoader would lose its sentence on the way from a worker
            return error
        labels = self.pictures.dataset.labels
        return (
            [torch.from_numpy(np.stack(view)) for view in views],
            None if labels is None else torch.tensor([labels[index] for index in chosen]),
        )


def stream(
    share: Share, numbers: Sequence[int], workers: int
) -> Iterator[tuple[list[Tensor], Tensor | None]]:
    """The parts `numbers` of a share, in order, from `workers` processes (0: this one)."""
    loader = DataLoader(
        share,  # type: ignore[arg-type]
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        collate_fn=_as_is,
        multiprocessing_context=_context() if workers else None,
        generator=torch.Generator(),  # else the loader draws from the global one
        worker_init_fn=_alone,
    )
    for item in loader:
        if isinstance(item, ProbekitError):
            raise item
        yield item


def normalised(view: Tensor, how: Preprocessing, device: torch.device) -> Tensor:
    """(B, rows, cols, 3) uint8 to (B, 3, rows, cols) float32 on the device, normalised."""
    pixels = view.to(device, non_blocking=True).permute(0, 3, 1, 2).float()
    mean, std = (torch.tensor(value, device=device).view(3, 1, 1) * 255 for value in (how.mean, how.std))
    return ((pixels - mean) / std).contiguous()


def _seed(seed: int, position: int) -> None:
    """What the transforms draw from, at less cost than `seed_everything`: CPU generators only."""
    mixed = int(np.random.SeedSequence([seed, position, 1]).generate_state(1)[0])
    torch.default_generator.manual_seed(mixed)
    random.seed(mixed)
    np.random.seed(mixed)


def _context() -> multiprocessing.context.BaseContext:
    # Fork where it is safe: the decoded pixels are shared and nothing is pickled.
    return multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


def _as_is(item: object) -> object:
    return item


def _alone(_: int) -> None:
    torch.set_num_threads(1)
