"""One cell of a run, a model on a dataset: what is missing of it, measured, summarised, recorded."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from probekit.engine import Collector, Failure
from probekit.errors import DataError, DoesNotApply, PluginError, ProbekitError
from probekit.events import Event, Listener, nobody
from probekit.finishing import contained, end_metric, store_result
from probekit.grid import Grid
from probekit.jobs import Chosen, Job
from probekit.metric import Traces
from probekit.passes import (
    Measurement,
    PassRunner,
    images_to_do,
    left_to_do,
    measurement,
    try_out,
)
from probekit.plugins.catalog import Entry
from probekit.plugins.loading import describe
from probekit.store.cells import CellFolder, Outcome, require_same
from probekit.subject import Subject, View, default_batch, device_name, versions


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
    except (Exception, SystemExit) as error:
        failure, details = error, ""
        if not isinstance(error, ProbekitError):  # nobody has said yet whose it is
            where = f"'{folder.model}' on '{folder.dataset}'"
            failure = PluginError(f"{where} failed: {describe(error)}", hint="--debug shows where")
            failure.__cause__ = error
        if isinstance(failure, PluginError) and failure.__cause__ is not None:  # for whoever wrote the code
            details = "".join(traceback.format_exception(failure.__cause__))
        if not failure.contained:
            raise
        for chosen in metrics:
            if folder.outcome(str(chosen.entry.ref)).status != "done":
                outcome = Outcome("failed", failure.message, failure.hint or "", details)
                folder.end(str(chosen.entry.ref), outcome)
        listen(Event("cell-failed", folder.model, folder.dataset, text=str(failure), error=failure))


def forecast_cell(
    folder: CellFolder, load: Callable[[], Subject], metrics: Sequence[Chosen], grid: Grid
) -> Forecast:
    """What `run_cell` would do, from one measured batch of two images per pass. Writes nothing."""
    return _Cell(folder, load, metrics, grid, nobody).forecast()


@dataclass(frozen=True)
class _Plan:
    """A loaded cell: what cell.json said before, what is to be done, and how what can't be tried ended."""

    subject: Subject
    identity: dict[str, Any]
    before: dict[str, Any] | None
    jobs: list[Job]
    ended: list[tuple[Entry, Outcome]]


