"""A run as its folder tells it: what was asked, how each cell ended, results. Reads without torch."""

from __future__ import annotations

import datetime
import socket
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probekit.errors import StoreError, UsageError
from probekit.names import did_you_mean, parse_metric
from probekit.store.cells import FORMAT_VERSION, MEASURED, CellFolder, Outcome, TraceFolder, identity_hash
from probekit.store.sealing import foreign_files
from probekit.store.shards import canonical_json
from probekit.store.writing import read_json, seal_json

if TYPE_CHECKING:
    import xarray as xr

    from probekit.grid import Resolved
    from probekit.metric import Traces


@dataclass(frozen=True)
class Cell:
    """One metric on one model and dataset."""

    model: str
    dataset: str
    metric: str
    outcome: Outcome


def how_they_ended(cells: Iterable[Cell]) -> str:
    """``5 done, 1 failed, 3 do not apply``"""
    counts = Counter(cell.outcome.status for cell in cells)
    said = {status: status for status in ("done", "failed", "unfinished")}
    said["does not apply"] = "does not apply" if counts["does not apply"] == 1 else "do not apply"
    return ", ".join(f"{counts[status]} {words}" for status, words in said.items() if counts[status])


class Run:
    """A run folder. `probekit.open(path)` makes one.

    path:      the folder
    models, metrics, datasets: references, in the order first asked for
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise StoreError(
                f"run folder '{self.path}' does not exist", hint="`probekit run --out DIR` makes one"
            )
        file = self.path / "run.json"
        if not file.exists():
            raise StoreError(f"'{self.path}' is no run folder: it has no run.json")
        self.info: Mapping[str, Any] = read_json(file, "run", FORMAT_VERSION)
        try:
            names = self.info["names"]
            self.models, self.metrics, self.datasets = (
                list(names[k]) for k in ("models", "metrics", "datasets")
            )
            self.seed = int(self.info["settings"]["seed"])
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"run file '{file}' is damaged: it has no {error}") from error
        self._results: dict[Path, tuple[tuple[int, int, int], xr.Dataset]] = {}

    def __repr__(self) -> str:
        counts = f"{len(self.models)} models, {len(self.metrics)} metrics, {len(self.datasets)} datasets"
        return f"Run('{self.path}', {counts})"

    def folder(self, model: str, dataset: str) -> CellFolder:
        return CellFolder(self.path, model, dataset)

    def cells(self) -> Iterator[Cell]:
        """Every cell of the grid with how it ended."""
        for model in self.models:
            for dataset in self.datasets:
                folder = self.folder(model, dataset)
                for metric in self.metrics:
                    outcome = folder.outcome(metric)
                    if outcome.status == "done" and not folder.result(metric).exists():
                        outcome = Outcome("unfinished")
                    yield Cell(model, dataset, metric, outcome)

    def result(self, metric: str, *, model: str | None = None, dataset: str | None = None) -> xr.Dataset:
        """One cell's result. `model` and `dataset` may be left out where the run has only one."""
        from probekit.store.results import read_result

        metric = _one("metric", metric, self.metrics)
        model, dataset = _one("model", model, self.models), _one("dataset", dataset, self.datasets)
        folder = self.folder(model, dataset)
        outcome = folder.outcome(metric)
        if outcome.status != "done":
            why = f": {outcome.reason}" if outcome.reason else ""
            raise StoreError(
                f"'{metric}' of '{model}' on '{dataset}' has no result, it is {outcome.status}{why}"
            )
        path = folder.result(metric)
        found = path.stat() if path.exists() else None
        seen = (found.st_ino, found.st_mtime_ns, found.st_size) if found else None
        if seen is None or self._results.get(path, (None,))[0] != seen:  # one file is asked for by many
            self._results[path] = seen, read_result(path)
        return self._results[path][1].copy(deep=True)  # what a caller changes is the caller's

    def results(self) -> Iterator[tuple[Cell, xr.Dataset]]:
        """Every finished cell with its result."""
        for cell in self.cells():
            if cell.outcome.status == "done":
                yield cell, self.result(cell.metric, model=cell.model, dataset=cell.dataset)

    def about(self, model: str, dataset: str) -> Mapping[str, Any]:
        """What a cell was made from (weights, images, preprocessing, anatomy); {} before it began.

        Names may be shortened as in `result`.
        """
        model, dataset = _one("model", model, self.models), _one("dataset", dataset, self.datasets)
        return self.folder(model, dataset).read() or {}

    def untrained(self, model: str) -> bool:
        """Whether a model's weights are random ones, or its pack says that nothing has trained them."""
        if model.endswith("@random"):
            return True
        for dataset in self.datasets:
            try:
                about = self.about(model, dataset)
            except StoreError:  # whoever asks for its numbers hears what is wrong
                continue
            if about:  # every cell of a model has the same weights
                return about.get("objective") == "untrained" or weights_of(about).get("kind") == "random"
        return False

    def trace_folders(self) -> Iterator[tuple[str, str, Path]]:
        """(model, dataset, folder) of every trace that has begun."""
        for model in self.models:
            for dataset in self.datasets:
                for rows in sorted(
                    (self.folder(model, dataset).path / "traces").glob(f"*/{MEASURED}/rows.json")
                ):
                    yield model, dataset, rows.parent

    def traces(self, metric: str, *, model: str | None = None, dataset: str | None = None) -> Traces:
        """Per-image values of one cell, in dataset order."""
        metric = _one("metric", metric, self.metrics)
        model, dataset = _one("model", model, self.models), _one("dataset", dataset, self.datasets)
        result = self.result(metric, model=model, dataset=dataset)
        about, version = self.about(model, dataset), int(result.attrs["version"])
        path = self.folder(model, dataset).trace(metric, version)
        if not path.exists():
            raise StoreError(
                f"'{metric}' keeps no values of its own",
                hint="it is made from another metric's: see its page",
            )
        count = len(about["ids"])
        tag = {"cell": identity_hash(about["identity"]), "version": version}
        if pack := self.folder(model, dataset).outcome(metric).pack:
            tag["metric"] = f"{pack}/{parse_metric(metric).name}"
        folder = TraceFolder(path, tag, count, shard_size(count)).as_written()
        return folder.read(about["ids"], about["labels"], self.seed)

    def bad_images(self, model: str, dataset: str) -> list[dict[str, Any]]:
        """Images that could not be read in a cell: index, id and reason.

        Names may be shortened as in `result`.
        """
        model, dataset = _one("model", model, self.models), _one("dataset", dataset, self.datasets)
        about = self.about(model, dataset)
        found: dict[int, dict[str, Any]] = {}
        for name, where, path in self.trace_folders():
            if (name, where) == (model, dataset) and about:
                count = len(about["ids"])
                traces = TraceFolder(path, {}, count, shard_size(count)).as_written()
                found |= {bad["index"]: bad for bad in traces.bad_images()}
                if traces.sample is None:
                    break  # it saw all images
        return [found[index] for index in sorted(found)]


