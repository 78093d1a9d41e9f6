"""What a claim is about: one number per image and layer, from a metric's values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from probekit.summaries import image_curve


@dataclass(frozen=True)
class LastLess:
    """The last value of an inner axis minus the one at an index: the highest frequency relative to
    frequency 0, or (index 1) to the lowest above it."""

    index: int

    averages = False

    def pick(self, values: np.ndarray, coordinate: np.ndarray) -> tuple[np.ndarray, float]:
        return values[:, -1] - values[:, self.index], float(coordinate[-1])


@dataclass(frozen=True)
class Rank:
    """The value at a rank, counted from 1, or the last where there are fewer; relative to another rank, NaN
    where there is no such one."""

    rank: int
    less: int | None = None

    averages = False

    def pick(self, values: np.ndarray, coordinate: np.ndarray) -> tuple[np.ndarray, float]:
        at = min(self.rank, values.shape[1])
        if self.less is None:
            return values[:, at - 1], float(at)
        if self.less > values.shape[1]:
            return np.full(len(values), np.nan), float(at)
        return values[:, at - 1] - values[:, self.less - 1], float(at)


@dataclass(frozen=True)
class Above:
    """The mean over an inner axis where its coordinate is at least `low`."""

    low: float

    averages = True
    """A mean: it takes the ends of intervals to the ends of a wider one."""

    def pick(self, values: np.ndarray, coordinate: np.ndarray) -> tuple[np.ndarray, float]:
        # a hair's breadth: 0.1 * 5 as a coordinate must count as 0.5
        return values[:, coordinate >= self.low - 1e-9].mean(axis=1), self.low


Inner = LastLess | Rank | Above


@dataclass(frozen=True)
class Quantity:
    """A value of a metric, and how it becomes one number per image and layer.

    metric: the metric's name
    value:  one of its values; the one named like the metric by default
    inner:  how its inner axis is reduced: anything with ``pick(values (images, size), coordinate (size,)) ->
            ((images,), coordinate it was taken at)`` and ``averages``; as the metric's own curve by default
    """

    metric: str
    value: str = ""
    inner: Inner | None = None

    @property
    def name(self) -> str:
        return self.value or self.metric


def reduced(
    values: np.ndarray, how: str | Inner, coordinate: np.ndarray | None
) -> tuple[np.ndarray, list[float]]:
    """(images, rows, *inner) -> (images, rows), and where on the inner axis each row was taken.

    how:        ``"mean"``, ``"last"``, or a pick from the one inner axis
    coordinate: (size,) or (rows, size); the index counted from 0 by default

    NaN where a row has no value. Raises ValueError for a pick from another number of axes.
    """
    if isinstance(how, str):
        return image_curve(values, how), []
    if values.ndim != 3:
        raise ValueError(f"it has {values.ndim - 2} inner axes, not 1")
    images, rows, size = values.shape
    axis = np.arange(size) if coordinate is None else coordinate
    axis = np.broadcast_to(axis, (rows, size))
    found, places = np.full((images, rows), np.nan), []
    for row in range(rows):
        present = ~np.isnan(values[:, row]).all(axis=0)
        if present.any():
            block = values[:, row, present].astype(np.float64)
            found[:, row], place = how.pick(block, axis[row, present])
            places.append(place)
    return found, places
