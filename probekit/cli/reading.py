"""``probekit status``, ``show`` and ``report``, with ``compare`` and ``verify``: what a run folder holds."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from probekit.cli import state
from probekit.cli.plain import (
    count,
    interval,
    json_alone,
    number,
    print_json,
    print_table,
    tame,
    without_nan,
    wrapped,
)

if TYPE_CHECKING:
    from probekit.reports.charts import Chart, Panel, Point
    from probekit.store.runfolder import Cell, Run

Folder = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Models = Annotated[list[str] | None, typer.Option("--model", "-m", help="Only this model; repeat for more.")]
Datasets = Annotated[
    list[str] | None, typer.Option("--dataset", "-d", help="Only this dataset; repeat for more.")
]


def register(app: typer.Typer) -> None:
    """Adds ``status``, ``show``, ``report``, ``compare`` and ``verify`` to the command line."""
    from probekit.cli.comparing import compare_command
    from probekit.cli.verifying import verify_command

    app.command("status")(status_command)
    app.command("show")(show_command)
    app.command("report")(report_command)
    app.command("compare")(compare_command)
    app.command("verify")(verify_command)


def choose(kind: str, asked: Sequence[str], known: Sequence[str]) -> list[str]:
    """What was asked for, by full name or by its beginning where that means one; everything without asking.

    Raises `UsageError`.
    """
    from probekit.errors import UsageError
    from probekit.names import did_you_mean, quoted

    found = []
    for name in asked:
        near = [k for k in known if name in (k, k.partition(":")[0], k.partition("@")[0])]
        near = near or [k for k in known if name and k.startswith(name)]
        if name not in known and len(near) != 1:
            families = [k.partition(":")[0] for k in known]
            hint = did_you_mean(name, [*known, *families]) or f"it has {', '.join(map(tame, known))}"
            if near:
                raise UsageError(
                    f"{quoted(name)} could be {len(near)} {kind}s", hint=" or ".join(map(tame, near))
                )
            raise UsageError(f"the run has no {kind} {quoted(name)}", hint=hint)
        found.append(name if name in known else near[0])
    return list(dict.fromkeys(found)) or list(known)


# --- status


def status_command(folder: Folder, as_json: Json = False) -> None:
    """How far every cell is: done, failed, does not apply, or unfinished. Exit code 1 if any failed.

    \b
    Examples:
      probekit status runs/2026-11-22-1
      probekit status runs/2026-11-22-1 --json
    """
    from probekit.store.runfolder import Run

    run = Run(folder)
    cells = list(run.cells())
    counts = Counter(cell.outcome.status for cell in cells)
    if as_json:
        listed = [_cell_json(run, cell) for cell in cells]
        print_json({"folder": str(folder), "counts": dict(counts), "cells": listed})
    else:
        _print_status(run, cells, counts)
    if counts["failed"]:
        raise typer.Exit(1)


def _print_status(run: Run, cells: Sequence[Cell], counts: Counter[str]) -> None:
    from probekit.store.runfolder import how_they_ended

    sizes = [
        count(len(n), k)
        for n, k in ((run.models, "model"), (run.metrics, "metric"), (run.datasets, "dataset"))
    ]
    typer.echo(f"{tame(run.path)}: {' x '.join(sizes)}")
    names = max((len(tame(metric)) for metric in run.metrics), default=0)
    before = None
    for cell in cells:
        if (cell.model, cell.dataset) != before:
            before = (cell.model, cell.dataset)
            for line in wrapped(f"{cell.model} x {cell.dataset}", 2):
                typer.echo(line)
        first, *more = wrapped(_said(run, cell), 4 + min(names, 28) + 18)
        metric = tame(cell.metric)
        if len(metric) > 28:  # the name alone, what there is to say below it
            typer.echo(f"    {metric}")
            metric = ""
        typer.echo(f"    {metric:<{min(names, 28)}}  {cell.outcome.status:<14}  {first.strip()}".rstrip())
        for line in more:
            typer.echo(line)
    typer.echo(how_they_ended(cells) or "no cells")
    if counts["unfinished"]:
        for line in completing(run):
            typer.echo(line)


def completing(run: Run) -> list[str]:
    """How to finish a run; the command unbroken, to be copied."""
    from probekit.reports.provenance import command

    return ["what is unfinished is done by", f"    {tame(' '.join(command(run, str(run.path))))}"]


def _said(run: Run, cell: Cell) -> str:
    end = cell.outcome
    if end.status == "done":
        return f"{count(end.images, 'image')}"
    if end.status == "unfinished":
        have, total = shards(run, cell)
        return f"{have} of {count(total, 'shard')}" if have else "not begun"
    pack = " ".join(part for part in (end.pack, end.version) if part)
    return (f"{pack}: " if pack and end.status == "failed" else "") + end.reason


def shards(run: Run, cell: Cell) -> tuple[int, int]:
    """How many shards of a cell's trace exist, and how many there will be (0 before it has begun)."""
    from probekit.store.cells import TraceFolder
    from probekit.store.runfolder import shard_size
    from probekit.store.shards import shard_ranges

    about = run.about(cell.model, cell.dataset)
    images = len(about.get("ids", ()))
    if not images:
        return 0, 0
    folder = run.folder(cell.model, cell.dataset)
    versions = set()
    for path in (folder.path / "traces").glob("*-v*"):
        versions |= {int(v) for v in re.findall(r"-v(\d+)", path.name)}
    found = [(0, len(shard_ranges(images, shard_size(images))))]
    for version in versions:
        traces = TraceFolder(folder.trace(cell.metric, version), {}, images, shard_size(images)).as_written()
        have = sum(traces.shard(i).exists() for i in traces.shards)
        found += [(have, len(traces.shards))] if have else []
    return max(found)


