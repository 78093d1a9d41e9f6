"""From a run's results to charts of plain data: every report may start from `charts`. No drawing, no HTML."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from probekit.errors import StoreError
from probekit.reports.charts import Baseline, Chart, Curve, Panel, Point, clean

if TYPE_CHECKING:
    import xarray as xr

    from probekit.store.runfolder import Run


@dataclass(frozen=True)
class Trouble:
    """A result that exists and can't be drawn."""

    model: str
    dataset: str
    metric: str
    message: str
    hint: str = ""


@dataclass
class _Found:
    """One metric's results while they are gathered."""

    first: xr.Dataset
    value: str
    panels: dict[str, list[tuple[Curve, xr.Dataset]]] = field(default_factory=dict)


def charts(
    run: Run, *, metrics: Sequence[str] = (), models: Sequence[str] = (), datasets: Sequence[str] = ()
) -> tuple[list[Chart], list[Trouble]]:
    """The run's finished results as charts, in the order asked for; and those that can't be read or drawn.

    metrics, models, datasets: only these; all by default
    """
    found: dict[str, _Found] = {}
    troubles = []
    for cell in run.cells():
        wanted = all(
            name in some
            for name, some in ((cell.metric, metrics), (cell.model, models), (cell.dataset, datasets))
            if some
        )
        if cell.outcome.status != "done" or not wanted:
            continue
        where = (cell.model, cell.dataset, cell.metric)
        try:
            result = run.result(cell.metric, model=cell.model, dataset=cell.dataset)
        except StoreError as error:
            troubles.append(Trouble(*where, error.message, error.hint or ""))
            continue
        value = main_value(result)
        if value is None or "depth" not in result.coords or "layer" not in result[value].dims:
            troubles.append(Trouble(*where, "its result has no value over layers to draw"))
            continue
        try:
            curve = curve_of(result, value, cell.model)
        except (ValueError, TypeError, KeyError, IndexError) as error:  # a plugin's result of another shape
            troubles.append(Trouble(*where, f"its '{value}' can't be drawn over layers: {error}"))
            continue
        gathered = found.setdefault(cell.metric, _Found(result, value))
        if value != gathered.value:
            troubles.append(
                Trouble(*where, f"its value is '{value}', the other models' is '{gathered.value}'")
            )
            continue
        gathered.panels.setdefault(cell.dataset, []).append((curve, result))
    return [_chart(name, found[name], run.datasets) for name in run.metrics if name in found], troubles


def main_value(result: xr.Dataset) -> str | None:
    """The variable a result is about: named like its metric, else the first mean; None without any."""
    name = str(result.attrs.get("metric", ""))
    if name in result.data_vars:
        return name
    means = values_of(result)
    return means[0] if means else None


def values_of(result: xr.Dataset) -> list[str]:
    """The values a result holds, without their spread, intervals and curves."""
    return [str(name) for name, variable in result.data_vars.items() if variable.attrs.get("role") == "mean"]


def curve_of(result: xr.Dataset, value: str, model: str) -> Curve:
    """One model's curve of one value of a result.

    A result without ``VALUE_curve`` (a metric with a `summarize` of its own) is averaged over its inner axes
    and has no interval.
    """
    name = f"{value}_curve"
    if name in result:
        columns = [result[name].values, *(_column(result, f"{name}_{end}") for end in ("low", "high"))]
    else:
        columns = [_reduced(result[value], "mean"), _column(result, ""), _column(result, "")]
    columns.append(_column(result, f"{value}_head_sd"))
    points = _points(result, columns)
    images = result.attrs.get("images", 0)
    place = _place(result, value, _reduction(result, value))
    return Curve(model, points, int(images), f"{value}_sem" in result, place)


def baselines_of(result: xr.Dataset, value: str) -> list[tuple[str, tuple[Point, ...]]]:
    """The baselines of one value: ``(name, points)``.

    With values ``nmi`` and ``nmi_global``, ``uniform_global`` belongs to the latter and ``uniform`` to the
    former: a baseline that ends like no other value is the main one's.
    """
    main = main_value(result) or value
    suffixes = {v: v.removeprefix(main) for v in values_of(result) if v != main and v.startswith(f"{main}_")}
    found = []
    for name, variable in result.data_vars.items():
        if variable.attrs.get("role") != "baseline" or variable.dims[:1] != ("layer",):
            continue
        if variable.dtype.kind not in "fiu":
            continue
        owner = next((v for v, suffix in suffixes.items() if str(name).endswith(suffix)), main)
        if owner != value or (variable.ndim > 1 and variable.dims[1:] != result[value].dims[1:]):
            continue
        label = str(name).removesuffix(suffixes.get(owner, "")).replace("_", " ")
        column = _reduced(variable, _reduction(result, value))
        found.append((label, _points(result, [column, *[_column(result, "")] * 3])))
    return found


def conventions_of(result: xr.Dataset) -> dict[str, Any]:
    """A result's conventions, however they were stored."""
    found = result.attrs.get("conventions", {})
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except ValueError:
            found = {"conventions": found}
    return dict(found) if isinstance(found, Mapping) else {}


