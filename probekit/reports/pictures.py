"""From a run's results to pictures of plain data: what a depth curve can't show. No drawing, no HTML.

A variable of a result asks to be drawn by its attribute ``picture``, and further ``picture_...`` attributes
say how (docs/plugins.md, "What the report draws"); no metric is known by name here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from probekit.errors import StoreError
from probekit.reports.charts import clean
from probekit.reports.curves import Trouble
from probekit.reports.pictures_panels import Picture
from probekit.reports.pictures_reading import Unfit, add

if TYPE_CHECKING:
    import xarray as xr

    from probekit.store.runfolder import Run


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


def _begun(result: xr.Dataset, name: str, metric: str, dataset: str) -> Picture:
    attrs = result[name].attrs
    units = str(attrs.get("units", ""))
    title = clean(attrs.get("long_name", "") or name.replace("_", " "))
    figure = str(attrs.get("figure", "") or result.attrs.get("figure", "") or "")
    kind = str(attrs["picture"])
    return Picture(metric, name, kind, title, "" if units == "1" else units, figure, dataset)
