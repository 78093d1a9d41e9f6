"""Carry out a grid: one pass per cell, skip what exists, contain what fails."""

from __future__ import annotations

import hashlib
import inspect
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from probekit.engine import Collector, collector, measure_batch, numerics, pick_device, within_memory
from probekit.errors import DataError, MetricError, ProbekitError
from probekit.events import Event, Listener, nobody
from probekit.grid import Grid, Resolved
from probekit.metric import Metric
from probekit.plugins.catalog import Catalog, Entry
from probekit.store.cells import CellFolder, Outcome, TraceFolder, identity_hash, require_same
from probekit.store.results import write_result
from probekit.store.runfolder import Run, create_run, shard_size
from probekit.store.writing import RunLock, Writer, remove_temporaries
from probekit.subject import LACKING, Live, Source, Subject, default_batch, open_dataset, versions


@dataclass(frozen=True)
class Forecast:
    """What a run would do in one cell: images to measure of how many, bytes kept, seconds of measuring."""

    model: str
    dataset: str
    images: int
    remaining: int
    metrics: tuple[str, ...]
    skipped: tuple[str, ...]
    bytes: int
    seconds: float


@dataclass
class Job:
    """One metric on one cell: its class, its traces, what is missing."""

    entry: Entry
    metric: Metric
    traces: TraceFolder
    missing: list[int] = field(default_factory=list)
    collector: Collector | None = None
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return str(self.entry.ref)

    @property
    def identity(self) -> str:
        return identity_hash(self.traces.identity)


def _source(entry: Entry, metric: Metric) -> dict[str, str]:
    """A metric from a file has no version to rely on: what it computes is the file's content."""
    if entry.version:
        return {}
    return {"source": hashlib.sha256(Path(inspect.getfile(type(metric))).read_bytes()).hexdigest()[:16]}


def execute(resolved: Resolved, catalog: Catalog, out: Path, listen: Listener = nobody) -> Run:
    """Do what is missing of a grid in the folder `out` and return the run.

    A metric or model that fails is recorded and the rest goes on. Ctrl-C leaves everything complete that
    was completed; the same call does the rest.

    Raises `ProbekitError` for what no cell can survive: a locked, full or newer folder, an unknown dataset.
    """
    device = pick_device(resolved.grid.device)
    datasets = [(entry, open_dataset(entry, catalog)) for entry in resolved.datasets]
    metrics = [(entry, make_metric(entry, catalog)) for entry in resolved.metrics]
    with RunLock(out):
        create_run(out, resolved, versions())
        for entry in resolved.models:
            for dataset in datasets:
                folder = CellFolder(out, str(entry.ref), str(dataset[0].ref))
                load = partial(Live.load, entry, dataset, resolved.grid, catalog, device, listen)
                run_cell(folder, load, metrics, resolved.grid, listen)
    return Run(out)


def forecast(resolved: Resolved, catalog: Catalog, out: Path) -> list[Forecast]:
    """What `execute` would do, from one measured batch of two images per cell. Writes nothing."""
    device = pick_device(resolved.grid.device)
    datasets = [(entry, open_dataset(entry, catalog)) for entry in resolved.datasets]
    metrics = [(entry, make_metric(entry, catalog)) for entry in resolved.metrics]
    found = []
    for entry in resolved.models:
        for dataset in datasets:
            folder = CellFolder(out, str(entry.ref), str(dataset[0].ref))
            load = partial(Live.load, entry, dataset, resolved.grid, catalog, device, nobody)
            found.append(_Cell(folder, load, metrics, resolved.grid, nobody).forecast())
    return found


def make_metric(entry: Entry, catalog: Catalog) -> Metric:
    """The metric an entry names, with its options. Raises `PluginError`, `MetricError` or `UsageError`."""
    made = catalog.resolve_target(entry)
    try:
        metric = made(**entry.options)
        complete = all(hasattr(metric, a) for a in ("name", "needs", "dims", "measure"))
    except ProbekitError:
        raise
    except Exception as error:
        raise MetricError(
            f"metric '{entry.qualified}' can't be made: {type(error).__name__}: {error}"
        ) from error
    if not complete:
        raise MetricError(f"metric '{entry.qualified}' lacks one of 'name', 'needs', 'dims' and 'measure'")
    return metric


def run_cell(
    folder: CellFolder,
    load: Callable[[], Subject],
    metrics: Sequence[tuple[Entry, Metric]],
    grid: Grid,
    listen: Listener,
) -> None:
    """Do what is missing of one cell. What fails in it is recorded; what no cell can survive is raised."""
    try:
        _Cell(folder, load, metrics, grid, listen).run()
    except ProbekitError as error:
        if not error.contained:
            raise
        _cell_failed(folder, metrics, error, listen)


