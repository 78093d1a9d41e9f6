"""``probekit run``: the grid, with live progress."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from probekit.cli import state
from probekit.cli.plain import json_alone
from probekit.cli.reading import completing

if TYPE_CHECKING:
    from probekit.cell import Forecast
    from probekit.errors import ProbekitError
    from probekit.events import Event
    from probekit.store.runfolder import Run


def register(app: typer.Typer) -> None:
    """Adds ``run`` to the command line."""
    app.command("run")(run_command)


def run_command(
    grid: Annotated[
        Path | None, typer.Argument(metavar="GRID.yaml|GRID.toml", help="A grid file.", show_default=False)
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option("--model", "-m", help="NAME[:VARIANT][@WEIGHTS]; repeat for more.")
    ] = None,
    metrics: Annotated[
        list[str] | None, typer.Option("--metrics", help="NAME[:option=value], commas, globs, !name or all.")
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            "--dataset", "-d", help="NAME:ARGUMENT, e.g. folder:PATH. Default: shapetex, drawn images."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use this many images, evenly spaced.")] = None,
    train: Annotated[
        str | None, typer.Option(help="The dataset probes are trained on, where one has no train split.")
    ] = None,
    train_limit: Annotated[
        int | None, typer.Option(help="Train on this many images; by default 4 x --limit.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The run's folder.")] = None,
    replay: Annotated[
        Path | None, typer.Option(help="Measure captured activations instead of a model.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per forward pass.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 forward passes.")] = None,
    image_size: Annotated[str | None, typer.Option(help="224 or 224x448 (rows x columns).")] = None,
    seed: Annotated[int | None, typer.Option(help="Of random weights and of intervals.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that decode images.")] = None,
    on_bad_image: Annotated[str | None, typer.Option(help="skip (and list them) or fail.")] = None,
    allow_unwatched: Annotated[
        bool, typer.Option("--allow-unwatched", help="Leave out attention that can't be watched.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Measure models x metrics x datasets; the same command again does what is missing.

    \b
    Examples:
      probekit run --model simmim --metrics all
      probekit run -m moco:vit-b16@random -d folder:photos --limit 64
      probekit run -m simmim:vit-b16@simmim.pth --metrics nmi -d folder:val
      probekit run grid.yaml --out runs/paper --device cuda --dtype bfloat16
      probekit run -m simmim --metrics linear_probe -d cifar10:data --limit 1000
      probekit run --replay captures/moco --metrics nmi

    \b
    A grid file:
      models: [moco:vit-b16, simmim:vit-b16@/data/simmim.pth]
      metrics: [attention_distance, {nmi: {compat: cl-vs-mim}}]
      datasets: [folder:/data/imagenet/val]
      limit: 1000
    """
    from probekit.errors import UsageError
    from probekit.grid import make_grid, parse_size, read_grid, resolve
    from probekit.store.runfolder import choose_folder

    given = {
        "models": model, "metrics": metrics, "datasets": dataset, "limit": limit, "batch_size": batch_size,
        "device": device, "dtype": dtype, "image_size": parse_size(image_size) if image_size else None,
        "seed": seed, "workers": workers, "train": train, "train_limit": train_limit,
        "on_bad_image": on_bad_image, "allow_unwatched": allow_unwatched or None,
    }  # fmt: skip
    given = {key: value for key, value in given.items() if value is not None}
    catalog = state.catalog()
    if replay is not None:
        from probekit.capturing.replay import replay as measure_capture

        if set(given) - {"metrics"} or grid is not None or dry_run:
            raise UsageError("--replay takes only --metrics and --out: the capture holds everything else")
        folder = out or Path("runs") / f"replay-{replay.resolve().name}"
        with shown(as_json) as listen:
            run = measure_capture(replay, metrics or ["all"], catalog, folder, listen)
        return _closing(run, catalog, listen, as_json)
    resolved = resolve(read_grid(grid, **given) if grid else make_grid(given, "the command"), catalog)
    folder, resumed = (out, out.exists()) if out is not None else choose_folder(resolved)
    counts = [
        _count(len(resolved.models), "model"),
        _count(len(resolved.metrics), "metric"),
        _count(len(resolved.datasets), "dataset"),
    ]
    if dry_run:
        from probekit.execution import forecast

        with json_alone(as_json):
            found = forecast(resolved, catalog, folder)
        return _dry_run(found, folder, " x ".join(counts), as_json)
    if not as_json:
        typer.echo(f"  {' x '.join(counts)}: {folder}{' (continued)' if resumed else ''}")
        if not dataset and grid is None:
            typer.echo(f"  no --dataset given: {resolved.grid.limit} drawn images of known shape and texture")
        for entry in resolved.models:
            spec = entry.spec
            if spec.weights is not None and spec.weights.bundled and entry.ref.weights is None:
                published = f"{spec.name}:{spec.published_as}"
                more = f"; the published model is {published}" if spec.published_as else ""
                typer.echo(f"  {entry.ref}   {spec.summary}{more}")
    from probekit.execution import execute

    with shown(as_json) as listen:
        run = execute(resolved, catalog, folder, listen)
    return _closing(run, catalog, listen, as_json)


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


_BAD_SHOWN = 3
_VERB = {"does not apply": "not applicable"}


