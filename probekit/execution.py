"""Carry out a grid: the passes each cell needs, skip what exists, contain what fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from probekit.engine import pick_device
from probekit.errors import DataError, DoesNotApply, ProbekitError
from probekit.events import Event, Listener, nobody
from probekit.finishing import compare_models, contained, end_metric, store_result
from probekit.grid import Grid, Resolved
from probekit.jobs import Chosen, Job, choose_metrics
from probekit.metric import Traces
from probekit.passes import (
    Measurement,
    PassRunner,
    images_to_do,
    left_to_do,
    measurement,
    try_out,
)
from probekit.plugins.catalog import Catalog, Entry
from probekit.store.cells import CellFolder, Outcome, require_same
from probekit.store.runfolder import Run, create_run
from probekit.store.writing import RunLock
from probekit.subject import Live, Subject, View, default_batch, open_dataset, versions


@dataclass(frozen=True)
class Forecast:
    """What a run would do in one cell: images to measure of how many, bytes kept, seconds of measuring.

    passes: how many times images go through the model, with train splits and variations
    """

    model: str
    dataset: str
    images: int
    remaining: int
    metrics: tuple[str, ...]
    skipped: tuple[str, ...]
    bytes: int
    seconds: float
    passes: int = 0


def execute(resolved: Resolved, catalog: Catalog, out: Path, listen: Listener = nobody) -> Run:
    """Do what is missing of a grid in the folder `out` and return the run.

    A metric or model that fails is recorded and the rest goes on. Ctrl-C leaves everything complete that
    was completed; the same call does the rest.

    Raises `ProbekitError` for what no cell can survive: a locked, full or newer folder, an unknown dataset.
    """
    with_metrics, loads = _arranged(resolved, catalog, listen)
    with RunLock(out):
        create_run(out, resolved, versions())
        for model, dataset, load in loads:
            run_cell(CellFolder(out, model, dataset), load, with_metrics, resolved.grid, listen)
        return finish_run(Run(out), with_metrics, listen)


def forecast(resolved: Resolved, catalog: Catalog, out: Path) -> list[Forecast]:
    """What `execute` would do, from one measured batch of two images per pass. Writes nothing."""
    with_metrics, loads = _arranged(resolved, catalog, nobody)
    return [
        _Cell(CellFolder(out, model, dataset), load, with_metrics, resolved.grid, nobody).forecast()
        for model, dataset, load in loads
    ]


def _arranged(
    resolved: Resolved, catalog: Catalog, listen: Listener
) -> tuple[list[Chosen], list[tuple[str, str, Callable[[], Subject]]]]:
    """The metrics, and every cell's model and dataset with what loads them."""
    device = pick_device(resolved.grid.device)
    datasets = [(entry, open_dataset(entry, catalog)) for entry in resolved.datasets]
    train = open_dataset(resolved.train, catalog) if resolved.train else None
    # `--train` may name a dataset by its held-out images: what is meant is its train split
    train = train.train if train is not None and train.train is not None else train
    chosen = choose_metrics(resolved.metrics, catalog)
    cells = [
        (
            str(model.ref),
            str(dataset[0].ref),
            partial(Live.load, model, dataset, resolved.grid, catalog, device, listen, train),
        )
        for model in resolved.models
        for dataset in datasets
    ]
    return chosen, cells


def run_cell(
    folder: CellFolder,
    load: Callable[[], Subject],
    metrics: Sequence[Chosen],
    grid: Grid,
    listen: Listener,
) -> None:
    """Do what is missing of one cell. What fails in it is recorded; what no cell can survive is raised."""
    try:
        _Cell(folder, load, metrics, grid, listen).run()
    except ProbekitError as error:
        if not error.contained:
            raise
        for chosen in metrics:
            if folder.outcome(str(chosen.entry.ref)).status != "done":
                folder.end(str(chosen.entry.ref), Outcome("failed", error.message, error.hint or ""))
        listen(Event("cell-failed", folder.model, folder.dataset, text=str(error), error=error))


def finish_run(run: Run, metrics: Sequence[Chosen], listen: Listener) -> Run:
    """When all cells are measured: the metrics that compare their models."""
    for chosen in metrics:
        if chosen.metric.others:
            entry, metric = chosen.measured
            compare_models(run, chosen.entry, chosen.metric, (str(entry.ref), metric.version), listen)
    return run


