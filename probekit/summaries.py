"""From per-image values to a result: means, spread and bootstrap intervals over images.

Everything in float64, in image order, with a seeded generator: the same traces give the same bits. The unit
of resampling is the image, because layers and heads of one image aren't independent draws.

NaN means "this row has no such head or index" when a whole column is NaN: the result is NaN there. A column
that is NaN for some images only is summarised over the others, and the variable says so in ``missing``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import xarray as xr

from probekit.errors import MetricError, UsageError
from probekit.metric import Metric, Row, Traces
from probekit.store.sealing import canonical_json

RESAMPLES = 1000
LEVEL = 0.95

_WEIGHTS = 2**20  # bootstrap weights in memory at once (8 MB)
_BLOCK = 2**20  # values converted to float64 at once (8 MB)
_COLUMNS = 4096  # columns bootstrapped in one pass (32 MB of resampled means)


def summarize(metric: Metric, traces: Traces) -> xr.Dataset:
    """The default of `Metric.summarize`.

    For each value ``x`` of ``metric.dims``: ``x`` (layer, *dims), the mean over images; ``x_sd`` (ddof 1) and
    ``x_sem`` over images; ``x_low`` and ``x_high``, the bootstrap interval of the mean; ``x_curve``,
    ``x_curve_low``, ``x_curve_high`` (layer), the same after reducing each image's values over the inner axes
    (``metric.curve``); and, when heads are the only inner axis, ``x_head_sd`` (layer), the standard deviation
    over heads (ddof 0) of ``x``. Constants named like an axis become its coordinates, the others variables
    with ``role="baseline"``. With one image, sd, sem and intervals are NaN.

    Raises MetricError for values or constants whose shape isn't what the metric declares.
    """
    variables: dict[str, xr.Variable] = {}
    sizes: dict[str, int] = {}
    for name, inner in metric.dims.items():
        values = _checked(metric, traces, name)
        for dim, size in zip(inner, values.shape[2:], strict=True):
            if sizes.setdefault(dim, size) != size:
                raise MetricError(f"metric '{metric.name}': axis '{dim}' is {sizes[dim]} and {size} long")
        curve = image_curve(values, metric.curve)
        unit = {"units": metric.units[name]} if name in metric.units else {}
        full, line = summary(values, traces.seed), summary(curve, traces.seed)
        dims = ("layer", *inner)
        attrs = {**unit, "role": "mean"} | ({"missing": full["missing"]} if full["missing"] else {})
        variables[name] = xr.Variable(dims, full["mean"], attrs)
        for part in ("sd", "sem", "low", "high"):
            variables[f"{name}_{part}"] = xr.Variable(dims, full[part], {**unit, "role": part})
        for suffix, part in (("", "mean"), ("_low", "low"), ("_high", "high")):
            variables[f"{name}_curve{suffix}"] = xr.Variable(
                ("layer",), line[part], {**unit, "role": f"curve{suffix}", "reduced": metric.curve}
            )
        if tuple(inner) == ("head",):
            spread = _sd_over_heads(full["mean"])
            variables[f"{name}_head_sd"] = xr.Variable(
                ("layer",), spread, {**unit, "role": "head_sd", "ddof": 0}
            )
    coordinates = {dim: xr.Variable((dim,), np.arange(size)) for dim, size in sizes.items()}
    coordinates |= layer_coordinates(traces.rows)
    for name, constant in traces.constants.items():
        _place(metric, name, np.asarray(constant), len(traces.rows), sizes, variables, coordinates)
    return xr.Dataset(variables, coordinates, result_attributes(metric, traces))


def paired_difference(
    a: Traces, b: Traces, name: str, *, curve: Literal["mean", "last"] = "mean"
) -> xr.Dataset:
    """How far the curve of `name` is higher in `a` than in `b`, on the images both have.

    ``NAME_a``, ``NAME_b`` and ``NAME_difference`` (layer) are means over the common images; the difference
    has ``_sd``, ``_sem``, ``_low``, ``_high``, all from the per-image differences, so that what makes an
    image easy or hard for both cancels. Rows are paired by position. ``NAME_overall`` and its interval are
    the difference of the means over all rows: with different numbers of rows, only these are given.

    Raises UsageError where nothing can be paired.
    """
    for traces in (a, b):
        if name not in traces.values:
            raise UsageError(f"no value '{name}' in the traces", hint=f"there is {', '.join(traces.values)}")
        if len(set(traces.images)) != len(traces.images):
            raise UsageError("images can't be paired: an image id occurs twice")
    position = {image: index for index, image in enumerate(b.images)}
    common = [(i, position[image]) for i, image in enumerate(a.images) if image in position]
    if not common:
        raise UsageError("the two runs have no image in common", hint="compare runs over the same dataset")
    rows_a, rows_b = (list(rows) for rows in zip(*common, strict=True))
    curve_a = image_curve(a.values[name][rows_a], curve)
    curve_b = image_curve(b.values[name][rows_b], curve)
    attrs = {
        "images": len(common),
        "images_a": len(a.images),
        "images_b": len(b.images),
        "interval": _interval_text(a.seed),
        "ddof": 1,
        "curve": curve,
    }
    parts = ("sd", "sem", "low", "high")
    overall = summary(mean_of(curve_a, 1) - mean_of(curve_b, 1), a.seed)
    variables = {f"{name}_overall": xr.Variable((), overall["mean"])}
    variables |= {f"{name}_overall_{part}": xr.Variable((), overall[part]) for part in parts}
    if curve_a.shape[1] != curve_b.shape[1]:
        return xr.Dataset(variables, attrs=attrs)
    difference = summary(curve_a - curve_b, a.seed)
    variables |= {
        f"{name}_a": xr.Variable(("layer",), mean_of(curve_a, 0)),
        f"{name}_b": xr.Variable(("layer",), mean_of(curve_b, 0)),
        f"{name}_difference": xr.Variable(("layer",), difference["mean"]),
    }
    variables |= {f"{name}_difference_{part}": xr.Variable(("layer",), difference[part]) for part in parts}
    coordinates = layer_coordinates(a.rows)
    coordinates["layer_b"] = xr.Variable(("layer",), np.array([row.label for row in b.rows], dtype=np.str_))
    return xr.Dataset(variables, coordinates, attrs)


def summary(values: np.ndarray, seed: int) -> dict[str, Any]:
    """Mean, sd (ddof 1), sem and interval of (images, ...) values, over images, each shaped (...).

    ``missing`` is the largest number of images without a value in a column that has one.
    """
    images, inner = values.shape[0], values.shape[1:]
    flat = values.reshape(images, math.prod(inner))
    mean, sd, count = (np.empty(flat.shape[1]) for _ in range(3))
    width = max(1, _BLOCK // max(1, images))
    for start in range(0, flat.shape[1], width):
        columns = slice(start, start + width)
        mean[columns], sd[columns], count[columns] = _moments(flat[:, columns])
    with np.errstate(invalid="ignore", divide="ignore"):
        sem = sd / np.sqrt(count)
    low, high = bootstrap_interval(flat, seed)
    shaped = {
        key: value.reshape(inner)
        for key, value in {"mean": mean, "sd": sd, "sem": sem, "low": low, "high": high}.items()
    }
    some = count[count > 0]
    return {**shaped, "missing": int(images - some.min()) if some.size else 0}


def bootstrap_interval(
    values: np.ndarray, seed: int, *, resamples: int = RESAMPLES, level: float = LEVEL
) -> tuple[np.ndarray, np.ndarray]:
    """The percentile bootstrap interval of the mean over the first axis of (images, ...): low and high (...).

    One resample draws the same images for every column, so intervals of different columns belong together.
    NaN where a column has fewer than two values, or an infinite one. Memory beside `values` stays below
    about 60 MB.
    """
    images, inner = values.shape[0], values.shape[1:]
    flat = values.reshape(images, math.prod(inner))
    low, high = np.full(flat.shape[1], np.nan), np.full(flat.shape[1], np.nan)
    tail = (1 - level) / 2
    for start in range(0, flat.shape[1], _COLUMNS):
        part = flat[:, start : start + _COLUMNS]
        usable = np.flatnonzero([_resamplable(part[:, column]) for column in range(part.shape[1])])
        if not usable.size:
            continue
        means = resampled_means(part, usable, seed, resamples)
        # NaN only where a resample drew no image that has a value
        bounds = (np.nanquantile if np.isnan(means).any() else np.quantile)(means, [tail, 1 - tail], axis=0)
        low[start + usable], high[start + usable] = bounds
    return low.reshape(inner), high.reshape(inner)


def image_curve(values: np.ndarray, how: Literal["mean", "last"]) -> np.ndarray:
    """One number per image and row: (images, rows, *inner) -> (images, rows) float64.

    ``mean``: over all inner axes without NaN. ``last``: the last value of the one inner axis that isn't NaN.
    Raises MetricError for ``last`` with several inner axes.
    """
    images, rows = values.shape[:2]
    if values.ndim == 2:
        return values.astype(np.float64)
    if how == "last" and values.ndim > 3:
        raise MetricError('a metric with several inner axes can\'t have curve = "last"')
    curve = np.empty((images, rows))
    for row in range(rows):  # a row at a time: the float64 copy stays small
        flat = values[:, row].reshape(images, math.prod(values.shape[2:]))
        if how == "mean":
            curve[:, row] = mean_of(flat.astype(np.float64), 1)
        else:
            present = ~np.isnan(flat)
            last = flat.shape[1] - 1 - np.argmax(present[:, ::-1], axis=1)
            curve[:, row] = np.where(present.any(axis=1), flat[np.arange(images), last], np.nan)
    return curve


def layer_coordinates(rows: Sequence[Row]) -> dict[str, xr.Variable]:
    """The coordinates of a result's layer axis.

    ``stride`` is in input pixels per token; where rows and columns differ it is their geometric mean, and
    ``stride_y`` and ``stride_x`` are there too.
    """
    strides = np.array([row.stride for row in rows], dtype=np.float64).reshape(len(rows), 2)
    columns: dict[str, Any] = {
        "layer": np.array([row.label for row in rows], dtype=np.str_),
        "depth": np.array([row.depth for row in rows], dtype=np.float64),
        "site": np.array([row.site for row in rows], dtype=np.str_),
        "part": np.array([row.part for row in rows], dtype=np.str_),
        "stage": np.array([row.stage for row in rows], dtype=np.int64),
        "heads": np.array([row.heads for row in rows], dtype=np.int64),
        "grid_rows": np.array([row.grid[0] for row in rows], dtype=np.int64),
        "grid_cols": np.array([row.grid[1] for row in rows], dtype=np.int64),
        "stride": np.where(strides[:, 0] == strides[:, 1], strides[:, 0], np.sqrt(strides.prod(axis=1))),
    }
    if np.any(strides[:, 0] != strides[:, 1]):
        columns |= {"stride_y": strides[:, 0], "stride_x": strides[:, 1]}
    units = {name: {"units": "px"} for name in ("stride", "stride_y", "stride_x")}
    return {name: xr.Variable(("layer",), values, units.get(name)) for name, values in columns.items()}


def _resamplable(column: np.ndarray) -> bool:
    return np.count_nonzero(~np.isnan(column)) > 1 and not np.isinf(column).any()


def resampled_means(part: np.ndarray, usable: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """(resamples, usable columns) means, from multinomial weights made a few resamples at a time."""
    images = part.shape[0]
    means = np.empty((resamples, usable.size))
    width = max(1, _BLOCK // images)
    # centred: a constant column then has an interval of exactly its value
    centre = np.concatenate(
        [_moments(part[:, usable[i : i + width]])[0] for i in range(0, usable.size, width)]
    )
    top = 0
    for weights in resampled_weights(images, seed, resamples):
        count = len(weights)
        for left in range(0, usable.size, width):
            columns = slice(left, left + width)
            block = part[:, usable[columns]].astype(np.float64) - centre[columns]
            absent = np.isnan(block)
            total = np.full(block.shape[1], float(images))
            if absent.any():
                block[absent] = 0.0
                total = weights @ (~absent).astype(np.float64)
            with np.errstate(invalid="ignore", divide="ignore"):
                means[top : top + count, columns] = weights @ block / total
        top += count
    means += centre
    return means


def resampled_weights(images: int, seed: int, resamples: int = RESAMPLES) -> Iterator[np.ndarray]:
    """How often each resample draws each image, (some resamples, images) float64 at a time: the same draws
    for every interval with that seed."""
    generator = np.random.Generator(np.random.PCG64(seed))
    height = max(1, min(resamples, _WEIGHTS // images))
    for top in range(0, resamples, height):
        count = min(height, resamples - top)
        drawn = generator.integers(0, images, size=(count, images))
        drawn += images * np.arange(count)[:, None]
        yield np.bincount(drawn.ravel(), minlength=count * images).reshape(count, images).astype(np.float64)


def _moments(block: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, sd (ddof 1) and count of the values that aren't NaN, per column. No warnings."""
    block = block.astype(np.float64)
    present = ~np.isnan(block)
    count = present.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        if not present.all():
            block[~present] = 0.0
        mean = block.sum(axis=0) / count
        block -= mean
        if not present.all():
            block[~present] = 0.0
        np.square(block, out=block)
        sd = np.sqrt(block.sum(axis=0) / (count - 1))
    sd[count < 2] = np.nan
    return mean, sd, count