def weights_of(about: Mapping[str, Any]) -> Mapping[str, Any]:
    """The weights' identity in what a cell was made from; {} where it says none."""
    found = about.get("weights")
    return found if isinstance(found, Mapping) else {}


def shard_size(total: int) -> int:
    """Images per shard, from the number of images alone: a kill's cost against the number of files.

    A multiple of 16: of few images an eighth, up to 64; of many a thirty-second, up to 512.
    """
    eighth, thirtysecond = (16 * -(-total // (16 * parts)) for parts in (8, 32))
    return max(16, min(64, eighth), min(512, thirtysecond))


def _one(kind: str, name: str | None, known: list[str]) -> str:
    if name is None:
        if len(known) == 1:
            return known[0]
        raise UsageError(f"the run has {len(known)} {kind}s: say which", hint=", ".join(known))
    if name in known:
        return name
    matches = [k for k in known if k.partition(":")[0] == name or k.partition("@")[0] == name]
    if len(matches) == 1:
        return matches[0]
    raise UsageError(
        f"the run has no {kind} '{name}'", hint=did_you_mean(name, known) or f"it has {', '.join(known)}"
    )


def create_run(path: Path, resolved: Resolved, versions: Mapping[str, str]) -> None:
    """Write run.json, or add what is new to the one there.

    Raises `StoreError` if the folder holds something else, or a run with other settings.
    """
    file, settings, names = path / "run.json", resolved.grid.settings(), resolved.names()
    if file.exists():
        before = read_json(file, "run", FORMAT_VERSION)
        for key, value in settings.items():
            if before["settings"].get(key) != value:
                raise StoreError(
                    f"'{path}' holds a run with {key} = {before['settings'].get(key)}, not {value}",
                    hint="use another folder with `--out`",
                )
        names = {k: list(dict.fromkeys([*before["names"][k], *names[k]])) for k in names}
        if names == before["names"]:
            return
        seal_json(file, {**before, "names": names})
        return
    if foreign := foreign_files(path):
        raise StoreError(
            f"'{path}' holds other files ('{foreign[0]}') and no run", hint="use an empty folder with `--out`"
        )
    content = {
        "format_version": FORMAT_VERSION,
        "asked": resolved.grid.model_dump(mode="json"),
        "settings": settings,
        "names": names,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "versions": dict(versions),
    }
    seal_json(file, content)


def choose_folder(resolved: Resolved, parent: Path = Path("runs")) -> tuple[Path, bool]:
    """Where a run without ``--out`` goes: the newest run of the very same grid, else a new folder.

    Returns the folder and whether it is there already.
    """
    same = []
    for file in parent.glob("*/run.json"):
        try:
            found = read_json(file, "run", FORMAT_VERSION)
            if found["names"] == resolved.names() and canonical_json(found["settings"]) == canonical_json(
                resolved.grid.settings()
            ):
                same.append((found["created"], file.parent))
        except (StoreError, KeyError, TypeError):
            continue
    if same:
        return max(same)[1], True
    day = datetime.date.today().isoformat()
    number = 1
    while (parent / f"{day}-{number}").exists():
        number += 1
    return parent / f"{day}-{number}", False