class Shown:
    """Shows a run's events: progress bars on a terminal, lines elsewhere, nothing for ``--json``."""

    def __init__(self, progress: Any):
        self.progress = progress
        self.errors: list[Any] = []
        self.bad_images = 0
        self._task: Any = None
        self._name = ""

    def _label(self, doing: str) -> str:
        """The cell's name, and what is being done where that isn't the plain pass; 40 characters at most."""
        doing = doing if len(doing) <= 20 else f"{doing[:17]}..."
        room = 40 - len(doing) - (3 if doing else 0)
        name = (
            self._name
            if len(self._name) <= room
            else f"{self._name[: room // 2 - 2]}...{self._name[-(room // 2) + 1 :]}"
        )
        return f"{name} ({doing})" if doing else name

    def say(self, text: str) -> None:
        if self.progress is not None:
            self.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __call__(self, event: Event) -> None:
        if event.kind == "cell-failed":
            self.errors.append(event.error if state.debug() else _bare(event.error))
            self.say(f"  {event.model}: failed: {event.text}")
        if self.progress is None:
            return
        if event.kind == "cell":
            self._name = f"{event.model} x {event.dataset}"
            self._task = self.progress.add_task(
                self._label(""), total=event.total, completed=event.done, start=True
            )
            self.progress.update(self._task, base=event.done)
        elif event.kind == "pass" and self._task is not None:
            text = "" if event.text == "all" else event.text.replace("~", ": ").replace("all: ", "")
            self.progress.update(self._task, description=self._label(text))
        elif event.kind == "summary" and self._task is not None:
            self.progress.update(self._task, description=self._label(f"{event.metric} ..."))
        elif event.kind == "cell-done" and self._task is not None:
            self.progress.update(self._task, description=self._label(""))
        elif event.kind == "images":
            self.progress.advance(self._task, event.done)
        elif event.kind == "bad-image":
            self.bad_images += 1
            if self.bad_images <= _BAD_SHOWN:
                self.say(f"  note: {event.text}")
        elif event.kind == "warning":
            self.say(f"  note: {event.metric or event.model}: {event.text}")
        elif event.kind == "metric" and event.outcome.status != "done":
            self.say(f"  {event.metric} on {event.model}: {event.outcome.status}: {event.outcome.reason}")


def _bare(error: ProbekitError) -> ProbekitError:
    """What an error says, without its traceback, which would keep the failed model in memory."""
    from probekit.errors import ProbekitError

    kind = next(cls for cls in type(error).__mro__ if cls.__module__ == ProbekitError.__module__)
    return kind(error.message, hint=error.hint)


@contextmanager
def shown(quiet: bool) -> Iterator[Shown]:
    if quiet:
        with json_alone(True):
            yield Shown(None)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            done = task.completed - task.fields.get("base", 0)
            elapsed = task.finished_time if task.finished else task.elapsed
            return Text(f"{done / elapsed:.0f} img/s" if done and elapsed else "", style="dim")

    columns = [
        TextColumn("  {task.description}", markup=False),
        BarColumn(14),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(compact=True),
    ]
    with Progress(
        *columns, console=Console(file=sys.stderr if not sys.stdout.isatty() else None)
    ) as progress:
        yield Shown(progress)


def _dry_run(found: list[Forecast], folder: Path, counts: str, as_json: bool) -> int:
    from dataclasses import asdict

    if as_json:
        typer.echo(json.dumps({"folder": str(folder), "cells": [asdict(f) for f in found]}, indent=2))
        return 0
    from probekit.store.sealing import human_bytes

    passes = sum(f.passes for f in found)
    seconds = sum(f.seconds for f in found)
    cost = (
        f"about {_duration(seconds)}, {human_bytes(sum(f.bytes for f in found))} kept"
        if passes
        else "nothing to do"
    )
    typer.echo(f"  {counts}: {passes} {'pass' if passes == 1 else 'passes'}, {cost} in {folder}")
    for f in found:
        times = f", {f.passes} passes with train images and variations" if f.passes > 1 else ""
        typer.echo(f"  {f.model} x {f.dataset}{times}")
        typer.echo(f"    {f.remaining} of {f.images} images to measure: {', '.join(f.metrics) or 'nothing'}")
        if f.skipped:
            typer.echo(f"    already there: {', '.join(f.skipped)}")
    return 0


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _closing(run: Run, catalog: Any, listen: Shown, as_json: bool) -> int:
    """The report, the counts, the exit code."""
    cells = list(run.cells())
    by_status: dict[str, list[Any]] = {}
    for cell in cells:
        by_status.setdefault(cell.outcome.status, []).append(cell)
    with json_alone(as_json):  # findings of plugins are in the page
        report = catalog.resolve_target(catalog.report("html"))(run, run.path / "report.html")
    if as_json:
        listed = [
            {
                "model": c.model,
                "dataset": c.dataset,
                "metric": c.metric,
                "status": c.outcome.status,
                "reason": c.outcome.reason,
            }
            for c in cells
        ]
        typer.echo(json.dumps({"folder": str(run.path), "report": str(report), "cells": listed}, indent=2))
    else:
        parts = [
            f"{_count(len(found), 'cell')} {_VERB.get(status, status)}" for status, found in by_status.items()
        ]
        if listen.bad_images:
            parts.append(f"{_count(listen.bad_images, 'image')} left out")
        typer.echo(f"  {', '.join(parts)}")
        typer.echo(f"  {report}")
        if "unfinished" in by_status:  # cells that this command didn't ask for
            for line in completing(run):
                typer.echo(f"  {line}")
    if listen.errors and "done" not in by_status:
        raise listen.errors[0]
    return 1 if by_status.get("failed") else 0
