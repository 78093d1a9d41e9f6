"""Every number of a run's results as one long table: a row for each value, layer and place on an axis."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probekit.reports.charts import clean
from probekit.reports.curves import values_of
from probekit.store.sealing import write_bytes

if TYPE_CHECKING:
    import xarray as xr

    from probekit.store.runfolder import Run

COLUMNS = (
    *("model", "dataset", "metric", "version", "kind", "value", "units"),
    *("layer", "depth", "site", "part", "stage", "axis", "at"),
    *("mean", "sd", "sem", "low", "high", "images"),
)
_SPREAD = ("sd", "sem", "low", "high")


def render(run: Run, path: Path) -> Path:
    """Write `COLUMNS` and a row for each number. The same run gives the same bytes.

    kind: ``mean`` of a value at one place of its axes (head 3: axis ``head``, at ``3``), ``curve`` over depth
    (each image's values of a layer reduced first), or ``baseline``. What doesn't exist has no row.

    Raises `StoreError` where a result is damaged or the file can't be written.
    """
    write_bytes(Path(path), text(rows(run)).encode("utf-8"))
    return Path(path)


def text(found: Iterable[Sequence[Any]]) -> str:
    """The rows as CSV, with a head."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(found)
    return buffer.getvalue()


def rows(
    run: Run, *, metrics: Sequence[str] = (), models: Sequence[str] = (), datasets: Sequence[str] = ()
) -> Iterator[list[Any]]:
    """Rows of finished cells, in the run's order. metrics, models, datasets: only these; all by default."""
    for cell in run.cells():
        wanted = ((cell.metric, metrics), (cell.model, models), (cell.dataset, datasets))
        if cell.outcome.status != "done" or not all(name in some for name, some in wanted if some):
            continue
        result = run.result(cell.metric, model=cell.model, dataset=cell.dataset)
        about = [clean(cell.model), clean(cell.dataset), cell.metric, result.attrs.get("version", "")]
        for value in values_of(result):
            spread = {part: f"{value}_{part}" for part in _SPREAD}
            yield from _rows(result, about, "mean", value, value, spread)
            if f"{value}_curve" in result:
                ends = {part: f"{value}_curve_{part}" for part in ("low", "high")}
                yield from _rows(result, about, "curve", value, f"{value}_curve", ends)
        for name, variable in result.data_vars.items():
            if variable.attrs.get("role") == "baseline" and variable.dtype.kind in "fiu":
                yield from _rows(result, about, "baseline", str(name), str(name), {})


def _rows(
    result: xr.Dataset, about: list[Any], kind: str, value: str, name: str, spread: dict[str, str]
) -> Iterator[list[Any]]:
    variable = result[name]
    if "layer" not in variable.dims:
        return
    variable = variable.transpose("layer", ...)
    inner = [str(d) for d in variable.dims[1:]]
    beside = {
        part: result[other].transpose(*variable.dims).values
        for part, other in spread.items()
        if other in result and set(result[other].dims) == set(variable.dims)
    }
    images = "" if kind == "baseline" else result.attrs.get("images", "")
    for layer, label in enumerate(_labels(result)):
        for index in itertools.product(*(range(n) for n in variable.shape[1:])):
            place = (layer, *index)
            mean = float(variable.values[place])
            if math.isnan(mean):
                continue
            at = ",".join(_coordinate(result, d, layer, i) for d, i in zip(inner, index, strict=True))
            ends = [_number(beside[part][place]) if part in beside else "" for part in _SPREAD]
            units = variable.attrs.get("units", "")
            yield [*about, kind, value, units, *label, ",".join(inner), at, _number(mean), *ends, images]


def _labels(result: xr.Dataset) -> list[list[str]]:
    names = ("layer", "depth", "site", "part", "stage")
    columns = [result[n].values if n in result.coords else [""] * result.sizes["layer"] for n in names]
    return [
        [clean(layer), _number(depth), *map(str, rest)] for layer, depth, *rest in zip(*columns, strict=True)
    ]


def _coordinate(result: xr.Dataset, dim: str, layer: int, index: int) -> str:
    if f"{dim}_by_layer" in result.coords:
        return _number(result[f"{dim}_by_layer"].values[layer, index])
    return _number(result[dim].values[index]) if dim in result.coords else str(index)


def _number(value: Any) -> str:
    """Every digit; nothing for what isn't there."""
    if hasattr(value, "item"):
        value = value.item()
    return "" if isinstance(value, float) and math.isnan(value) else str(value)
