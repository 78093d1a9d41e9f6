"""The built-in report: one HTML page that works offline. Curves over depth, tables, failures, provenance.

The page holds no script, refers to nothing outside itself, and says so in its Content-Security-Policy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from probekit.findings.finding import Status
from probekit.reports.charts import Chart, Panel, Point, clean
from probekit.reports.contents import ordered
from probekit.reports.curves import Trouble, charts
from probekit.reports.figures import (
    NARROW,
    REDUCED,
    WIDE,
    baseline_name,
    caption,
    has_labels,
    lines_of,
    panel_svg,
)
from probekit.reports.findings import Tables, positions, tables, unplaced
from probekit.reports.looks import Style, styles
from probekit.reports.pictures import pictures
from probekit.reports.pictures_page import section
from probekit.reports.pictures_panels import Picture
from probekit.reports.provenance import bad_images, command, facts, plain, provenance, summary
from probekit.store.runfolder import how_they_ended
from probekit.store.sealing import write_bytes

if TYPE_CHECKING:
    from probekit.store.runfolder import Cell, Run

_GROUPS = {
    "failed": "Failed",
    "unreadable": "Results that can't be shown",
    "unfinished": "Not finished",
    "does not apply": "Does not apply",
}


def render(run: Run, path: Path) -> Path:
    """Write the page and return where it is. The same run gives the same bytes.

    What is damaged in the run is listed in the page. Raises `StoreError` where the page can't be written.
    """
    import jinja2

    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_printable,
    )
    css = _markup((here / "report.css").read_text(encoding="utf-8").strip())
    html = environment.get_template("report.html.j2").render(page=_page(run), css=css)
    write_bytes(Path(path), f"{html}\n".encode())
    return Path(path)


def _printable(value: Any) -> Any:
    """Every text of the page passes here: a file name that isn't UTF-8 must not spoil it."""
    return clean(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _markup(text: str) -> Any:
    """Text of our own that is markup already."""
    from markupsafe import Markup

    return Markup(text)


def _page(run: Run) -> dict[str, Any]:
    """Everything the template shows, in its order."""
    drawn, troubles = charts(run)
    drawn = ordered(drawn)
    pictured, unfit = pictures(run)
    by_metric = {
        chart.metric: [picture for picture in pictured if picture.metric == chart.metric] for chart in drawn
    }
    cells = list(run.cells())
    looks = styles(run.models, run.untrained)
    name = run.path.resolve().name
    return {
        "title": name,
        "summary": summary(run),
        "models": run.models,
        "datasets": run.datasets,
        "metrics": run.metrics,
        "facts": facts(run),
        "command": command(run, name),
        "counts": _counts(cells),
        "findings": _findings(run),
        "charts": [
            _chart(chart, by_metric[chart.metric], looks, number) for number, chart in enumerate(drawn, 1)
        ],
        "troubles": _without_result(cells, [*troubles, *unfit]),
        "bad_images": bad_images(run),
        "provenance": provenance(run),
    }


def _counts(cells: Sequence[Cell]) -> str:
    """``6 cells (a metric of a model on a dataset): 5 done, 1 failed.``"""
    total = "1 cell" if len(cells) == 1 else f"{len(cells)} cells"
    return f"{total} (a metric of a model on a dataset): {how_they_ended(cells)}."


def _without_result(cells: Sequence[Cell], troubles: Sequence[Trouble]) -> list[dict[str, Any]]:
    """Cells without a result, by how they ended."""
    found: dict[str, list[dict[str, str]]] = {key: [] for key in _GROUPS}
    for cell in cells:
        end = cell.outcome
        if end.status in found:
            pack = " ".join(part for part in (end.pack, end.version) if part)
            item = {"pack": pack, "reason": end.reason, "hint": end.hint, "details": end.details}
            found[end.status].append(
                {**item, "metric": cell.metric, "model": cell.model, "dataset": cell.dataset}
            )
    for trouble in troubles:
        item = {"pack": "", "reason": trouble.message, "hint": trouble.hint, "details": ""}
        found["unreadable"].append(
            {**item, "metric": trouble.metric, "model": trouble.model, "dataset": trouble.dataset}
        )
    return [{"title": _GROUPS[key], "cells": items} for key, items in found.items() if items]


# --- findings


def _findings(run: Run) -> list[dict[str, Any]]:
    """One table for each dataset, where there are models to compare. Findings of plugins are shown by
    `probekit findings`: a page must not depend on what else is installed."""
    from probekit.plugins.catalog import Catalog

    if len(run.models) < 2:
        return []
    found = tables(run, Catalog.load(enabled=False), folder=run.path.resolve().name)
    return [_finding_table(each, run.models) for each in found]


def _finding_table(found: Tables, models: Sequence[str]) -> dict[str, Any]:
    absent = sum(len(missing.names) for missing in found.missing)
    placed = any(one.position for one in found.fingerprint)  # plain values are in the charts
    return {
        "dataset": found.dataset,
        "tally": _tally(found),
        "lines": found.lines,
        "kinds": {line.status: line.status.replace("'", "").replace(" ", "-") for line in found.lines},
        "missing": found.missing,
        "absent": "1 claim" if absent == 1 else f"{absent} claims",
        "command": found.command,
        "notes": found.notes,
        "positions": positions(found.fingerprint, models) if placed else [],
        "unplaced": unplaced(found.fingerprint),
    }


def _tally(found: Tables) -> str:
    """``22 claims: 5 seen, 6 not seen, 11 can't tell.``"""
    counts: dict[str, int] = {}
    claims = [line for line in found.lines if line.name]
    for line in sorted(claims, key=lambda line: get_args(Status).index(line.status)):
        counts[line.verdict] = counts.get(line.verdict, 0) + 1
    total = len(claims)
    return (
        f"{total} claim{'s' if total != 1 else ''}: {', '.join(f'{n} {said}' for said, n in counts.items())}."
    )


# --- charts


def _chart(
    chart: Chart, pictured: Sequence[Picture], looks: Mapping[str, Style], number: int
) -> dict[str, Any]:
    return {
        "title": chart.metric,
        "subtitle": " · ".join(part for part in (chart.figure, chart.units) if part),
        "reading": chart.reading or _definition(chart),
        "limits": chart.limits,
        "conventions": [(term, text) for term, text in _conventions(chart) if text],
        "panels": [_panel(chart, panel, looks, f"f{number}-{n}") for n, panel in enumerate(chart.panels, 1)],
        "pictures": [section(picture, looks, f"p{number}-{n}") for n, picture in enumerate(pictured, 1)],
        "figure": chart.figure,
    }


def _definition(chart: Chart) -> str:
    """For a metric that doesn't say how to read it."""
    definition = chart.conventions.get("definition")
    return f"Defined as in {definition}." if isinstance(definition, str) and definition else ""


def _conventions(chart: Chart) -> list[tuple[str, str]]:
    others = (
        f"{', '.join(chart.others)}; `probekit report RUN --format csv` lists them" if chart.others else ""
    )
    return [
        *((str(key).replace("_", " "), plain(value)) for key, value in chart.conventions.items()),
        ("curve", REDUCED.get(chart.reduced, chart.reduced)),
        ("interval", chart.interval),
        ("metric version", chart.version),
        ("metric from", chart.pack),
        ("also measured", others),
    ]


def _panel(chart: Chart, panel: Panel, looks: Mapping[str, Style], key: str) -> dict[str, Any]:
    forms = [WIDE, NARROW] if len(chart.panels) == 1 else [NARROW]
    return {
        "dataset": panel.dataset,
        "labelled": has_labels(panel, WIDE),
        "legend": [(_markup(line.look.swatch()), line.name) for line in lines_of(panel, looks)],
        "svgs": [_markup(panel_svg(chart, panel, looks, form, f"{key}-{form.name}")) for form in forms],
        "caption": caption(panel, chart.reduced, looks),
        "table": _table(chart, panel, looks),
    }


def _table(chart: Chart, panel: Panel, looks: Mapping[str, Style]) -> dict[str, Any]:
    rows = panel.table()
    texts = {name: [str(getattr(row, name)) for row in rows] for name in ("layer", "site", "part", "stage")}
    # a column that says the same everywhere says nothing
    shown = [name for name, column in texts.items() if name == "layer" or len(set(column)) > 1]
    what = "Mean" if all(curve.averaged for curve in panel.curves) else "Values"
    what += "" if chart.interval == "none" else " and 95 % interval"
    caption = f"{what}{f' in {chart.units}' if chart.units else ''}."
    if any(" / " in text for column in texts.values() for text in column):
        caption += " Where models differ in a layer's name or stage: in the order of their columns."
    heads = [("depth", "number"), *((name, "text") for name in shown)]
    heads += [(curve.model, "number model") for curve in panel.curves]
    return {
        "caption": caption,
        "heads": [*heads, *((baseline_name(b, panel, looks), "number") for b in panel.baselines)],
        "rows": [
            {
                "depth": f"{row.depth:g}",
                "texts": [texts[name][number] for name in shown],
                "numbers": [
                    *(_mean_and_interval(row.points.get(c.model)) for c in panel.curves),
                    *((number_text(v), "") for v in row.baselines),
                ],
            }
            for number, row in enumerate(rows)
        ],
    }


def _mean_and_interval(point: Point | None) -> tuple[str, str]:
    if point is None:
        return "", ""
    known = math.isfinite(point.low) and math.isfinite(point.high)
    return number_text(point.mean), f"[{number_text(point.low)}, {number_text(point.high)}]" if known else ""


def number_text(value: float) -> str:
    """Four significant digits with a true minus sign; a dash for what isn't there."""
    if math.isnan(value):
        return "\u2013"
    return f"{value:#.4g}".rstrip(".").replace("-", "\u2212")