@dataclass
class _Cell:
    folder: CellFolder
    load: Callable[[], Subject]
    metrics: Sequence[Chosen]
    grid: Grid
    listen: Listener

    def run(self) -> None:
        subject, identity, before, jobs = self._prepare()
        self._measure(subject, identity, before, _passes(jobs))
        about = self.folder.read()
        for job in jobs:
            self._finish(job, subject, about)
        self.listen(Event("cell-done", self.folder.model, self.folder.dataset))

    def forecast(self) -> Forecast:
        subject, _, _, jobs = self._prepare()
        kept, seconds, remaining, count = 0, 0.0, 0, 0
        for measurements in _passes(jobs):
            wanted = [m for m in measurements if m.missing]
            if wanted:
                view = wanted[0].view
                size, duration = try_out(subject.view(view), wanted)
                kept, seconds, count = kept + size, seconds + duration, count + 1
                remaining += images_to_do(wanted) if view == View() else 0
        names = tuple(job.name for job in jobs if any(m.missing for m in job.measurements))
        skipped = tuple(job.name for job in jobs if job.name not in names)
        total = len(subject.indices)
        where = self.folder.model, self.folder.dataset
        return Forecast(*where, total, remaining, names, skipped, kept, seconds, count)

    def _prepare(self) -> tuple[Subject, dict[str, Any], dict[str, Any] | None, list[Job]]:
        subject = self.load()
        identity = subject.identity()
        before = self.folder.read()
        if before is not None:
            require_same(self.folder, before["identity"], identity)
        return subject, identity, before, self._jobs(subject, identity)

    # ------------------------------------------------------------------ what is needed

    def _jobs(self, subject: Subject, identity: dict[str, Any]) -> list[Job]:
        """One for each metric that can be tried; of the others it is recorded why not."""
        shared: dict[tuple[str, str], Measurement] = {}

        def of(chosen: Chosen, view: View) -> Measurement:
            entry, metric = chosen.measured
            key = str(entry.ref), view.name
            if key not in shared:
                shared[key] = measurement(entry, metric, view, subject.view(view), self.folder, identity)
            return shared[key]

        jobs = []
        for chosen in self.metrics:
            if reason := _lacking(subject, chosen):
                if self.folder.outcome(str(chosen.entry.ref)).status != "done":
                    self._end(chosen.entry, Outcome("does not apply", reason))
                continue
            train = "train" in chosen.metric.requires
            varied = {
                v.name: (
                    of(chosen, View("measured", v)),
                    of(chosen, View("train", v)) if train and v.train else None,
                )
                for v in chosen.metric.variations()
            }
            own = of(chosen, View())
            jobs.append(Job(chosen, own, of(chosen, View("train")) if train else None, varied))
        # one that has no meaning here is not measured again, unless another metric wants the same traces
        wanted = {id(m): m for job in jobs if not self._meaningless(job) for m in job.measurements}
        for m in wanted.values():
            m.missing, problems = m.traces.missing()
            for problem in problems:
                text = f"{problem}: measured again"
                self.listen(Event("warning", *self._names, str(m.entry.ref), text))
        return jobs

    @property
    def _names(self) -> tuple[str, str]:
        return self.folder.model, self.folder.dataset

    def _outcome(self, job: Job) -> Outcome:
        """How the metric ended here, unless that was another version of it."""
        found = self.folder.outcome(job.name)
        return found if found.trace == job.identity else Outcome("unfinished")

    def _meaningless(self, job: Job) -> bool:
        return self._outcome(job).status == "does not apply"

    def _settled(self, job: Job) -> bool:
        if any(m.missing for m in job.measurements):
            return False
        done = self._outcome(job).status == "done" and self.folder.result(job.name).exists()
        return done or self._meaningless(job)

    # ------------------------------------------------------------------ the passes

    def _measure(
        self,
        subject: Subject,
        identity: dict[str, Any],
        before: dict[str, Any] | None,
        passes: Sequence[Sequence[Measurement]],
    ) -> None:
        batch_size = self.grid.batch_size or (before or {}).get("batch_size")
        batch_size = batch_size or default_batch(subject.device, identity["preprocessing"]["size"])
        if before is None:
            with subject.active():
                source, _ = subject.watch()
                self.folder.write({"identity": identity, **subject.about(source, batch_size)})
        shown = {id(group): subject.view(group[0].view) for group in passes}
        total = sum(len(view.indices) for view in shown.values())
        done = total - sum(map(images_to_do, passes))
        self.listen(Event("cell", *self._names, total=total, done=done))
        for measurements in passes:
            if left_to_do(measurements):
                view = shown[id(measurements)]
                runner = PassRunner(
                    view, measurements, batch_size, self.grid.workers, self._names, self.listen
                )
                self._pass(view, measurements, runner)

    def _pass(self, view: Subject, measurements: Sequence[Measurement], runner: PassRunner) -> None:
        self.listen(Event("pass", *self._names, text=measurements[0].view.name))
        try:
            with view.active():
                source, _ = view.watch()
                runner.prepare(source)
                runner.run(source)
        except DoesNotApply as reason:  # the variation changes what this model hasn't got
            self.listen(Event("images", done=images_to_do(measurements)))
            for m in measurements:
                m.missing = []
                m.traces.write_absent(reason.message)

    # ------------------------------------------------------------------ results

    def _finish(self, job: Job, subject: Subject, about: dict[str, Any]) -> None:
        if self._settled(job):
            return
        outcome = _measured_outcome(job)
        if outcome is None and job.metric.others:
            return  # when all models are there
        if outcome is None:
            self.listen(Event("summary", *self._names, job.name))
            outcome = contained(lambda: self._summarise(job, subject, about))
        self._end(job.entry, outcome, job.identity)

    def _summarise(self, job: Job, subject: Subject, about: dict[str, Any]) -> Outcome:
        started = time.perf_counter()
        traces = self._traces(job, subject)
        if not len(traces):
            raise DataError(f"no image of dataset '{self.folder.dataset}' can be read")
        entry, metric = job.chosen.measured
        traced = str(entry.ref), metric.version
        store_result(self.folder, job.entry, job.metric.summarize(traces), about, traced)
        return Outcome("done", images=len(traces), seconds=time.perf_counter() - started)

    def _traces(self, job: Job, subject: Subject) -> Traces:
        mapped = job.chosen.source is not None

        def read(m: Measurement, train: Measurement | None = None) -> Traces:
            shown = subject.view(m.view)
            traces = shown.completed(m.read(shown, self.grid.seed, mapped=mapped))
            return replace(traces, train=read(train)) if train is not None else traces

        varied = {name: read(*pair) for name, pair in job.variations.items() if not pair[0].traces.absent}
        return replace(read(job.own, job.train), variations=varied)

    def _end(self, entry: Entry, outcome: Outcome, identity: str = "") -> None:
        end_metric(self.folder, entry, outcome, identity, self.listen)


