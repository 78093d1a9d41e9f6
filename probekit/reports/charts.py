"""What a chart holds, as plain data: curves over depth, baselines, the same as a table."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

NAN = float("nan")
_SITE_ORDER = {"out": 0, "attention": 0, "mid": 0, "embed": 1}  # at one depth: the last layer's output first
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufdcf\ufdf0-\ufffd\U00010000-\U0010ffff]")
_TURNING = re.compile(
    "[\u200e\u200f\u2028-\u202e\u2066-\u2069]"
)  # they would turn around the text that follows


@dataclass(frozen=True)
class Point:
    """One row of a result's layer axis. `low` and `high` bound the mean; `spread` is the standard deviation
    over heads. All three are NaN where there are none."""

    depth: float
    layer: str
    site: str
    part: str
    stage: int
    mean: float
    low: float = NAN
    high: float = NAN
    spread: float = NAN


@dataclass(frozen=True)
class Section:
    """A stretch of the depth axis: a part of the model, a stage, or a stage of a part."""

    label: str
    start: float
    stop: float


@dataclass(frozen=True)
class Curve:
    """One model's values over depth.

    images:   how many the values are over
    averaged: whether they are means over images; else of all together: an eigenvalue, a ratio of counts
    at:       where on an inner axis the values were taken: ``frequency 0.857``
    """

    model: str
    points: tuple[Point, ...]
    images: int = 0
    averaged: bool = True
    at: str = ""

    @property
    def segments(self) -> list[list[Point]]:
        """Points to be joined by a line: a part of the model each, and a stage where new tokens begin it."""
        return _segments(self.line, lambda a, b: a.part != b.part or b.site == "embed")

    @property
    def line(self) -> list[Point]:
        """The points of the line; the paper draws embedding and layer outputs, without what lies between."""
        return [p for p in self.points if p.site != "mid"]

    @property
    def between(self) -> list[Point]:
        """Token sites between attention and MLP."""
        return [p for p in self.points if p.site == "mid"]

    @property
    def sections(self) -> list[Section]:
        """Parts and stages, in order; empty where the model has one of each."""
        groups = _segments(self.points, lambda a, b: (a.part, a.stage) != (b.part, b.stage))
        if len(groups) < 2:
            return []
        parts = list(dict.fromkeys(g[0].part for g in groups))
        staged = {part for part in parts if len({g[0].stage for g in groups if g[0].part == part}) > 1}
        ends = [(g[0].depth, g[-1].depth) for g in groups]
        edges = [ends[0][0], *((a[1] + b[0]) / 2 for a, b in pairwise(ends)), ends[-1][1]]
        found = []
        for number, group in enumerate(groups):
            names = [group[0].part] if len(parts) > 1 else []
            names += [f"stage {group[0].stage}"] if group[0].part in staged else []
            found.append(Section(" ".join(names), edges[number], edges[number + 1]))
        return found


@dataclass(frozen=True)
class Baseline:
    """What a value would be whatever the images: attention equal over all keys, white noise."""

    name: str
    points: tuple[Point, ...]
    models: tuple[str, ...]

    @property
    def segments(self) -> list[list[Point]]:
        """A stage each where it changes with the stage: another token grid has another baseline."""
        line = [p for p in self.points if p.site != "mid"]
        return _segments(line, lambda a, b: (a.part, a.stage) != (b.part, b.stage) and a.mean != b.mean)


@dataclass(frozen=True)
class TableRow:
    """One line of a panel's table. `points` by model; `baselines` in the panel's order, NaN for none."""

    depth: float
    site: str
    part: str
    stage: str
    layer: str
    points: Mapping[str, Point]
    baselines: tuple[float, ...]


@dataclass(frozen=True)
class Panel:
    """All models' curves on one dataset."""

    dataset: str
    curves: tuple[Curve, ...]
    baselines: tuple[Baseline, ...]

    def table(self) -> list[TableRow]:
        """One row for each depth and site, the models side by side."""
        found: dict[tuple[float, str, str], dict[str, Point]] = {}
        for curve in self.curves:
            for point in curve.points:
                found.setdefault((point.depth, point.site, point.part), {})[curve.model] = point
        base = [{(p.depth, p.site, p.part): p.mean for p in b.points} for b in self.baselines]
        rows = []
        for key in sorted(found, key=lambda k: (k[0], _SITE_ORDER.get(k[1], 0), k[2])):
            points = found[key]
            stages = list(dict.fromkeys(str(p.stage) for p in points.values()))
            layers = list(dict.fromkeys(p.layer for p in points.values()))
            values = tuple(b.get(key, NAN) for b in base)
            rows.append(TableRow(*key, " / ".join(stages), " / ".join(layers), points, values))
        return rows


@dataclass(frozen=True)
class Chart:
    """One metric: a panel a dataset.

    metric:        as asked for, ``nmi:compat=cl-vs-mim``
    value:         the variable that is drawn, ``nmi``
    label:         what it is, in a few words: the name of the axis
    reading:       how to read it, one sentence, "" where the metric says none
    limits:        what it does not show, "" where the metric says nothing
    conventions:   what a reader needs to compare the numbers with another tool's
    interval:      how it was made; "none" where no point has one
    reduced:       how one image's values became one number a layer, "" without inner axes
    others:        further values the results hold
    """

    metric: str
    value: str
    label: str
    units: str
    figure: str
    reading: str
    limits: str
    conventions: Mapping[str, Any]
    interval: str
    reduced: str
    version: str
    pack: str
    panels: tuple[Panel, ...]
    others: tuple[str, ...] = ()


def clean(text: object) -> str:
    """Text that XML can hold and that stays in its place: no control and no writing direction characters."""
    return _TURNING.sub("\ufffd", _UNPRINTABLE.sub("\ufffd", str(text)))


def _segments(points: Sequence[Point], breaks: Callable[[Point, Point], bool]) -> list[list[Point]]:
    found: list[list[Point]] = []
    for point in points:
        if found and not breaks(found[-1][-1], point):
            found[-1].append(point)
        else:
            found.append([point])
    return found
