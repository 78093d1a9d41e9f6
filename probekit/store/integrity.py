"""Every file of a run read with its checksums: what is damaged or missing, and what to do about it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probekit.errors import StoreError
from probekit.store.cells import FORMAT_VERSION, TraceFolder, identity_hash
from probekit.store.results import read_result, verify_result
from probekit.store.runfolder import Run, shard_size
from probekit.store.sealing import Damaged, read_json
from probekit.store.shards import shard_problem

_AGAIN = "run the command that made the run again: it measures what is damaged or missing"
_RESULT = "delete it and run the same command again: results are made from the traces"
_ASIDE = "move it away and run the same command again"


@dataclass(frozen=True)
class Fault:
    """One file that is damaged, missing or not what its place says."""

    file: str
    problem: str
    remedy: str


@dataclass
class Tally:
    """What was found whole, and cells that aren't finished."""

    shards: int = 0
    results: int = 0
    others: int = 0
    bytes: int = 0
    unfinished: int = 0


def verify(run: Run, tally: Tally) -> Iterator[Fault]:
    """Everything that is wrong with a run's files, while what is whole is counted in `tally`.

    Cells that an older grid of this folder had are read too. Raises `StoreError` for what isn't damage: a
    file of a newer probekit, or one that may not be read.
    """
    belongs: dict[Path, dict[str, Any]] = {}
    for path in sorted((run.path / "cells").glob("*/*/cell.json")):
        with contextlib.suppress(StoreError, KeyError, TypeError):
            belongs[path.parent] = {
                "cell": identity_hash(read_json(path, "cell", FORMAT_VERSION)["identity"])
            }
    damaged = set()
    for path in sorted((run.path / "cells").rglob("*")):
        if path.suffix in (".h5", ".nc", ".json") and path.is_file():
            cell = next((folder for folder in path.parents if folder in belongs), None)
            for fault in _file(run, path, belongs[cell] if cell else {}, tally):
                damaged.add(path)
                yield fault
    yield from _promises(run, damaged, tally)


def _promises(run: Run, damaged: set[Path], tally: Tally) -> Iterator[Fault]:
    """What isn't there though its cell is done."""
    for model in run.models:
        for dataset in run.datasets:
            folder = run.folder(model, dataset)
            for metric in run.metrics:
                try:
                    status = folder.outcome(metric).status
                    images = len((folder.read() or {}).get("ids", ()))
                except Damaged:  # named already
                    continue
                tally.unfinished += status == "unfinished"
                path = folder.result(metric)
                if status != "done" or path in damaged:
                    continue
                if not path.exists():
                    yield _fault(run, path, "the result is missing though its cell is done", _AGAIN)
                    continue
                said = read_result(path).attrs
                source = said.get("source", metric), int(said.get("source_version", said.get("version", 1)))
                shards = TraceFolder(folder.trace(*source), {}, images, shard_size(images))
                with contextlib.suppress(Damaged):  # named already
                    shards = shards.as_written()
                for index in shards.shards:
                    if not shards.shard(index).exists():
                        gone = "the shard is missing though its cell is done"
                        yield _fault(run, shards.shard(index), gone, _AGAIN)


def _file(run: Run, path: Path, expected: dict[str, Any], tally: Tally) -> Iterator[Fault]:
    try:
        if path.suffix == ".h5":
            problem = shard_problem(path, expected, verify=True)
            if problem is not None:
                yield _fault(run, path, problem, _AGAIN)
                return
            tally.shards += 1
        elif path.suffix == ".nc":
            verify_result(path)
            tally.results += 1
        else:
            read_json(path, path.stem, FORMAT_VERSION)
            tally.others += 1
    except Damaged as error:
        yield _fault(run, path, error.message, _RESULT if path.suffix == ".nc" else _ASIDE)
        return
    tally.bytes += path.stat().st_size


def _fault(run: Run, path: Path, problem: str, remedy: str) -> Fault:
    # the path stands above it already
    short = problem.replace(f"'{path}' ", "")
    return Fault(str(path.relative_to(run.path)), short, remedy)
