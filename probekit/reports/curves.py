"""From a run's results to plain data that can be drawn: curves over depth, and the same as a table.

No drawing here, and no HTML: every report may start from `charts`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from probekit.errors import StoreError

if TYPE_CHECKING:
    import xarray as xr

    from probekit.runfolder import Run

NAN = float("nan")
_SITE_ORDER = {"out": 0, "attention": 0, "mid": 0, "embed": 1}  # at one depth: the last layer's output first


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

    untrained: its weights are random: a baseline for the others
    images:    how many the mean is over
    at:        where on an inner axis the values were taken: ``frequency 0.857``
    """

    model: str
    points: tuple[Point, ...]
    untrained: bool = False
    images: int = 0
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
        edges = [ends[0][0], *((a[1] + b[0]) / 2 for a, b in zip(ends, ends[1:], strict=False)), ends[-1][1]]
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
        """A stage each: another token grid has another baseline."""
        line = [p for p in self.points if p.site != "mid"]
        return _segments(line, lambda a, b: (a.part, a.stage) != (b.part, b.stage))


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
    reading:       how to read it, one sentence; `limits`: what it does not show. "" where the metric says none
    conventions:   what a reader needs to compare the numbers with another tool's
    reduced:       how one image's values became one number a layer, "" without inner axes
    others:        further values the results hold
    """

    metric: str
    value: str
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
    panels: dict[str, list[tuple[str, xr.Dataset]]] = field(default_factory=dict)


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
        gathered = found.setdefault(cell.metric, _Found(result, value))
        if value != gathered.value:
            troubles.append(
                Trouble(*where, f"its value is '{value}', the other models' is '{gathered.value}'")
            )
            continue
        gathered.panels.setdefault(cell.dataset, []).append((cell.model, result))
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
    return Curve(model, points, is_untrained(model), int(images), _place(result, value, _reduction(result, value)))


def is_untrained(model: str) -> bool:
    return model.endswith("@random")


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


def clean(text: object) -> str:
    """Text that XML can hold: what is neither printable nor a line break becomes a replacement character."""
    return re.sub("[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufdcf\ufdf0-\ufffd\U00010000-\U0010ffff]", "\ufffd", str(text))


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
        curves = tuple(curve_of(result, value, model) for model, result in results)
        panels.append(Panel(dataset, curves, _baselines(results, value)))
    units = str(first[value].attrs.get("units", ""))
    return Chart(
        metric,
        value,
        "" if units == "1" else units,
        str(first.attrs.get("figure", "") or ""),
        reading,
        limits,
        conventions,
        str(first.attrs.get("interval", "")),
        _reduction(first, value) if first[value].ndim > 1 else "",
        str(first.attrs.get("version", "")),
        str(first.attrs.get("pack", "")),
        tuple(panels),
        tuple(v for v in values_of(first) if v != value),
    )


def _baselines(results: Iterable[tuple[str, xr.Dataset]], value: str) -> tuple[Baseline, ...]:
    """Each baseline once, where models share it; a model with fewer layers shares the longer one's."""
    drawn: list[Baseline] = []
    for model, result in results:
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
    """The longer one's points, if the other's are among them."""
    one, other = ({(p.depth, p.site, p.part): p.mean for p in x.points} for x in (a, b))
    small, large = (one, other) if len(one) < len(other) else (other, one)
    same = all(key in large and np.isclose(value, large[key], 1e-6, 1e-9, True) for key, value in small.items())
    return (b.points if large is other else a.points) if same else None


def _segments(points: Sequence[Point], breaks: Any) -> list[list[Point]]:
    found: list[list[Point]] = []
    for point in points:
        if found and not breaks(found[-1][-1], point):
            found[-1].append(point)
        else:
            found.append([point])
    return found


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
    if f"{dim}_by_layer" in result.coords:
        ends = sorted({round(float(v), 6) for v in _reduced(result[f"{dim}_by_layer"], "last") if not np.isnan(v)})
        return f"{dim} {', '.join(f'{v:.3g}' for v in ends)}, differing between layers"
    return f"{dim} {float(result[dim].values[-1]):.3g}" if dim in result.coords else ""
