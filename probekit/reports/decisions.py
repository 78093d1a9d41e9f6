"""What each image was decided to show where its shape and its texture disagree: every trial of a run."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probekit.errors import StoreError
from probekit.metrics import trials
from probekit.reports.charts import clean
from probekit.store.sealing import write_bytes

if TYPE_CHECKING:
    from probekit.store.runfolder import Run

COLUMNS = ("model", "dataset", "metric", *trials.COLUMNS)
_TRIALS = {"decisions", "shape", "texture", "counted"}


def render(run: Run, path: Path) -> Path:
    """Write `COLUMNS` and a row for each layer and image of every result that holds decisions.

    Raises `StoreError` where there is none, one is damaged, or the file can't be written.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    count = 0
    for row in rows(run):
        writer.writerow(row)
        count += 1
    if not count:
        raise StoreError(
            f"'{run.path}' holds no decisions between shape and texture",
            hint="`shape_bias` makes them, on a dataset that says which shape and texture an image shows",
        )
    write_bytes(Path(path), buffer.getvalue().encode("utf-8"))
    return Path(path)


def rows(run: Run) -> Iterator[Sequence[Any]]:
    """Rows of finished cells, in the run's order."""
    for cell, result in run.results():
        if set(result.data_vars) >= _TRIALS and "class" in result.coords:
            about = clean(cell.model), clean(cell.dataset), cell.metric
            for row in trials.rows(result):
                yield (*about, *map(clean, row))
