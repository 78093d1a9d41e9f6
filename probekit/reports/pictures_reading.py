"""From a variable of a result, and its attributes, to panels: docs/plugins.md, "What the report draws"."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from probekit.reports.charts import clean
from probekit.reports.pictures_panels import (
    Block,
    Cloud,
    Dots,
    Line,
    Maps,
    Matrix,
    Panel,
    Picture,
    Points,
    Profile,
    Scatter,
)

if TYPE_CHECKING:
    import xarray as xr

LAYERS = 3
"""Layers drawn of a picture that needs much room: first, middle, last."""

LINES, POSITIONS, CATEGORIES = 33, 400, 40
COLUMNS, ROWS, SIDE = 6, 6, 64


class Unfit(Exception):
    """The attributes of a variable don't fit its axes."""


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
        text = f"Measured on {images}" + (f" of {of}" if of != images else "")
        text += " image" if max(images, of) == 1 else " images"
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
    picture.across = named(axis, dim) if axis is not None else dim
    picture.up = named(variable, picture.variable)
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
        places, across = _positions(result, dims, number)
        panel = Matrix(model, beside, values[rows][:, columns], result["depth"].values[rows], places[columns])
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
    picture.across = named(variable, picture.variable)
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
    for row in _evenly([r for r in _first_part(result) if np.isfinite(values[r]).any()], LAYERS):
        clouds = []
        for number, (points, moved) in enumerate(_clouds(values[row], after[row] if later else None)):
            name = names[number] if names else ""
            there = np.isfinite(points).any(1)
            for one in dict.fromkeys(labels.tolist()) if labels is not None else [None]:
                mine = there if one is None else there & (labels == one)
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
    down, along = (str(variable.attrs.get(f"picture_{n}", "")) for n in ("rows", "columns"))
    for dim in filter(None, (down, along)):
        if dim not in dims[:-2] or down == along:
            raise Unfit(f"it names the axis '{dim}', its axes are {_axes(variable)}")
    marked = str(variable.attrs.get("picture_mark", "")).split()
    if marked and (len(marked) != 2 or any(m not in result or result[m].ndim > 2 for m in marked)):
        raise Unfit("picture_mark isn't two variables, row and column of a token")
    fixed = [dim for dim in dims[:-2] if dim not in (down, along, "layer")]
    inner = [dim for dim in (down, along) if dim and dim != "layer"]
    values = variable.isel(dict.fromkeys(fixed, 0)).transpose("layer", *inner, *dims[-2:]).values
    there = np.isfinite(values.reshape(len(values), -1)).any(1)
    by_layer = "layer" not in (down, along)
    first = [row for row in _first_part(result) if there[row]]
    blocks = []
    for row in _evenly(first, LAYERS if by_layer else COLUMNS):
        sizes = [variable.sizes[dim] if dim in inner else 1 for dim in (down, along)]
        maps = _cut(result, values[row].reshape(*sizes, *values.shape[-2:]), dims[-2:], row)
        full = np.isfinite(maps).any((2, 3))
        shown = [_evenly(np.flatnonzero(full.any(axis)), most) for axis, most in ((1, ROWS), (0, COLUMNS))]
        names = [
            _numbered(result, dim, some) if dim in inner else [""]
            for dim, some in zip((down, along), shown, strict=True)
        ]
        marks = [_mark(result, marked, row, number if down in inner else 0) for number in shown[0]]
        maps = _small(maps[shown[0]][:, shown[1]])
        blocks.append(Block(layer_name(result, row), tuple(names[0]), tuple(names[1]), maps, tuple(marks)))
        for axis, dim in enumerate((down, along)):
            if len(shown[axis]) < full.any(1 - axis).sum():
                _note(
                    picture, f"Not more than {len(shown[axis])} {dim.replace('_', ' ')}s of a layer are shown"
                )
    if not blocks:
        return []
    if by_layer:
        _note(picture, _which_layers(result, blocks))
    else:
        blocks = [_joined(blocks, down == "layer")]
    for dim in fixed:
        _note(picture, f"One {dim.replace('_', ' ')} of {variable.sizes[dim]}: {_labels(result, dim)[0]}")
    _note(picture, "Colours: each map from 0 (dark) to its largest value, nothing where nothing is")
    if marked:
        _note(picture, "Box: the token that looks")
    return [Maps(model, tuple(blocks))]


_MAKERS: Mapping[str, Callable[[Picture, xr.Dataset, xr.DataArray, str], list[Panel]]] = {
    "profile": _profile,
    "matrix": _matrix,
    "dots": _dots,
    "points": _points,
    "maps": _maps,
}

# --- helpers


def _note(picture: Picture, text: str) -> None:
    """Unless it is there already, or one that says more: "... layer" beside "... layer of the encoder"."""
    if text and not any(note.startswith(text) for note in picture.notes):
        picture.notes[:] = [note for note in picture.notes if not text.startswith(note)] + [text]


def _axes(variable: xr.DataArray) -> str:
    return ", ".join(map(str, variable.dims))


def _parts(result: xr.Dataset) -> list[str]:
    if "part" not in result.coords:
        return [""] * result.sizes["layer"]
    return [str(part) for part in result["part"].values]


def _drawable(result: xr.Dataset) -> list[int]:
    """Rows that aren't between attention and MLP."""
    sites = result["site"].values if "site" in result.coords else [""] * result.sizes["layer"]
    return [row for row, site in enumerate(sites) if site != "mid"]