def _cell_json(run: Run, cell: Cell) -> dict[str, Any]:
    where = {"model": cell.model, "dataset": cell.dataset, "metric": cell.metric}
    have, total = shards(run, cell)
    return {**where, **asdict(cell.outcome), "shards": have, "shards_total": total}


# --- show


def show_command(
    folder: Folder,
    metric: Annotated[str | None, typer.Argument(help="One of its metrics.", show_default=False)] = None,
    model: Models = None,
    dataset: Datasets = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print every number as CSV, heads and all.")] = False,
    as_json: Json = False,
) -> None:
    """What a run found: without METRIC what there is, with it a table of layers and models.

    \b
    Examples:
      probekit show runs/2026-11-22-1
      probekit show runs/2026-11-22-1 nmi
      probekit show runs/2026-11-22-1 nmi --model moco:vit-b16 --csv > nmi.csv
    """
    from probekit.errors import StoreError, UsageError
    from probekit.reports.curves import charts
    from probekit.store.runfolder import Run

    if as_csv and as_json:
        raise UsageError("--csv and --json can't both be printed", hint="choose one")
    run = Run(folder)
    chosen = {
        "metrics": choose("metric", [metric] if metric else [], run.metrics),
        "models": choose("model", model or [], run.models),
        "datasets": choose("dataset", dataset or [], run.datasets),
    }
    if as_csv:
        from probekit.reports import csv

        typer.echo(csv.text(csv.rows(run, **chosen)), nl=False)
        return
    drawn, troubles = charts(run, **chosen)
    if as_json:
        untrained = {model for model in run.models if run.untrained(model)}
        found = [_chart_json(chart, untrained) for chart in drawn]
        print_json({"folder": str(folder), "metrics": found, "problems": [asdict(t) for t in troubles]})
        return
    if metric is None:
        _print_contents(run, drawn, chosen)
    for chart in drawn if metric else ():
        for panel in chart.panels:
            _print_panel(chart, panel)
    for trouble in troubles:
        typer.echo(
            f"note: {tame(trouble.metric)} of {tame(trouble.model)}: {tame(trouble.message)}", err=True
        )
    if metric and not drawn:
        ends = [c for c in run.cells() if c.metric in chosen["metrics"] and c.model in chosen["models"]]
        why = next((f": {c.outcome.reason}" for c in ends if c.outcome.reason), "")
        raise StoreError(
            f"'{tame(chosen['metrics'][0])}' has no result yet{tame(why)}", hint=f"`probekit status {folder}`"
        )


def _print_contents(run: Run, drawn: Sequence[Chart], chosen: dict[str, list[str]]) -> None:
    from probekit.store.runfolder import how_they_ended

    typer.echo(tame(run.path))
    for kind in ("models", "datasets"):
        for line in wrapped(f"{kind}: {', '.join(chosen[kind])}", 2):
            typer.echo(line)
    cells = list(run.cells())
    rows = []
    for metric in chosen["metrics"]:
        chart = next((c for c in drawn if c.metric == metric), None)
        states = how_they_ended(cell for cell in cells if cell.metric == metric)
        values = ", ".join([chart.value, *chart.others]) if chart else ""
        rows.append((metric, chart.figure if chart else "", chart.units if chart else "", states, values))
    print_table(("metric", "figure", "units", "cells", "values"), rows, 1, 9)
    if drawn:
        typer.echo(f"`probekit show {tame(run.path)} {drawn[0].metric}` shows one metric")


