"""From a run's results to pictures of plain data: what a depth curve can't show. No drawing, no HTML.

A variable of a result asks to be drawn by its attribute ``picture``, and further ``picture_...`` attributes
say how (docs/plugins.md, "What the report draws"); no metric is known by name here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from probekit.errors import StoreError
from probekit.reports.charts import clean
from probekit.reports.curves import Trouble

if TYPE_CHECKING:
    import xarray as xr

    from probekit.store.runfolder import Run

LAYERS, LINES, CATEGORIES, POSITIONS = 3, 33, 40, 400
COLUMNS, ROWS, SIDE = 6, 6, 64


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


class Unfit(Exception):
    """The attributes of a variable don't fit its axes."""


def pictures(
    run: Run, *, metrics: Sequence[str] = (), models: Sequence[str] = (), datasets: Sequence[str] = ()
) -> tuple[list[Picture], list[Trouble]]:
    """The pictures that the run's finished results ask for, in their order; and those that can't be drawn.

    metrics, models, datasets: only these; all by default
    """
    found: dict[tuple[str, str, str], Picture] = {}
    troubles = []
    for cell in run.cells():
        wanted = ((cell.metric, metrics), (cell.model, models), (cell.dataset, datasets))
        if cell.outcome.status != "done" or not all(name in some for name, some in wanted if some):
            continue
        try:
            result = run.result(cell.metric, model=cell.model, dataset=cell.dataset)
        except StoreError:
            continue  # `charts` lists it
        for name in asking(result):
            key = (cell.metric, cell.dataset, name)
            picture = found[key] if key in found else _begun(result, name, cell.metric, cell.dataset)
            try:
                add(picture, result, cell.model)
            except Unfit as error:
                message = f"its '{name}' can't be drawn as '{picture.kind}': {error}"
                troubles.append(Trouble(cell.model, cell.dataset, cell.metric, message))
                continue
            if picture.panels:
                found[key] = picture
    place = {name: number for number, name in enumerate(run.metrics)}
    return sorted(found.values(), key=lambda p: place[p.metric]), troubles


def asking(result: xr.Dataset) -> list[str]:
    """The variables that ask to be drawn."""
    return [str(name) for name, variable in result.data_vars.items() if "picture" in variable.attrs]


def add(picture: Picture, result: xr.Dataset, model: str) -> None:
    """Add the panels of one model's result. Raises `Unfit`."""
    make = _MAKERS.get(picture.kind)
    if make is None:
        raise Unfit(f"there is {', '.join(_MAKERS)}")
    variable = result[picture.variable]
    if "layer" not in variable.dims or "depth" not in result.coords:
        raise Unfit("it has no axis 'layer' with a depth")
    panels = make(picture, result, variable, model)
    picture.panels += panels
    images = int(result.attrs.get("images", 0))
    if panels and images:
        of = int(result.attrs.get("of", images))
        text = "1 image" if images == 1 else f"{images} images"
        text += f" of {of}" if of != images else ""
        picture.images += [text] if text not in picture.images else []


def named(variable: xr.DataArray, fallback: str) -> str:
    """What an axis or a value is called, with its units."""
    units = str(variable.attrs.get("units", ""))
    name = str(variable.attrs.get("long_name", "")) or fallback.replace("_", " ")
    return clean(f"{name} ({units})" if units and units != "1" else name)


def layer_name(result: xr.Dataset, row: int) -> str:
    """``layer 6``, ``embedding``, ``decoder layer 14``"""
    site = str(result["site"].values[row]) if "site" in result.coords else "out"
    depth = float(result["depth"].values[row])
    name = "output" if site == "output" else f"layer {depth:g}"
    if site == "embed":
        name = "embedding" if depth == 0 else f"embedding after layer {depth:g}"
    parts = _parts(result)
    return clean(name if parts[row] == parts[0] else f"{parts[row]} {name}")


# --- one kind each