@dataclass
class _Cell:
    folder: CellFolder
    load: Callable[[], Subject]
    metrics: Sequence[Chosen]
    grid: Grid
    listen: Listener

    def run(self) -> None:
        plan = self._prepare()
        for entry, outcome in plan.ended:
            if self.folder.outcome(str(entry.ref)).status != "done":
                self._end(entry, outcome)
        self._measure(plan)
        about = self.folder.read()
        for job in plan.jobs:
            self._finish(job, plan.subject, about)
        self.listen(Event("cell-done", self.folder.model, self.folder.dataset))

    def forecast(self) -> Forecast:
        plan = self._prepare()
        subject, jobs = plan.subject, plan.jobs
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

    def _prepare(self) -> _Plan:
        """What there is to do. Writes nothing: a dry run asks too."""
        subject = self.load()
        identity = subject.identity()
        before = self.folder.read()
        if before is not None:
            require_same(self.folder, before["identity"], identity)
        return _Plan(subject, identity, before, *self._jobs(subject, identity))

    def _go_on(self, before: Mapping[str, Any], subject: Subject) -> None:
        """Write this device and these versions beside those that measured until now."""
        now = {"device": device_name(subject.device), **versions()}
        then = {"device": before["device"], **before["versions"]}
        both = {key: _joined(then.get(key), value) for key, value in now.items()}
        changed = [key for key in ("device", "torch", "vit-probekit") if both[key] != then.get(key)]
        if changed:
            texts = [f"{key} was {then.get(key)}, is {now[key]}" for key in changed]
            text = f"{'; '.join(texts)}: numbers may differ in their last digits"
            self.listen(Event("warning", *self._names, text=text))
        if both != {key: then.get(key) for key in both}:
            device = both.pop("device")
            said = {"device": device, "versions": {**before["versions"], **both}}
            self.folder.write({**before, **said})

    # ------------------------------------------------------------------ what is needed

    def _jobs(
        self, subject: Subject, identity: dict[str, Any]
    ) -> tuple[list[Job], list[tuple[Entry, Outcome]]]:
        """One for each metric that can be tried; of the others how they ended."""
        shared: dict[tuple[str, str], Measurement] = {}

        def of(chosen: Chosen, view: View) -> Measurement:
            entry, metric = chosen.measured
            key = str(entry.ref), view.name
            if key not in shared:
                shared[key] = measurement(entry, metric, view, subject.view(view), self.folder, identity)
            return shared[key]

        def begin(chosen: Chosen) -> Outcome:
            if reason := _lacking(subject, chosen):
                return Outcome("does not apply", reason)
            train = "train" in chosen.metric.requires
            owner = (chosen.entry, chosen.metric) if chosen.source is not None else None
            varied = {
                v.name: (
                    of(chosen, View("measured", v, owner)),
                    of(chosen, View("train", v, owner)) if train and v.train else None,
                )
                for v in chosen.metric.variations()
            }
            own = of(chosen, View())
            jobs.append(Job(chosen, own, of(chosen, View("train")) if train else None, varied))
            return Outcome("unfinished")

        jobs: list[Job] = []
        begun = [(chosen.entry, contained(partial(begin, chosen), "it")) for chosen in self.metrics]
        ended = [(entry, outcome) for entry, outcome in begun if outcome.status != "unfinished"]
        # one that has no meaning here is not measured again, unless another metric wants the same traces
        wanted = {id(m): m for job in jobs if not self._meaningless(job) for m in job.measurements}
        for m in wanted.values():
            m.missing, problems = m.traces.missing()
            for problem in problems:
                text = f"{problem}: measured again"
                self.listen(Event("warning", *self._names, str(m.entry.ref), text))
        return jobs, ended

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

    def _unfinished(self, job: Job) -> bool:
        """Whether this process has to measure or summarise for it."""
        if job.metric.others:  # summarised when all models are there
            return any(m.missing for m in job.measurements)
        return not self._settled(job)

    # ------------------------------------------------------------------ the passes

    def _measure(self, plan: _Plan) -> None:
        subject, identity, before, passes = plan.subject, plan.identity, plan.before, _passes(plan.jobs)
        batch_size = self.grid.batch_size or (before or {}).get("batch_size")
        batch_size = batch_size or default_batch(subject.device, identity["preprocessing"]["size"])
        if before is None or any(map(left_to_do, passes)):
            with subject.active():
                source, _ = subject.watch()
            about = subject.about(source, batch_size)
            if before is None:
                self.folder.write({"identity": identity, **about})
            else:
                require_same(self.folder, *map(_architecture, (before["anatomy"], about["anatomy"])))
        if before is not None and any(map(self._unfinished, plan.jobs)):
            self._go_on(before, subject)
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
        self.listen(Event("pass", *self._names, text=measurements[0].view.title))
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
        except Exception as error:
            change = measurements[0].view.variation
            if change is None or isinstance(error, torch.OutOfMemoryError):
                raise
            if isinstance(error, ProbekitError) and not error.contained:
                raise
            failure = Failure.of(error, f"variation '{change.name}'")
            for m in measurements:  # other metrics are measured without the change
                m.collector = Collector(m.metric, [], failure)

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
        traces = self._traces(job, subject, tuple(about["anatomy"]["image_size"]))
        if not len(traces):
            raise DataError(f"no image of dataset '{self.folder.dataset}' can be read")
        store_result(self.folder, job.entry, job.metric.summarize(traces), about, job.chosen.measured)
        return Outcome("done", images=len(traces), seconds=time.perf_counter() - started)

    def _traces(self, job: Job, subject: Subject, image_size: tuple[int, int]) -> Traces:
        mapped = job.chosen.source is not None

        def read(m: Measurement, train: Measurement | None = None) -> Traces:
            shown = subject.view(m.view)
            traces = shown.completed(m.read(shown, self.grid.seed, mapped=mapped))
            return replace(traces, image_size=image_size, train=read(train) if train is not None else None)

        absent = {name: pair[0].traces.absent for name, pair in job.variations.items()}
        if absent and all(absent.values()):
            raise DoesNotApply(next(iter(absent.values())))
        varied = {name: read(*pair) for name, pair in job.variations.items() if not absent[name]}
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


def _architecture(anatomy: Mapping[str, Any]) -> dict[str, Any]:
    """What of a stored anatomy has to stay while a cell is measured; positions may differ by rounding."""
    return {
        "layers": [layer["name"] for layer in anatomy["layers"]],
        **{f"{layer['name']} {key}": layer[key] for layer in anatomy["layers"] for key in _FIXED},
    }


_FIXED = ("heads", "width", "prefix", "grid", "windows", "kind", "role", "part", "stage")


def _joined(before: str | None, now: str) -> str:
    """``cpu, NVIDIA H100``: each once, in the order they came."""
    said = before.split(", ") if before else []
    return before if now in said else ", ".join([*said, now])


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
