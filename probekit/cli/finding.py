"""``probekit findings``: which of the paper's claims a run supports."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from probekit.cli import state
from probekit.cli.plain import json_alone, print_json, print_table, tame, width, wrapped
from probekit.cli.reading import Datasets, Folder, Json, choose

if TYPE_CHECKING:
    from probekit.reports.findings import Line, Tables


def register(app: typer.Typer) -> None:
    """Adds ``findings`` to the command line."""
    app.command("findings")(findings_command)


def findings_command(
    folder: Folder,
    dataset: Datasets = None,
    group: Annotated[
        list[str] | None,
        typer.Option(
            "--group",
            metavar="A,B,C",
            help="Models that are trainings (seeds) of one, or a NAME:VARIANT for all of that name; "
            "repeat for more groups.",
        ),
    ] = None,
    form: Annotated[str, typer.Option("--format", "-f", help="text, or md: a Markdown table.")] = "text",
    as_json: Json = False,
) -> None:
    """Which claims hold in a run: effect, interval, and whether it goes beyond the untrained network.

    Exit code 1 if a finding is broken; the others go on.

    \b
    Examples:
      probekit findings runs/2026-11-22-1
      probekit findings runs/seeds --group moco:a@1.pth,moco:a@2.pth
      probekit findings runs/2026-11-22-1 --format md > findings.md
    """
    from probekit.errors import UsageError
    from probekit.reports.findings import markdown, tables
    from probekit.store.runfolder import Run

    if form not in ("text", "md"):
        raise UsageError(f"unknown format '{tame(form)}'", hint="'text' or 'md'; --json for JSON")
    run = Run(folder)
    groups = [[name.strip() for name in text.split(",") if name.strip()] for text in group or []]
    datasets = choose("dataset", dataset or [], run.datasets)
    with json_alone(as_json):
        found = tables(run, state.catalog(), datasets=datasets, groups=groups)
    if as_json:
        print_json({"folder": str(folder), "datasets": [_json(each) for each in found]})
    elif form == "md":
        typer.echo(markdown(found), nl=False)
    else:
        for each in found:
            _print(each, run.models)
    if any(each.failed for each in found):
        raise typer.Exit(1)


def _print(found: Tables, models: Sequence[str]) -> None:
    from probekit.reports.findings import positions, unplaced

    _say(f"findings on {found.dataset}")
    if found.lines:
        _print_lines(found.lines)
    if found.missing:
        typer.echo("not measured:")
        for missing in found.missing:
            _say(f"{', '.join(missing.names)}: {missing.reason}", 2)
            if missing.hint:
                _say(missing.hint, 4)
        if found.command:
            _say("what is missing is measured by", 2)
            typer.echo(f"    {tame(found.command)}")  # unbroken, to be copied
        typer.echo()
    for note in found.notes:
        _say(f"note: {note}")
    rows = positions(found.fingerprint, models)
    if rows:
        if found.notes:
            typer.echo()
        _say("fingerprint: 0 is where the CL models are, 1 where the MIM models are")
        table = [[axis, *cells] for axis, cells in rows]
        print_table(["axis", *(_short(model) for model in models)], table, 1, 1)
        if reasons := unplaced(found.fingerprint):
            _say(f"(in brackets: the value itself; {reasons})")
    typer.echo()


def _print_lines(lines: Sequence[Line]) -> None:
    """Claim, verdict, effect, untrained in wrapped cells; under them, over the full width, what is compared
    and why the verdict is what it is."""
    sizes = [max(24, width() - sum(_SIZES) - 2 * len(_SIZES)), *_SIZES]
    _print_cells(("claim", "verdict", "effect [95 %]", "untrained"), sizes)
    for line in lines:
        baseline = line.baseline.replace("; beyond it by ", "\nbeyond by ")
        cells = (line.name, line.verdict, line.effect.replace(" [", "\n["), baseline.replace(" [", "\n["))
        _print_cells((f"{cells[0]}\n{line.claim}".strip(), *cells[1:]), sizes)
        about = "; ".join(text for text in (line.models, line.quantity, line.layers) if text)
        _say(f"{about}: {line.reason}" if about else line.reason, 4)
    typer.echo()


_SIZES = (14, 18, 18)  # of verdict, effect and untrained: an interval on one line


def _print_cells(cells: Sequence[str], sizes: Sequence[int]) -> None:
    """One row; a line break in a cell stays one."""
    columns = [
        [piece for line in cell.split("\n") for piece in textwrap.wrap(tame(line), size)]
        for cell, size in zip(cells, sizes, strict=True)
    ]
    for line in itertools.zip_longest(*columns, fillvalue=""):
        texts = [text.ljust(size) for text, size in zip(line, sizes, strict=True)]
        typer.echo("  ".join(texts).rstrip())


def _say(text: str, indent: int = 0) -> None:
    for line in wrapped(text, indent):
        typer.echo(line)


def _short(model: str) -> str:
    from probekit.reports.placing import shortened

    return shortened(tame(model), 22)


def _json(found: Tables) -> dict[str, Any]:
    return {
        "dataset": found.dataset,
        "findings": [asdict(tested) for tested in found.tested],
        "command": found.command,
        "notes": found.notes,
        "fingerprint": [asdict(placed) for placed in found.fingerprint],
    }