def _profile(picture: Picture, result: xr.Dataset, variable: xr.DataArray, model: str) -> list[Panel]:
    if variable.ndim != 2:
        raise Unfit(f"its axes are {_axes(variable)}, not layer and one more")
    (dim,) = (str(d) for d in variable.dims if d != "layer")
    values = variable.transpose("layer", dim).values.astype(np.float64)
    rows = _evenly([r for r in _drawable(result) if np.isfinite(values[r]).any()], LINES)
    by_layer = result.get(f"{dim}_by_layer")
    axis = by_layer if by_layer is not None else result[dim] if dim in result.coords else None
    parts, lines = _parts(result), []
    for row in rows:
        x = np.arange(1.0, values.shape[1] + 1)
        if axis is not None and axis.dtype.kind in "fiu":
            x = (axis.values[row] if by_layer is not None else axis.values).astype(np.float64)
        there = np.flatnonzero(np.isfinite(x) & np.isfinite(values[row]))
        there = there[_evenly(range(len(there)), POSITIONS)]
        depth = float(result["depth"].values[row])
        lines.append(Line(layer_name(result, row), depth, parts[row], x[there], values[row, there]))
    picture.across, picture.up = named(axis, dim) if axis is not None else dim, _value(picture)
    if not lines:
        return []
    _note(picture, "A line a layer, lighter with depth")
    second = tuple(dict.fromkeys(line.part for line in lines if line.part != lines[0].part))
    if second:
        _note(picture, f"Dashed: {', '.join(clean(part) for part in second)}")
    return [Profile(model, tuple(lines), second)]


def _matrix(picture: Picture, result: xr.Dataset, variable: xr.DataArray, model: str) -> list[Panel]:
    dims = [str(d) for d in variable.dims]
    if len(dims) not in (2, 3) or dims[-2] != "layer":
        raise Unfit(f"its axes are {_axes(variable)}, not [one,] layer and one more")
    panels: list[Panel] = []
    for number in range(variable.shape[0] if len(dims) == 3 else 1):
        one = variable[number] if len(dims) == 3 else variable
        values = one.values.astype(np.float64)
        rows, columns = np.isfinite(values).any(1), np.isfinite(values).any(0)
        if not rows.any():
            continue
        beside = _labels(result, dims[0])[number] if len(dims) == 3 else ""
        places, across = _places(result, dims, number)
        panel = Matrix(
            model, beside, values[rows][:, columns], result["depth"].values[rows], places[columns]
        )
        if not any(_mirrored(panel, old) for old in picture.panels):
            panels.append(panel)
        picture.across, picture.up = across, "depth (attention layer)"
    if panels:
        _note(picture, "One colour scale for all panels")
    return panels


def _dots(picture: Picture, result: xr.Dataset, variable: xr.DataArray, model: str) -> list[Panel]:
    if variable.ndim != 2:
        raise Unfit(f"its axes are {_axes(variable)}, not layer and one more")
    (dim,) = (str(d) for d in variable.dims if d != "layer")
    values = variable.transpose("layer", dim).values.astype(np.float64)
    rows = [r for r in _first_part(result) if np.isfinite(values[r]).any()]
    if not rows:
        return []
    row, shown = rows[-1], slice(0, CATEGORIES)
    ends = [_like(result, f"{picture.variable}_{end}", variable)[row] for end in ("low", "high")]
    whole = str(variable.attrs.get("picture_line", ""))
    if whole and (whole not in result or result[whole].dims != ("layer",)):
        raise Unfit(f"picture_line is '{whole}', no variable over layers")
    line = float(result[whole].values[row]) if whole else np.nan
    labels = tuple(_labels(result, dim))
    picture.across = _value(picture)
    _note(picture, "At the last layer")
    if whole:
        _note(picture, f"Vertical lines: {whole.replace('_', ' ')}, over all")
    if np.isfinite(ends).any():
        _note(picture, "Bars: 95 % intervals")
    if len(labels) > CATEGORIES:
        _note(picture, f"The first {CATEGORIES} of {len(labels)}")
    bounds = (end[shown] for end in ends)
    return [Dots(model, layer_name(result, row), labels[shown], values[row, shown], *bounds, line)]