def _passes(jobs: Sequence[Job]) -> list[list[Measurement]]:
    """What is measured together, each pass once: the measured images first."""
    found: dict[str, dict[int, Measurement]] = {}
    for job in jobs:
        for m in job.measurements:
            found.setdefault(m.view.name, {})[id(m)] = m
    return [list(group.values()) for group in found.values()]


def _lacking(subject: Subject, chosen: Chosen) -> str:
    """Why a metric can't be tried on a subject; "" when it can."""
    _, measured = chosen.measured
    if reason := subject.lacks(chosen.metric) or subject.lacks(measured):
        return reason
    try:
        measured.sample(*_sizes(subject))
    except DoesNotApply as error:
        return error.message
    return ""


def _sizes(subject: Subject) -> tuple[int, list[int] | None]:
    ids, labels = subject.listed()
    return len(ids), labels


def _measured_outcome(job: Job) -> Outcome | None:
    """How a metric ended that could not be measured; None when its traces are complete."""
    for m in job.measurements:
        c = m.collector
        if m.traces.absent:
            continue
        if c is not None and c.failure is not None:
            return Outcome("failed", c.failure.message, "", c.failure.details)
        if c is not None and not c.applies:
            return Outcome("does not apply", next(iter(c.reasons.values()), "the model has no such layers"))
        if c is None and m.traces.rows() is None:
            return Outcome("does not apply", f"'{m.entry.ref}' does not apply")
    return None