# --- helpers


def _chart(metric: str, found: _Found, order: Sequence[str]) -> Chart:
    first, value = found.first, found.value
    conventions = conventions_of(first)
    reading, limits = (
        str(conventions.pop(key, "") or first.attrs.get(key, "")) for key in ("reading", "does_not_show")
    )
    panels = []
    for dataset in sorted(found.panels, key=list(order).index):
        results = found.panels[dataset]
        panels.append(Panel(dataset, tuple(curve for curve, _ in results), _baselines(results, value)))
    drawn = f"{value}_curve" if f"{value}_curve" in first else value
    units = str(first[drawn].attrs.get("units", first[value].attrs.get("units", "")))
    points = [p for panel in panels for curve in panel.curves for p in curve.points]
    has_interval = any(np.isfinite(p.low) for p in points)
    return Chart(
        metric,
        value,
        clean(first[drawn].attrs.get("long_name", "") or value.replace("_", " ")),
        "" if units == "1" else units,
        str(first.attrs.get("figure", "") or ""),
        reading,
        limits,
        conventions,
        str(first.attrs.get("interval", "")) if has_interval else "none",
        _reduction(first, value) if first[value].ndim > 1 else "",
        str(first.attrs.get("version", "")),
        str(first.attrs.get("pack", "")),
        tuple(panels),
        tuple(v for v in values_of(first) if v != value),
    )


def _baselines(results: Iterable[tuple[Curve, xr.Dataset]], value: str) -> tuple[Baseline, ...]:
    """Each baseline once, where models share it; a model with fewer layers shares the longer one's."""
    drawn: list[Baseline] = []
    for model, result in ((curve.model, result) for curve, result in results):
        for name, points in baselines_of(result, value):
            if all(np.isnan(p.mean) for p in points):
                continue
            new = Baseline(name, points, (model,))
            for number, old in enumerate(drawn):
                wide = _wider(old, new) if old.name == name else None
                if wide is not None:
                    drawn[number] = Baseline(name, wide, (*old.models, model))
                    break
            else:
                drawn.append(new)
    return tuple(drawn)


def _wider(a: Baseline, b: Baseline) -> tuple[Point, ...] | None:
    """The points of the longer of two that are one: the same constant, or equal where both are."""
    short, long = sorted((a.points, b.points), key=len)
    known = {(p.depth, p.site, p.part): p.mean for p in long}
    first = next((p.mean for p in long if not np.isnan(p.mean)), np.nan)
    constant = all(np.isnan(p.mean) or np.isclose(p.mean, first, 1e-6, 1e-9) for p in (*short, *long))
    if constant or all(
        np.isclose(p.mean, known.get((p.depth, p.site, p.part), np.inf), 1e-6, 1e-9, True) for p in short
    ):
        return long
    return None


def _column(result: xr.Dataset, name: str) -> np.ndarray:
    return result[name].values if name in result else np.full(result.sizes["layer"], np.nan)


def _points(result: xr.Dataset, columns: Sequence[np.ndarray]) -> tuple[Point, ...]:
    rows = result.sizes["layer"]
    texts = {
        name: [clean(v) for v in result[name].values] if name in result.coords else [""] * rows
        for name in ("layer", "site", "part")
    }
    stages = result["stage"].values if "stage" in result.coords else np.zeros(rows, int)
    return tuple(
        Point(
            float(result["depth"].values[i]),
            texts["layer"][i],
            texts["site"][i],
            texts["part"][i],
            int(stages[i]),
            *(float(column[i]) for column in columns),
        )
        for i in range(rows)
    )


def _reduction(result: xr.Dataset, value: str) -> str:
    name = f"{value}_curve"
    return str(result[name].attrs.get("reduced", "mean")) if name in result else "mean"


def _reduced(variable: xr.DataArray, how: str) -> np.ndarray:
    """(layer, ...) -> (layer,), as the curve was reduced."""
    values = variable.transpose("layer", ...).values.astype(np.float64)
    flat = values.reshape(len(values), -1)
    found = np.full(len(values), np.nan)
    for number, row in enumerate(flat):
        present = row[~np.isnan(row)]
        if present.size:
            found[number] = present[-1] if how == "last" else present.mean()
    return found


def _place(result: xr.Dataset, value: str, how: str) -> str:
    """``frequency 0.857``: where a curve that takes the last of an axis was taken."""
    inner = result[value].dims[1:]
    if how != "last" or len(inner) != 1:
        return ""
    dim = str(inner[0])
    axis = next((name for name in (f"{dim}_by_layer", dim) if name in result.coords), None)
    if axis is None:
        return ""
    units = str(result[axis].attrs.get("units", result[dim].attrs.get("units", "")))
    unit = f" {units}" if units not in ("", "1") else ""
    if axis == dim:
        return f"{dim} {float(result[dim].values[-1]):.3g}{unit}"
    ends = dict.fromkeys(f"{v:.3g}" for v in _reduced(result[axis], "last") if not np.isnan(v))
    return f"{dim} {', '.join(ends)}{unit}, in the order of the layers"