def _print_panel(chart: Chart, panel: Panel) -> None:
    from probekit.reports.placing import shortened

    about = ", ".join(text for text in (chart.figure, chart.units and f"in {chart.units}") if text)
    for line in wrapped(f"{chart.metric} on {panel.dataset}{f' ({about})' if about else ''}", 0):
        typer.echo(line)
    has_heads = any(p.spread == p.spread for c in panel.curves for p in c.points)
    spread = "; +- standard deviation over heads" if has_heads else ""
    heading = "mean, no interval" if chart.interval == "none" else f"mean [low, high]: {chart.interval}"
    for line in wrapped(f"{heading}{spread}", 0):
        typer.echo(line)
    rows = panel.table()
    # what is the same in every row, or another for every model, tells nothing here
    names = {"site": 9, "part": 9, "layer": 30}
    shown = [n for n in names if len({getattr(r, n) for r in rows}) > 1]
    shown = [n for n in shown if not any(" / " in getattr(r, n) for r in rows)]
    heads = ["depth", *shown]
    table = [[f"{r.depth:g}", *(shortened(getattr(r, n), names[n]) for n in shown)] for r in rows]
    fixed = len(heads)
    for curve in panel.curves:
        heads.append(shortened(tame(curve.model), 30))
        for line, row in zip(table, rows, strict=True):
            line.append(_point_text(row.points.get(curve.model)))
    for column, baseline in enumerate(panel.baselines):
        heads.append(shortened(tame(baseline.name), 16))
        for line, row in zip(table, rows, strict=True):
            line.append(number(row.baselines[column]))
    print_table(heads, table, fixed, fixed)
    typer.echo()


def _point_text(point: Point | None) -> str:
    if point is None:
        return ""
    spread = "" if point.spread != point.spread else f" +-{number(point.spread)}"
    return interval(point.mean, point.low, point.high) + spread


def _chart_json(chart: Chart, untrained: Collection[str]) -> dict[str, Any]:
    panels = []
    for panel in chart.panels:
        curves = [
            {
                "model": c.model,
                "images": c.images,
                "untrained": c.model in untrained,
                "rows": [asdict(p) for p in c.points],
            }
            for c in panel.curves
        ]
        bases = [
            {
                "name": b.name,
                "models": b.models,
                "rows": [{"depth": p.depth, "value": p.mean} for p in b.points],
            }
            for b in panel.baselines
        ]
        panels.append({"dataset": panel.dataset, "curves": curves, "baselines": bases})
    keys = ("metric", "value", "units", "figure", "conventions", "interval", "version", "pack")
    return without_nan({**{key: getattr(chart, key) for key in keys}, "panels": panels})


# --- report


def report_command(
    folder: Folder,
    kind: Annotated[
        str, typer.Option("--format", "-f", help="html, csv, figures, decisions, or a plugin's.")
    ] = "html",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The file, or a folder for it.")] = None,
    open_it: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    as_json: Json = False,
) -> None:
    """Write a report of a run: a page that works offline, every number as CSV, or figures for a paper.

    \b
    Examples:
      probekit report runs/2026-11-22-1 --open
      probekit report runs/2026-11-22-1 --format csv --out numbers.csv
    """
    from probekit.errors import PluginError
    from probekit.names import quoted
    from probekit.plugins.loading import blamed
    from probekit.store.runfolder import Run

    run = Run(folder)
    catalog = state.catalog()
    entry = catalog.report(kind)
    render = catalog.resolve_target(entry)
    suffix = entry.spec.suffix
    name = f"report{suffix}" if entry.built_in else f"report-{entry.spec.name}{suffix}"
    path = run.path / name if out is None else out / name if out.is_dir() else out
    who = f"report {quoted(kind)} of {quoted(entry.owner)}"
    with json_alone(as_json), blamed(who):
        returned = render(run, path)
    if not isinstance(returned, (str, Path)):
        raise PluginError(f"{who} returned a {type(returned).__name__!r}, not the path of what it wrote")
    written = Path(returned)
    if not written.exists():
        raise PluginError(f"{who} says it wrote {quoted(written)}, which does not exist")
    if as_json:
        print_json({"report": str(written), "format": entry.name})
    else:
        typer.echo(tame(written))
    if open_it:
        import webbrowser

        if not webbrowser.open(written.resolve().as_uri()):
            typer.echo(f"note: no browser could be opened; the page is {tame(written)}", err=True)
