"""A training as it goes: a bar with loss, rate and curve on a terminal, lines elsewhere; log and figure."""

from __future__ import annotations

import csv
import io
import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from probekit.store.sealing import write_bytes
from probekit_train.training import Report

_LEVELS = "▁▂▃▄▅▆▇█"
_LINE_EVERY = 60.0  # seconds between lines where there is no terminal


class Shown:
    """Hears a training's reports; with `console` None nothing is printed."""

    def __init__(self, console: Console | None, progress: Progress | None) -> None:
        self.console = console
        self.progress = progress
        self.task: Any = None
        self._losses: list[float] = []
        self._warned: set[str] = set()
        self._line = 0.0

    def decoding(self, done: int, total: int) -> None:
        """Images decoded so far."""
        if self.progress is None:
            return
        if self.task is None:
            self.task = self.progress.add_task("reading images", total=total, text="")
        self.progress.update(self.task, completed=done)
        if done == total:
            self.progress.remove_task(self.task)
            self.task = None

    def __call__(self, report: Report) -> None:
        row = report.row
        self._losses.append(row["loss"])
        text = f"loss {row['loss']:.4f} {row['images_per_second']:.0f} img/s {sparkline(self._losses, 16)}"
        if self.progress is not None:
            if self.task is None:
                self.task = self.progress.add_task(
                    "step", total=report.steps, completed=report.step, text=text
                )
            self.progress.update(self.task, completed=report.step, text=text)
        elif self.console is not None and time.monotonic() - self._line > _LINE_EVERY:
            self._line = time.monotonic()
            left = (report.steps - report.step) / max(report.step, 1) * row["seconds"]
            self.say(f"  step {report.step}/{report.steps}  {text}  {left / 60:.0f} min left")
        for kind, warning in report.warnings.items():
            if kind not in self._warned:
                self._warned.add(kind)
                self.say(f"  alarm at step {report.step}: {warning}")

    def say(self, text: str) -> None:
        if self.console is not None:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class _Counted(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{int(task.completed)}/{int(task.total or 0)}")


@contextmanager
def shown(quiet: bool) -> Iterator[Shown]:
    """quiet: for ``--json`` and for all processes but the first"""
    if quiet:
        yield Shown(None, None)
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Shown(console, None)
        return
    columns = (
        TextColumn("  {task.description}"),
        _Counted(),
        BarColumn(24),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield Shown(console, progress)


def sparkline(values: Sequence[float], width: int) -> str:
    """The values as one line of `width` blocks at most, each the mean of its share."""
    if not values:
        return ""
    count = min(width, len(values))
    bounds = [number * len(values) // count for number in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(bounds)]
    low, high = min(means), max(means)
    scale = (len(_LEVELS) - 1) / (high - low) if high > low else 0
    return "".join(_LEVELS[round((mean - low) * scale)] for mean in means)


def write_log(folder: Path, rows: Sequence[dict[str, float]]) -> None:
    """``log.csv`` and ``loss.svg`` of a training. Raises StoreError."""
    if not rows:
        return
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    write_bytes(folder / "log.csv", text.getvalue().encode())
    write_bytes(folder / "loss.svg", _figure(rows, names))


def _cell(value: float) -> str:
    """Counts whole, everything else in six digits."""
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def _figure(rows: Sequence[dict[str, float]], names: Sequence[str]) -> bytes:
    from matplotlib.figure import Figure

    drawn = [name for name in names if name not in ("step", "images", "seconds", "images_per_second")]
    figure = Figure(figsize=(6, 1.6 * len(drawn)), layout="constrained")
    axes = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
    for axis, name in zip(axes, drawn, strict=True):
        points = [(row["images"], row[name]) for row in rows if name in row]
        axis.plot(*zip(*points, strict=True), linewidth=0.8)
        axis.set_ylabel(name)
    axes[-1].set_xlabel("images seen")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
