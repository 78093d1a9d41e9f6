"""What pictures hold, as plain data: lines over an axis, heat maps, dots, points and small images."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Line:
    """A layer's values over an inner axis: finite x and y (n,)."""

    layer: str
    depth: float
    part: str
    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class Profile:
    """One model's lines; `second` are the parts after the first, a decoder."""

    model: str
    lines: tuple[Line, ...]
    second: tuple[str, ...] = ()


@dataclass(frozen=True)
class Matrix:
    """values: (rows, columns). beside: what further axis entries it is of, another model's name."""

    model: str
    beside: str
    values: np.ndarray
    rows: np.ndarray
    columns: np.ndarray


@dataclass(frozen=True)
class Dots:
    """Values of named categories, (n,), with bounds that may be NaN; `line` is the value of all of them."""

    model: str
    layer: str
    categories: tuple[str, ...]
    values: np.ndarray
    low: np.ndarray
    high: np.ndarray
    line: float


@dataclass(frozen=True)
class Cloud:
    """Points (n, axes) of one group; `after` are the same points later."""

    name: str
    points: np.ndarray
    after: np.ndarray | None = None


@dataclass(frozen=True)
class Scatter:
    layer: str
    axes: tuple[str, ...]
    clouds: tuple[Cloud, ...]


@dataclass(frozen=True)
class Points:
    model: str
    scatters: tuple[Scatter, ...]


@dataclass(frozen=True)
class Block:
    """maps: (rows, columns, height, width), NaN where there is nothing. marks: per row a box as shares of
    height and width (top, left, height, width), or None."""

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    maps: np.ndarray
    marks: tuple[tuple[float, float, float, float] | None, ...]


@dataclass(frozen=True)
class Maps:
    model: str
    blocks: tuple[Block, ...]


Panel = Profile | Matrix | Dots | Points | Maps


@dataclass
class Picture:
    """One variable of one metric on one dataset, a panel or more for each model.

    across, up: what the axes are, with units; notes: sentences of the caption
    """

    metric: str
    variable: str
    kind: str
    title: str
    units: str
    figure: str
    dataset: str
    across: str = ""
    up: str = ""
    panels: list[Panel] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)

    @property
    def caption(self) -> str:
        return " ".join(f"{note}." for note in [*self.notes, " or ".join(self.images)] if note)
