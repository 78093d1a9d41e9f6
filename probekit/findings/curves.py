"""Reading a run's results as curves over the encoder's layers, per image where the run keeps such values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from probekit.errors import StoreError
from probekit.findings.finding import NotMeasured
from probekit.findings.quantities import Quantity, reduced
from probekit.names import quoted
from probekit.summaries import mean_of

if TYPE_CHECKING:
    import xarray as xr

    from probekit.store.runfolder import Run

_SITES = ("attention", "out")  # layers; not the embedding, nor the sites between attention and MLP


@dataclass(frozen=True)
class Curves:
    """A quantity of one model over the layers of its encoder.

    mean:      (rows,)
    low, high: (rows,) the result's own interval, NaN where it has none
    values:    (images, rows), of `images`; None where the run keeps none per image
    numbers:   (rows,) layers, from 1
    place:     (rows,) relative depth, see `probekit.findings.spans`
    at:        where on an inner axis it was taken, one number a row; empty for a mean
    images:    ids, in the order of `values`
    prints:    fingerprint of the images
    """

    model: str
    units: str
    version: int
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    values: np.ndarray | None
    numbers: np.ndarray
    place: np.ndarray
    at: tuple[float, ...]
    images: tuple[str, ...]
    prints: str = ""
    resampled: dict[tuple[str, ...], np.ndarray] = field(default_factory=dict, compare=False, repr=False)
    """Resampled means by the images they are over: several findings read the same."""


def read_curves(
    run: Run, dataset: str, model: str, quantity: Quantity, command: Callable[..., str]
) -> Curves:
    """A model's curves of a quantity.

    command: the command that measures metrics it is given

    Raises `NotMeasured` for whatever stands in the way, a damaged file too.
    """
    metric = chosen_metric(run, quantity.metric, command)
    try:
        result = _finished(run, dataset, model, metric, command)
        return _curves(run, dataset, model, metric, quantity, result)
    except StoreError as error:
        raise NotMeasured(error.message, hint=error.hint) from error


def chosen_metric(run: Run, name: str, command: Callable[..., str]) -> str:
    """The run's metric of that name: the plain one, or the only one with options. Raises `NotMeasured`."""
    if name in run.metrics:
        return name
    near = [m for m in run.metrics if m.rpartition("/")[2].partition(":")[0] == name]
    if len(near) == 1:
        return near[0]
    if near:
        others = ", ".join(map(quoted, near))
        raise NotMeasured(
            f"{quoted(name)} was measured with several options: {others}", hint=command(name), metrics=[name]
        )
    raise NotMeasured(f"the run has no {quoted(name)}", hint=command(name), metrics=[name])


def _finished(run: Run, dataset: str, model: str, metric: str, command: Callable[..., str]) -> xr.Dataset:
    folder = run.folder(model, dataset)
    end = folder.outcome(metric)
    what = f"{quoted(metric)} of {quoted(model)}"
    if end.status == "done" and folder.result(metric).exists():
        return run.result(metric, model=model, dataset=dataset)
    if end.status in ("done", "unfinished"):
        raise NotMeasured(f"{what} is not measured yet", hint=command(metric), metrics=[metric])
    raise NotMeasured(f"{what} {_VERBS[end.status]}: {end.reason}", hint=end.hint)


_VERBS = {"failed": "failed", "does not apply": "does not apply"}


def _curves(
    run: Run, dataset: str, model: str, metric: str, quantity: Quantity, result: xr.Dataset
) -> Curves:
    value = quantity.name
    what = f"{quoted(metric)} of {quoted(model)}"
    if value not in result or result[value].dims[:1] != ("layer",) or "depth" not in result.coords:
        raise NotMeasured(f"the result of {what} has no value {quoted(value)} over layers")
    rows = _layers(result)
    try:
        images, values, places = _per_image(run, dataset, model, metric, quantity, result)
        mean, low, high, at = _of_result(quantity, result)
    except ValueError as error:
        raise NotMeasured(f"{quoted(value)} of {what} can't be read so: {error}") from error
    if values is not None:
        mean = mean_of(values, 0)
    rows &= ~np.isnan(mean)
    if not rows.any():
        raise NotMeasured(f"{what} has no value at any layer of the encoder")
    depth = np.ceil(result["depth"].values.astype(np.float64))  # "mid" lies half a layer before its end
    last = depth[_layers(result)].max()
    about = run.about(model, dataset)
    return Curves(
        model,
        "" if (units := str(result[value].attrs.get("units", ""))) == "1" else units,
        int(result.attrs.get("version", 1)),
        mean[rows],
        low[rows],
        high[rows],
        None if values is None else values[:, rows],
        depth[rows],
        (depth[rows] - 0.5) / last,
        tuple(sorted(set(places or at))),
        tuple(images),
        str(about.get("identity", {}).get("images", "")),
    )