def _points(picture: Picture, result: xr.Dataset, variable: xr.DataArray, model: str) -> list[Panel]:
    if variable.dims[0] != "layer" or variable.ndim < 3 or variable.shape[-1] < 2:
        raise Unfit(f"its axes are {_axes(variable)}, not layer, [groups,] points and 2 or more axes")
    attrs = variable.attrs
    later, colour, share = (str(attrs.get(f"picture_{n}", "")) for n in ("with", "colour", "share"))
    for name, dims in (
        (later, variable.dims),
        (colour, (variable.dims[-2],)),
        (share, ("layer", variable.dims[-1])),
    ):
        if name and (name not in result or result[name].dims != dims):
            raise Unfit(f"it names '{name}', no variable over {', '.join(map(str, dims))}")
    values, after = variable.values, result[later].values if later else None
    groups = [str(d) for d in variable.dims[1:-2]]
    names = _labels(result, groups[0]) if len(groups) == 1 else None
    labels = np.array([clean(v) for v in result[colour].values]) if colour else None
    scatters = []
    for row in _chosen(result, [np.isfinite(v).any() for v in values]):
        clouds = []
        for number, (points, moved) in enumerate(_clouds(values[row], after[row] if later else None)):
            name = names[number] if names else ""
            for one in dict.fromkeys(labels.tolist()) if labels is not None else [None]:
                mine = np.isfinite(points).any(1) & (True if one is None else labels == one)
                kept = points[mine], moved[mine] if moved is not None else None
                if mine.any():
                    clouds.append(Cloud(" ".join(filter(None, (name, one or ""))), *kept))
        shares = result[share].values[row] if share else np.full(values.shape[-1], np.nan)
        axes = tuple(
            f"axis {n}" + (f" ({100 * s:.0f} %)" if np.isfinite(s) else "") for n, s in enumerate(shares, 1)
        )
        scatters.append(Scatter(layer_name(result, row), axes, tuple(clouds)))
    if not scatters:
        return []
    if later:
        _note(picture, f"Pale: {picture.variable.replace('_', ' ')}; full: {later.replace('_', ' ')}")
        _note(picture, "An arrow joins the means")
    if share:
        _note(picture, "In brackets: the share of the variance an axis holds")
    _note(picture, _which_layers(result, scatters))
    return [Points(model, tuple(scatters))]


def _maps(picture: Picture, result: xr.Dataset, variable: xr.DataArray, model: str) -> list[Panel]:
    dims = [str(d) for d in variable.dims]
    outer = dims[:-2]
    down, along = (str(variable.attrs.get(f"picture_{n}", "")) for n in ("rows", "columns"))
    for dim in filter(None, (down, along)):
        if dim not in outer or down == along:
            raise Unfit(f"it names the axis '{dim}', its axes are {_axes(variable)}")
    marked = str(variable.attrs.get("picture_mark", "")).split()
    if marked and (len(marked) != 2 or any(m not in result for m in marked)):
        raise Unfit("picture_mark names two variables, row and column")
    fixed = [dim for dim in outer if dim not in (down, along, "layer")]
    values = variable.isel(dict.fromkeys(fixed, 0))
    values = values.transpose("layer", *(d for d in (down, along) if d and d != "layer"), *dims[-2:])
    there = np.isfinite(values.values.reshape(len(values), -1)).any(1)
    if not there.any():
        return []
    in_layers = "layer" not in (down, along)
    rows = (
        _chosen(result, there)
        if in_layers
        else _evenly([r for r in _first_part(result) if there[r]], COLUMNS)
    )
    blocks = []
    for row in rows:
        maps = _cut(result, values.values[row], dims[-2:], row)
        inner = [d for d in (down, along) if d and d != "layer"]
        maps = maps.reshape((1,) * (4 - maps.ndim) + maps.shape if down in inner else maps.shape)
        if along and along in inner and down not in inner:
            maps = maps.reshape(1, *maps.shape)
        if down in inner and along not in inner:
            maps = maps.reshape(maps.shape[-3], 1, *maps.shape[-2:])
        maps = maps.reshape((-1, *maps.shape[-3:])) if maps.ndim > 2 else maps[None, None]
        present = [np.flatnonzero(np.isfinite(maps).any((2, 3)).any(axis)) for axis in (1, 0)]
        shown = [
            np.array(_evenly(list(p), most)) for p, most in zip(present, (ROWS, COLUMNS), strict=True)
        ]
        marks = [_mark(result, marked, row, int(r)) if down in inner else None for r in shown[0]]
        names = [
            [f"{d} {n}" if n.isdecimal() else n for n in np.array(_labels(result, d))[some]]
            if (d := dim) in inner
            else [""] * len(some)
            for dim, some in zip((down, along), shown, strict=True)
        ]
        maps = _small(maps[shown[0]][:, shown[1]])
        blocks.append(Block(layer_name(result, row), *map(tuple, names), maps, tuple(marks)))
        if len(shown[1]) < len(present[1]):
            _note(picture, f"At most {COLUMNS} of an axis are shown")
    if not in_layers:
        blocks = _joined(blocks, down == "layer")
    for dim in fixed:
        _note(picture, f"{dim.replace('_', ' ')}: {_labels(result, dim)[0]}")
    _note(picture, "Each map has its own colour scale, from 0 or its least (dark) to its largest value")
    if marked:
        _note(picture, "Box: where it looks from")
    _note(picture, _which_layers(result, blocks if in_layers else []))
    return [Maps(model, tuple(blocks))]


_MAKERS: Mapping[str, Callable[[Picture, Any, Any, str], list[Panel]]] = {
    "profile": _profile,
    "matrix": _matrix,
    "dots": _dots,
    "points": _points,
    "maps": _maps,
}