def _cell_failed(
    cell: CellFolder, metrics: Sequence[tuple[Entry, Metric]], error: ProbekitError, listen: Listener
) -> None:
    for entry, _ in metrics:
        if cell.outcome(str(entry.ref)).status != "done":
            outcome = Outcome("failed", error.message, error.hint or "")
            cell.end(str(entry.ref), outcome)
    listen(Event("cell-failed", cell.model, cell.dataset, text=str(error), error=error))


@dataclass
class _Cell:
    folder: CellFolder
    load: Callable[[], Subject]
    metrics: Sequence[tuple[Entry, Metric]]
    grid: Grid
    listen: Listener

    def run(self) -> None:
        subject, identity, before, jobs = self._prepare()
        remaining = sorted({k for job in jobs for k in job.missing})
        total = sum(len(jobs[0].traces.ranges[k]) for k in remaining)
        self.listen(
            Event(
                "cell",
                self.folder.model,
                self.folder.dataset,
                total=len(subject.indices),
                done=len(subject.indices) - total,
            )
        )
        if remaining or before is None or any(not self._summarised(job) for job in jobs):
            self._pass(subject, identity, before, jobs, remaining)
        self.listen(Event("cell-done", self.folder.model, self.folder.dataset))

    def forecast(self) -> Forecast:
        subject, _, _, jobs = self._prepare()
        remaining = sorted({k for job in jobs for k in job.missing})
        total = sum(len(jobs[0].traces.ranges[k]) for k in remaining)
        wanted = [job for job in jobs if job.missing]
        kept, seconds = 0, 0.0
        if wanted:
            with numerics(subject.device, self.grid.dtype):
                watcher, pixels = subject.watch()
                collectors = [collector(job.metric, watcher) for job in wanted]
                measure_batch(watcher, pixels, collectors)
                started = time.perf_counter()
                values = measure_batch(watcher, pixels, collectors)
                seconds = (time.perf_counter() - started) / len(pixels) * total
            for job, found in zip(wanted, values, strict=True):
                images = sum(len(job.traces.ranges[k]) for k in job.missing)
                kept += images * sum(v.nbytes // len(pixels) for v in found.values())
        names = tuple(job.name for job in wanted)
        skipped = tuple(job.name for job in jobs if not job.missing)
        return Forecast(
            self.folder.model, self.folder.dataset, len(subject.indices), total, names, skipped, kept, seconds
        )

    def _prepare(self) -> tuple[Subject, dict[str, Any], dict[str, Any] | None, list[Job]]:
        subject = self.load()
        identity = subject.identity()
        before = self.folder.read()
        if before is not None:
            require_same(self.folder, before["identity"], identity)
        return subject, identity, before, self._jobs(subject, identity)

    def _jobs(self, subject: Subject, identity: dict[str, Any]) -> list[Job]:
        jobs, count = [], len(subject.indices)
        for entry, metric in self.metrics:
            path = self.folder.trace(str(entry.ref), metric.version)
            tag = {
                "cell": identity_hash(identity),
                "metric": entry.qualified,
                "version": metric.version,
                "options": dict(entry.options),
                **_source(entry, metric),
            }
            job = Job(entry, metric, TraceFolder(path, tag, count, shard_size(count)))
            reason, before = subject.lacks(metric), self._outcome(job)
            if reason:
                if before.status != "done":
                    self._end(job, Outcome("does not apply", reason))
            elif before.status != "does not apply" or before.reason.startswith(LACKING):
                job.missing, problems = job.traces.missing()
                for problem in problems:
                    self.listen(
                        Event(
                            "warning",
                            self.folder.model,
                            self.folder.dataset,
                            job.name,
                            f"{problem}: measured again",
                        )
                    )
            jobs.append(job)
        return jobs

    def _outcome(self, job: Job) -> Outcome:
        """How the metric ended here, unless that was another version of it."""
        found = self.folder.outcome(job.name)
        return found if found.trace == job.identity else Outcome("unfinished")

    def _summarised(self, job: Job) -> bool:
        outcome = self._outcome(job)
        return outcome.status == "does not apply" or (
            outcome.status == "done" and self.folder.result(job.name).exists()
        )

    # ------------------------------------------------------------------ the pass

    def _pass(
        self,
        subject: Subject,
        identity: dict[str, Any],
        before: dict[str, Any] | None,
        jobs: list[Job],
        remaining: list[int],
    ) -> None:
        batch_size = self.grid.batch_size or (before or {}).get("batch_size") or default_batch(subject.device)
        for job in jobs:
            if job.missing:
                remove_temporaries(job.traces.path)
            if len(job.missing) == len(job.traces.ranges):
                job.traces.forget_rows()
        if remaining or before is None:
            with numerics(subject.device, self.grid.dtype):
                source, _ = subject.watch()
                if before is None:
                    self.folder.write({"identity": identity, **subject.about(source, batch_size)})
                for job in jobs:
                    job.collector = collector(job.metric, source) if job.missing else None
                with Writer() as writer:
                    for shard in remaining:
                        self._shard(shard, jobs, subject, source, batch_size, writer)
        about = self.folder.read()
        for job in jobs:
            self._finish(job, about)

    def _shard(
        self,
        shard: int,
        jobs: list[Job],
        subject: Subject,
        source: Source,
        batch_size: int,
        writer: Writer,
    ) -> None:
        active = [
            j for j in jobs if shard in j.missing and j.collector.failure is None and j.collector.applies
        ]
        wanted, indices = jobs[0].traces.ranges[shard], subject.indices
        parts: dict[int, list[dict[str, np.ndarray]]] = {id(job): [] for job in active}
        kept: list[int] = []
        bad: list[dict[str, Any]] = []
        place = {indices[i]: i for i in wanted}
        for batch in subject.batches([indices[i] for i in wanted], batch_size, self.grid.workers):
            bad += [{"index": place[b.index], "id": b.id, "reason": b.reason} for b in batch.bad]
            if len(batch) and active:
                pixels = batch.pixels.to(subject.device, non_blocking=True)
                for job, values in zip(active, self._measure(source, pixels, active), strict=True):
                    parts[id(job)].append(values)
                kept += [place[i] for i in batch.indices]
            for b in batch.bad:
                self.listen(
                    Event(
                        "bad-image",
                        self.folder.model,
                        self.folder.dataset,
                        text=f"'{b.id}' is left out: {b.reason}",
                    )
                )
            self.listen(Event("images", done=len(batch) + len(batch.bad)))
        for job in active:
            found = parts[id(job)]
            if job.collector.failure is not None or not job.collector.applies:
                continue
            if not job.traces.path.joinpath("rows.json").exists() and found:
                writer.submit(
                    job.traces.write_rows,
                    job.collector.rows,
                    job.collector.constants,
                    dict(job.collector.reasons),
                )
            arrays = (
                {f"values/{n}": np.concatenate([p[n] for p in found]) for n in job.metric.dims}
                if found
                else {}
            )
            arrays["index"] = np.asarray(kept, dtype=np.int64)
            writer.write_shard(job.traces.shard(shard), arrays, {**job.traces.expected(shard), "bad": bad})

    def _measure(
        self, source: Source, pixels: torch.Tensor, active: list[Job]
    ) -> list[dict[str, np.ndarray]]:
        with within_memory(pixels):
            return measure_batch(source, pixels, [job.collector for job in active])

    # ------------------------------------------------------------------ results

    def _finish(self, job: Job, about: dict[str, Any]) -> None:
        if self._summarised(job) and not job.missing:
            return
        failure = job.collector.failure if job.collector else None
        outcome = None
        if failure is not None:
            outcome = Outcome("failed", failure.message, "", failure.details)
        elif job.collector is not None and not job.collector.applies:
            outcome = Outcome(
                "does not apply", next(iter(job.collector.reasons.values()), "the model has no such layers")
            )
        else:
            try:
                outcome = self._summarise(job, about)
            except ProbekitError as error:
                if not error.contained:
                    raise
                outcome = Outcome("failed", error.message, error.hint or "")
            except Exception as error:
                text = f"'summarize' raised {type(error).__name__}: {error}"
                outcome = Outcome("failed", text, "", traceback.format_exc())
        self._end(job, outcome)

    def _end(self, job: Job, outcome: Outcome) -> None:
        outcome = Outcome(
            **{
                **outcome.__dict__,
                "pack": job.entry.pack,
                "version": job.entry.version,
                "trace": job.identity,
            }
        )
        self.folder.end(job.name, outcome)
        self.listen(
            Event("metric", self.folder.model, self.folder.dataset, job.name, outcome.reason, outcome=outcome)
        )

    def _summarise(self, job: Job, about: dict[str, Any]) -> Outcome:
        started = time.perf_counter()
        traces = job.traces.read(about["ids"], about["labels"], self.grid.seed)
        if not len(traces):
            raise DataError(f"no image of dataset '{self.folder.dataset}' can be read")
        result = job.metric.summarize(traces)
        result.attrs.update(
            model=self.folder.model,
            dataset=self.folder.dataset,
            objective=about["objective"],
            weights_sha256=about["identity"]["weights"],
            images_fingerprint=about["identity"]["images"],
            preprocessing=about["identity"]["preprocessing"],
            dtype=about["identity"]["dtype"],
            device=about["device"],
            pack=f"{job.entry.pack} {job.entry.version}".strip(),
            probekit=about["versions"].get("vit-probekit", ""),
        )
        write_result(self.folder.result(job.name), result)
        return Outcome("done", images=len(traces), seconds=time.perf_counter() - started)
