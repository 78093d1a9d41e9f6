"""Class maps cut into the patches of a token grid, and scores from counts of pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from probekit.summaries import LEVEL, resampled_weights

Grid = tuple[int, int]


def sampled(grid: Grid, tokens: int) -> np.ndarray:
    """The patch numbers kept of a grid, in raster order: `tokens` drawn with seed 0, all of a small grid.

    Every image has the same ones, and so has every model with this grid.
    """
    count = grid[0] * grid[1]
    if count <= tokens:
        return np.arange(count)
    return np.sort(np.random.Generator(np.random.PCG64(0)).permutation(count)[:tokens])


@dataclass
class Patches:
    """Pixels by class of the sampled patches of each image, for each of several grids.

    Kept as (image, patch, class, pixels), because most classes are absent from most patches.
    """

    images: int
    places: dict[Grid, np.ndarray]
    largest: int = -1  # class number
    _found: dict[Grid, list[np.ndarray]] = field(default_factory=dict)

    def histogram(self, grid: Grid, classes: int) -> np.ndarray:
        """(images, patches, classes) int64 numbers of pixels."""
        counts = np.zeros((self.images, len(self.places[grid]), classes), dtype=np.int64)
        for image, found in enumerate(self._found[grid]):
            counts[image, found[0], found[1]] = found[2]
        return counts

    def majority(self, grid: Grid) -> np.ndarray:
        """The commonest class of each patch, (images, patches) int64: the lowest of equals, -1 of none."""
        commonest = np.full((self.images, len(self.places[grid])), -1, dtype=np.int64)
        for image, (patch, number, pixels) in enumerate(self._found[grid]):
            order = np.lexsort((-number, pixels))  # the last one written stays
            commonest[image, patch[order]] = number[order]
        return commonest


def patches(mask: Callable[[int], np.ndarray], images: int, tokens: int, grids: Sequence[Grid]) -> Patches:
    """Cut every image's (rows, cols) class map, each read once. Negative classes count nowhere.

    Where a side isn't a multiple of the grid's, patches end at the nearest pixel.
    """
    found = Patches(images, {grid: sampled(grid, tokens) for grid in grids})
    found._found = {grid: [] for grid in grids}
    cuts: dict[tuple[Grid, tuple[int, ...]], tuple[np.ndarray, np.ndarray]] = {}
    for image in range(images):
        classes = np.asarray(mask(image))
        for grid, places in found.places.items():
            key = (grid, classes.shape)
            if key not in cuts:
                cuts[key] = _pixels(grid, classes.shape, places)
            pixel, patch = cuts[key]
            values = classes.ravel()[pixel]
            valid = values >= 0
            pairs, counts = np.unique(
                np.stack([patch[valid], values[valid]]).astype(np.int64), axis=1, return_counts=True
            )
            found._found[grid].append(np.concatenate([pairs, counts[None]]))
            found.largest = max(found.largest, int(pairs[1].max(initial=-1)))
    return found


def _pixels(grid: Grid, shape: tuple[int, ...], places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixel numbers in sampled patches, and which of these each lies in."""
    row, column = (
        ((np.arange(size) + 0.5) * n / size).astype(int) for size, n in zip(shape, grid, strict=True)
    )
    patch = (row[:, None] * grid[1] + column).ravel()
    which = np.full(grid[0] * grid[1], -1)
    which[places] = np.arange(len(places))
    pixel = np.flatnonzero(which[patch] >= 0)
    return pixel, which[patch[pixel]]


def tally(histogram: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """(images, 3, classes): pixels rightly answered, of a class, and answered, by class.

    histogram (images, patches, classes); answers (images, patches), each for all labelled pixels of a patch.
    """
    images, _, classes = histogram.shape
    found = np.zeros((images, 3, classes), dtype=np.int64)
    rows = np.arange(images)[:, None]
    np.add.at(found, (rows, 0, answers), np.take_along_axis(histogram, answers[..., None], 2)[..., 0])
    found[:, 1] = histogram.sum(1)
    np.add.at(found, (rows, 2, answers), histogram.sum(2))
    return found


def iou(totals: np.ndarray) -> np.ndarray:
    """IoU of each class, (..., 3, classes) -> (..., classes); NaN of a class neither there nor answered."""
    right, there, answered = np.moveaxis(totals.astype(np.float64), -2, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return right / (there + answered - right)


def mean_iou(totals: np.ndarray) -> np.ndarray:
    """Over the classes that are there or answered, in %, (..., 3, classes) -> (...)."""
    each = iou(totals)
    some = ~np.isnan(each)
    with np.errstate(invalid="ignore"):
        return 100 * np.where(some, each, 0.0).sum(-1) / some.sum(-1)


def pixel_accuracy(totals: np.ndarray) -> np.ndarray:
    """Right among labelled pixels in %, (..., 3, classes) -> (...); NaN without any."""
    with np.errstate(invalid="ignore"):
        return 100 * totals[..., 0, :].sum(-1) / totals[..., 1, :].sum(-1)


def resampled(
    tallies: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], seed: int
) -> tuple[float, float]:
    """The percentile bootstrap interval over images of a statistic of summed (images, 3, classes) counts.

    The same resamples of images as `summaries.bootstrap_interval`'s. NaN with fewer than two images.
    """
    images = len(tallies)
    if images < 2:
        return np.nan, np.nan
    flat = tallies.reshape(images, -1).astype(np.float64)
    found = [
        statistic((weights @ flat).reshape(-1, *tallies.shape[1:]))
        for weights in resampled_weights(images, seed)
    ]
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile(np.concatenate(found), [tail, 1 - tail])
    return float(low), float(high)