def _first_part(result: xr.Dataset) -> list[int]:
    """Drawable rows of the model's first part, its encoder."""
    parts, rows = _parts(result), _drawable(result)
    return [row for row in rows if parts[row] == parts[rows[0]]] if rows else []


def _evenly(given: Sequence[int], count: int) -> list[int]:
    """At most `count` of them, the first and the last among these."""
    given = list(given)
    if len(given) <= count:
        return given
    return [given[round(i)] for i in np.linspace(0, len(given) - 1, count)]


def _which_layers(result: xr.Dataset, shown: Sequence[Block | Scatter]) -> str:
    """Says that not all layers are shown, where they aren't."""
    if len(shown) >= len(_drawable(result)):
        return ""
    parts = [part for part in dict.fromkeys(_parts(result)) if part]
    of = f" of the {parts[0]}" if len(parts) > 1 else ""
    return clean(f"First, middle and last layer{of}")


def _labels(result: xr.Dataset, dim: str) -> list[str]:
    """What the entries of an axis are called: its coordinate, else numbers."""
    if dim in result.coords:
        return [clean(f"{v:g}" if isinstance(v, float) else v) for v in result[dim].values]
    return [str(number) for number in range(result.sizes[dim])]


def _numbered(result: xr.Dataset, dim: str, some: Sequence[int]) -> list[str]:
    """``head 3``: numbers alone say too little."""
    labels = _labels(result, dim)
    return [f"{dim.replace('_', ' ')} {labels[n]}" if labels[n].isdecimal() else labels[n] for n in some]


def _like(result: xr.Dataset, name: str, variable: xr.DataArray) -> np.ndarray:
    """A variable of the same axes, (layer, ...); NaN where there is none."""
    if name in result and result[name].dims == variable.dims:
        return result[name].transpose("layer", ...).values.astype(np.float64)
    return np.full(variable.transpose("layer", ...).shape, np.nan)


def _positions(result: xr.Dataset, dims: Sequence[str], number: int) -> tuple[np.ndarray, str]:
    """Numbers along a matrix's last axis, and its name: the first numeric coordinate of that axis."""
    for name, coordinate in result.coords.items():
        if coordinate.dtype.kind not in "fiu":
            continue
        if coordinate.dims == (dims[-1],):
            return coordinate.values.astype(np.float64), named(coordinate, str(name))
        if len(dims) == 3 and coordinate.dims == (dims[0], dims[-1]):
            return coordinate.values[number].astype(np.float64), named(coordinate, str(name))
    return np.arange(1.0, result.sizes[dims[-1]] + 1), clean(dims[-1].replace("_", " "))


def _mirrored(new: Matrix, old: Panel) -> bool:
    """Whether a panel is another one's transpose, which two models' similarity is."""
    return (
        isinstance(old, Matrix)
        and (new.model, new.beside) == (old.beside, old.model)
        and new.values.shape == old.values.T.shape
        and np.allclose(new.values, old.values.T, rtol=1e-6, atol=1e-6, equal_nan=True)
    )


def _clouds(points: np.ndarray, after: np.ndarray | None) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """(..., n, axes) -> a list over what stands before, with the same of `after`."""
    flat = points.reshape(-1, *points.shape[-2:])
    moved = [None] * len(flat) if after is None else list(after.reshape(-1, *after.shape[-2:]))
    return list(zip(flat, moved, strict=True))


def _cut(result: xr.Dataset, maps: np.ndarray, dims: Sequence[str], row: int) -> np.ndarray:
    """Only the rows and columns that this layer has, where ``DIM_by_layer`` says so."""
    for axis, dim in zip((-2, -1), dims, strict=True):
        if f"{dim}_by_layer" in result.coords:
            count = int(np.isfinite(result[f"{dim}_by_layer"].values[row]).sum())
            maps = maps.take(range(count), axis)
    return maps


def _small(maps: np.ndarray) -> np.ndarray:
    """At most `SIDE` to a side: a report isn't the place for more."""
    steps = [-(-side // SIDE) for side in maps.shape[-2:]]
    return maps[..., :: steps[0], :: steps[1]]


def _mark(
    result: xr.Dataset, marked: Sequence[str], row: int, number: int
) -> tuple[float, float, float, float] | None:
    """The box of a token, as shares of the map."""
    if not marked or not {"grid_rows", "grid_cols"} <= set(result.coords):
        return None
    grid = [int(result[f"grid_{axis}"].values[row]) for axis in ("rows", "cols")]
    place = [float(np.ravel(result[name].values[row])[number]) for name in marked]
    if min(grid) < 1 or not np.isfinite(place).all():
        return None
    return place[0] / grid[0], place[1] / grid[1], 1 / grid[0], 1 / grid[1]


def _joined(blocks: Sequence[Block], down: bool) -> Block:
    """Blocks of one layer each as one, layers down or along; smaller maps are filled up with nothing."""
    height, width = (max(block.maps.shape[axis] for block in blocks) for axis in (2, 3))
    titles = tuple(block.title for block in blocks)
    filled = []
    for block in blocks:
        room = [(0, 0), (0, 0), (0, height - block.maps.shape[2]), (0, width - block.maps.shape[3])]
        filled.append(np.pad(block.maps, room, constant_values=np.nan))
    maps = np.concatenate(filled, axis=0 if down else 1)
    one = blocks[0]
    if down:
        return Block("", titles, one.columns, maps, tuple(mark for block in blocks for mark in block.marks))
    return Block("", one.rows, titles, maps, one.marks)