def mean_of(values: np.ndarray, axis: int) -> np.ndarray:
    """np.nanmean without its warning."""
    present = ~np.isnan(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(present, values, 0.0).sum(axis=axis) / present.sum(axis=axis)


def _sd_over_heads(mean: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.sqrt(mean_of((mean - mean_of(mean, 1)[:, None]) ** 2, 1))


def _checked(metric: Metric, traces: Traces, name: str) -> np.ndarray:
    if name not in traces.values:
        raise MetricError(f"metric '{metric.name}' declares '{name}' but measured no such value")
    values = np.asarray(traces.values[name])
    expected = (len(traces.images), len(traces.rows))
    if values.ndim != 2 + len(metric.dims[name]) or values.shape[:2] != expected:
        raise MetricError(
            f"metric '{metric.name}': '{name}' has shape {values.shape}, expected {expected} and one axis "
            f"for each of {tuple(metric.dims[name])}"
        )
    return values


def _place(
    metric: Metric,
    name: str,
    constant: np.ndarray,
    rows: int,
    sizes: Mapping[str, int],
    variables: dict[str, xr.Variable],
    coordinates: dict[str, xr.Variable],
) -> None:
    """Put a constant where it belongs: an axis's coordinate, or a baseline."""
    if not constant.ndim or constant.shape[0] != rows:
        raise MetricError(
            f"metric '{metric.name}': constant '{name}' has shape {constant.shape}, its first axis isn't the "
            f"{rows} layers"
        )
    unit = {"units": metric.units[name]} if name in metric.units else {}
    if name in sizes:
        if constant.shape != (rows, sizes[name]):
            raise MetricError(
                f"metric '{metric.name}': constant '{name}' has shape {constant.shape}, but the axis "
                f"'{name}' is {sizes[name]} long"
            )
        if rows and np.array_equal(constant, np.broadcast_to(constant[0], constant.shape), equal_nan=True):
            coordinates[name] = xr.Variable((name,), constant[0], unit)
        else:
            coordinates[f"{name}_by_layer"] = xr.Variable(("layer", name), constant, unit)
        return
    if name in variables or name in coordinates:
        raise MetricError(f"metric '{metric.name}': the constant '{name}' has the name of something else")
    variables[name] = xr.Variable(
        ("layer", *_axes(name, constant.shape[1:], metric, sizes)), constant, {**unit, "role": "baseline"}
    )


def _axes(name: str, shape: tuple[int, ...], metric: Metric, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of a baseline: those of the one value that has its shape, else axes of its own."""
    fitting = {tuple(inner) for inner in metric.dims.values() if tuple(sizes[d] for d in inner) == shape}
    if len(fitting) == 1:
        return fitting.pop()
    return tuple(f"{name}_axis{index}" for index in range(len(shape)))


def _interval_text(seed: int) -> str:
    return f"{LEVEL:.0%}".replace("%", " %") + (
        f" percentile bootstrap over images, {RESAMPLES} resamples, seed {seed}"
    )


def result_attributes(metric: Metric, traces: Traces) -> dict[str, Any]:
    return {
        "metric": metric.name,
        "version": metric.version,
        "figure": metric.figure,
        "conventions": canonical_json(dict(metric.conventions)),
        "options": canonical_json(dict(getattr(metric, "options", {}))),
        "images": len(traces.images),
        **({"of": traces.of} if traces.of else {}),
        "interval": _interval_text(traces.seed),
        "ddof": 1,
    }