def _layers(result: xr.Dataset) -> np.ndarray:
    """Which rows are layers of the encoder; of a model without a part of that name, of its first part."""
    rows = result.sizes["layer"]
    site, part = (
        result[name].values.astype(str) if name in result.coords else np.full(rows, default)
        for name, default in (("site", "out"), ("part", "encoder"))
    )
    wanted = "encoder" if "encoder" in part else part[0]
    layers = np.isin(site, _SITES) & (part == wanted)
    # a metric of what attention adds may stand at the sites after it alone
    return layers if layers.any() else (site == "mid") & (part == wanted)


def _per_image(
    run: Run, dataset: str, model: str, metric: str, quantity: Quantity, result: xr.Dataset
) -> tuple[list[str], np.ndarray | None, list[float]]:
    """Image ids, (images, rows) and where on the inner axis; None for values where the run keeps none."""
    path = run.folder(model, dataset).trace(metric, int(result.attrs.get("version", 1)))
    how = quantity.inner or str(result.get(f"{quantity.name}_curve", result).attrs.get("reduced", "mean"))
    if (path / "rows.json").exists() and how not in ("mean", "last", quantity.inner):
        return [], None, []  # a curve of the metric's own making: only its result has it
    if (path / "rows.json").exists():
        traces = run.traces(metric, model=model, dataset=dataset)
        if quantity.name in traces.values and len(traces.rows) == result.sizes["layer"]:
            found = traces[quantity.name]
            axis = result[quantity.name].dims[1:]
            coordinate = traces.constants.get(str(axis[0])) if len(axis) == 1 else None
            if coordinate is None and len(axis) == 1 and axis[0] in result.coords:
                coordinate = result[axis[0]].values
            values, places = reduced(found, how, coordinate)
            return list(traces.images), values, places
    if how in ("mean", "last", quantity.inner) and quantity.name == quantity.metric:
        for scores in _scores(result):
            # only where these are what the value is the mean of
            if scores.shape[1:] == result[quantity.name].shape and np.allclose(
                scores.mean(axis=0), result[quantity.name].values, atol=1e-3, equal_nan=True
            ):
                coordinate = result[result[quantity.name].dims[-1]].values if scores.ndim == 3 else None
                values, places = reduced(scores, how, coordinate)
                return [str(i) for i in result["image"].values], values, places
    return [], None, []


def _scores(result: xr.Dataset) -> Iterator[np.ndarray]:
    """(images, layer, ...) in percent: whether each image was right, and how far noise made it wrong."""
    if "image" not in result.coords or "correct" not in result or result["correct"].dims[-1:] != ("image",):
        return
    correct = 100.0 * np.moveaxis(result["correct"].values.astype(np.float64), -1, 0)
    yield correct
    if "correct_noisy" in result and result["correct_noisy"].dims[-1:] == ("image",):
        noisy = np.moveaxis(result["correct_noisy"].values.astype(np.float64), -1, 0)
        if noisy.ndim == correct.ndim + 1:
            yield correct[..., None] - 100.0 * noisy / float(result.attrs.get("seeds", 1))


def _of_result(quantity: Quantity, result: xr.Dataset) -> tuple[np.ndarray, ...]:
    """Mean, low and high (rows,) of the result, and where on the inner axis they were taken."""
    name, rows = quantity.name, result.sizes["layer"]
    unknown = np.full(rows, math.nan)
    variable = result[name]
    if quantity.inner is None and f"{name}_curve" in result:
        names = [f"{name}_curve{end}" for end in ("", "_low", "_high")]
        columns = [result[n].values.astype(np.float64) if n in result else unknown for n in names]
        return (*columns, [])
    coordinate = None
    if variable.ndim == 2:
        (axis,) = variable.dims[1:]
        known = result.coords.get(f"{axis}_by_layer", result.coords.get(axis))
        coordinate = None if known is None else known.values
    how = quantity.inner or "mean"
    mean, places = reduced(variable.values[None], how, coordinate)
    columns = [mean[0]]
    for end in ("low", "high"):
        bound = result.get(f"{name}_{end}")
        usable = bound is not None and (variable.ndim == 1 or (quantity.inner and quantity.inner.averages))
        columns.append(reduced(bound.values[None], how, coordinate)[0][0] if usable else unknown)
    return (*columns, places)
