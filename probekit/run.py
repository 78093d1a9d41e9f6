"""Carry out a grid: one pass per cell, skip what exists, contain what fails."""

from __future__ import annotations

import contextlib
import platform
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from probekit import images as image_loading
from probekit.catalog import Catalog, Entry
from probekit.cells import CellFolder, Outcome, TraceFolder, identity_hash, require_same
from probekit.dataset import Dataset, select
from probekit.engine import Collector, collector, measure_batch, numerics, pick_device
from probekit.errors import DataError, MetricError, ProbekitError
from probekit.grid import Grid, Resolved
from probekit.metric import Metric
from probekit.model import Model, load_model
from probekit.results import write_result
from probekit.runfolder import Run, create_run, shard_size
from probekit.specs import Preprocessing
from probekit.store import RunLock, Writer, remove_temporaries
from probekit.watch import Watcher


@dataclass(frozen=True)
class Event:
    """Something to show while a run goes on.

    kind: cell (a cell begins: `total` images, `done` already there), images (`done` more), warning,
          metric (ended, with `outcome`), cell-failed (with `error`), cell-done
    """

    kind: str
    model: str = ""
    dataset: str = ""
    metric: str = ""
    text: str = ""
    total: int = 0
    done: int = 0
    outcome: Outcome | None = None
    error: ProbekitError | None = None


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


Listener = Callable[[Event], None]


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


def execute(resolved: Resolved, catalog: Catalog, out: Path, listen: Listener = lambda event: None) -> Run:
    """Do what is missing of a grid in the folder `out` and return the run.

    A metric or model that fails is recorded and the rest goes on. Ctrl-C leaves everything complete that
    was completed; the same call does the rest.

    Raises `ProbekitError` for what no cell can survive: a locked, full or newer folder, an unknown dataset.
    """
    device = pick_device(resolved.grid.device)
    datasets = [_dataset(entry, catalog) for entry in resolved.datasets]
    metrics = [(entry, make_metric(entry, catalog)) for entry in resolved.metrics]
    with RunLock(out):
        create_run(out, resolved, versions())
        for entry in resolved.models:
            for dataset_entry, dataset in zip(resolved.datasets, datasets, strict=True):
                cell = CellFolder(out, str(entry.ref), str(dataset_entry.ref))
                try:
                    _Cell(cell, entry, dataset, metrics, resolved.grid, catalog, device, listen).run()
                except ProbekitError as error:
                    if not error.contained:
                        raise
                    _cell_failed(cell, metrics, error, listen)
    return Run(out)


def forecast(resolved: Resolved, catalog: Catalog, out: Path) -> list[Forecast]:
    """What `execute` would do, from one measured batch of two images per cell. Writes nothing."""
    device = pick_device(resolved.grid.device)
    datasets = [_dataset(entry, catalog) for entry in resolved.datasets]
    metrics = [(entry, make_metric(entry, catalog)) for entry in resolved.metrics]
    found = []
    for entry in resolved.models:
        for dataset_entry, dataset in zip(resolved.datasets, datasets, strict=True):
            folder = CellFolder(out, str(entry.ref), str(dataset_entry.ref))
            cell = _Cell(folder, entry, dataset, metrics, resolved.grid, catalog, device, lambda event: None)
            found.append(cell.forecast())
    return found


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("vit-probekit", "torch", "timm", "numpy", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
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
        raise MetricError(f"metric '{entry.qualified}' can't be made: {type(error).__name__}: {error}") from error
    if not complete:
        raise MetricError(f"metric '{entry.qualified}' lacks one of 'name', 'needs', 'dims' and 'measure'")
    return metric


def _dataset(entry: Entry, catalog: Catalog) -> Dataset:
    dataset = catalog.resolve_target(entry)(entry.ref.argument, **entry.options)
    dataset.check()
    return dataset


def _cell_failed(
    cell: CellFolder, metrics: Sequence[tuple[Entry, Metric]], error: ProbekitError, listen: Listener
) -> None:
    for entry, metric in metrics:
        if cell.outcome(str(entry.ref)).status != "done":
            outcome = Outcome("failed", error.message, error.hint or "", "", entry.pack, entry.version)
            cell.end(str(entry.ref), outcome)
    listen(Event("cell-failed", cell.model, cell.dataset, text=str(error), error=error))


def default_batch(device: torch.device) -> int:
    return 16 if device.type == "cpu" else 64


@dataclass
class _Cell:
    folder: CellFolder
    entry: Entry
    dataset: Dataset
    metrics: Sequence[tuple[Entry, Metric]]
    grid: Grid
    catalog: Catalog
    device: torch.device
    listen: Listener

    def run(self) -> None:
        indices, model, preprocessing, identity, before, jobs = self._prepare()
        remaining = sorted({k for job in jobs for k in job.missing})
        total = sum(len(jobs[0].traces.ranges[k]) for k in remaining)
        self.listen(Event("cell", self.folder.model, self.folder.dataset, total=len(indices), done=len(indices) - total))
        if remaining or before is None or any(not self._summarised(job) for job in jobs):
            self._pass(model, preprocessing, identity, before, jobs, indices, remaining)
        self.listen(Event("cell-done", self.folder.model, self.folder.dataset))

    def forecast(self) -> Forecast:
        indices, model, preprocessing, _, _, jobs = self._prepare()
        remaining = sorted({k for job in jobs for k in job.missing})
        total = sum(len(jobs[0].traces.ranges[k]) for k in remaining)
        wanted = [job for job in jobs if job.missing]
        kept, seconds = 0, 0.0
        if wanted:
            model.module.to(self.device)
            with numerics(self.device, self.grid.dtype):
                watcher, pixels = self._watch(model, preprocessing, indices)
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
        return Forecast(self.folder.model, self.folder.dataset, len(indices), total, names, skipped, kept, seconds)

    def _prepare(self) -> tuple[list[int], Model, Preprocessing, dict[str, Any], dict[str, Any] | None, list[Job]]:
        indices = select(len(self.dataset), self.grid.limit)
        if not indices:
            raise DataError(f"dataset '{self.folder.dataset}' has no images")
        model = load_model(self.entry.ref, self.catalog, seed=self.grid.seed, image_size=self.grid.image_size)
        preprocessing = model.preprocessing or Preprocessing()
        identity = self._identity(model, preprocessing, indices)
        before = self.folder.read()
        if before is not None:
            require_same(self.folder, before["identity"], identity)
        return indices, model, preprocessing, identity, before, self._jobs(identity, len(indices))

    def _identity(self, model: Model, preprocessing: Preprocessing, indices: list[int]) -> dict[str, Any]:
        return {
            "model": self.folder.model,
            "weights": model.weights.sha256,
            "dataset": self.folder.dataset,
            "images": self.dataset.fingerprint(indices),
            "count": len(indices),
            "preprocessing": preprocessing.model_dump(mode="json"),
            "dtype": self.grid.dtype,
        }

    def _jobs(self, identity: dict[str, Any], count: int) -> list[Job]:
        jobs = []
        for entry, metric in self.metrics:
            path = self.folder.trace(str(entry.ref), metric.version)
            tag = {"cell": identity_hash(identity), "metric": entry.qualified, "version": metric.version}
            traces = TraceFolder(path, {**tag, "options": dict(entry.options)}, count, shard_size(count))
            job = Job(entry, metric, traces)
            if self.folder.outcome(job.name).status != "does not apply":
                job.missing, problems = traces.missing()
                for problem in problems:
                    self.listen(Event("warning", self.folder.model, self.folder.dataset, job.name, f"{problem}: measured again"))
            jobs.append(job)
        return jobs

    def _summarised(self, job: Job) -> bool:
        outcome = self.folder.outcome(job.name)
        return outcome.status == "does not apply" or outcome.status == "done" and self.folder.result(job.name).exists()

    # ------------------------------------------------------------------ the pass

    def _pass(
        self,
        model: Model,
        preprocessing: Preprocessing,
        identity: dict[str, Any],
        before: dict[str, Any] | None,
        jobs: list[Job],
        indices: list[int],
        remaining: list[int],
    ) -> None:
        batch_size = self.grid.batch_size or (before or {}).get("batch_size") or default_batch(self.device)
        for job in jobs:
            if job.missing:
                remove_temporaries(job.traces.path)
        if remaining or before is None:
            model.module.to(self.device)
            with numerics(self.device, self.grid.dtype):
                watcher, _ = self._watch(model, preprocessing, indices)
                if before is None:
                    self._describe(model, preprocessing, identity, watcher, indices, batch_size)
                for job in jobs:
                    job.collector = collector(job.metric, watcher) if job.missing else None
                with Writer() as writer:
                    for shard in remaining:
                        self._shard(shard, jobs, watcher, preprocessing, indices, batch_size, writer)
        about = self.folder.read()
        for job in jobs:
            self._finish(job, about, indices)

    def _watch(self, model: Model, preprocessing: Preprocessing, indices: list[int]) -> tuple[Watcher, torch.Tensor]:
        """The plan is made on the first two images that can be read, whatever shard is measured next."""
        found: list[torch.Tensor] = []
        for batch in self._batches(preprocessing, indices, 1):
            found += list(batch.pixels)
            if len(found) == 2:
                break
        if not found:
            raise DataError(f"no image of dataset '{self.folder.dataset}' can be read")
        pixels = torch.stack(found).to(self.device)
        watcher = Watcher(
            model.module,
            pixels,
            forward=model.forward,
            declared_parts=model.declared.parts if model.declared else None,
            allow_unwatched=self.grid.allow_unwatched,
        )
        for warning in watcher.anatomy.warnings:
            self.listen(Event("warning", self.folder.model, self.folder.dataset, text=warning))
        return watcher, pixels

    def _batches(self, preprocessing: Preprocessing, chosen: list[int], batch_size: int, workers: int = 0) -> Iterator[Any]:
        source = image_loading.batches(
            self.dataset, chosen, preprocessing, batch_size=batch_size, workers=workers, on_bad=self.grid.on_bad_image
        )
        with contextlib.closing(source):
            yield from source

    def _describe(
        self, model: Model, preprocessing: Preprocessing, identity: dict[str, Any], watcher: Watcher, indices: list[int], batch: int
    ) -> None:
        spec = model.spec
        self.folder.write(
            {
                "identity": identity,
                "weights": {"kind": model.weights.kind, "source": model.weights.source, "note": model.weights.note},
                "objective": spec.objective if spec else "other",
                "citation": spec.citation if spec else None,
                "licence": spec.weights.licence if spec and spec.weights else None,
                "pack": f"{self.entry.pack} {self.entry.version}".strip(),
                "anatomy": watcher.anatomy.to_json(),
                "ids": [self.dataset.ids[i] for i in indices],
                "labels": [int(self.dataset.labels[i]) for i in indices] if self.dataset.labels is not None else None,
                "classes": list(self.dataset.classes) if self.dataset.classes is not None else None,
                "notes": list(self.dataset.notes),
                "batch_size": batch,
                "device": _device_name(self.device),
                "versions": versions(),
            }
        )

    def _shard(
        self,
        shard: int,
        jobs: list[Job],
        watcher: Watcher,
        preprocessing: Preprocessing,
        indices: list[int],
        batch_size: int,
        writer: Writer,
    ) -> None:
        active = [j for j in jobs if shard in j.missing and j.collector.failure is None and j.collector.applies]
        wanted = jobs[0].traces.ranges[shard]
        parts: dict[int, list[dict[str, np.ndarray]]] = {id(job): [] for job in active}
        kept: list[int] = []
        bad: list[dict[str, Any]] = []
        place = {indices[i]: i for i in wanted}
        for batch in self._batches(preprocessing, [indices[i] for i in wanted], batch_size, self.grid.workers):
            bad += [{"index": place[b.index], "id": b.id, "reason": b.reason} for b in batch.bad]
            if len(batch) and active:
                pixels = batch.pixels.to(self.device, non_blocking=True)
                for job, values in zip(active, self._measure(watcher, pixels, active), strict=True):
                    parts[id(job)].append(values)
                kept += [place[i] for i in batch.indices]
            self.listen(Event("images", done=len(batch) + len(batch.bad)))
        for job in active:
            found = parts[id(job)]
            if job.collector.failure is not None or not job.collector.applies:
                continue
            if not job.traces.path.joinpath("rows.json").exists() and found:
                writer.submit(job.traces.write_rows, job.collector.rows, job.collector.constants, dict(job.collector.reasons))
            arrays = {f"values/{n}": np.concatenate([p[n] for p in found]) for n in job.metric.dims} if found else {}
            arrays["index"] = np.asarray(kept, dtype=np.int64)
            writer.write_shard(job.traces.shard(shard), arrays, {**job.traces.expected(shard), "bad": bad})

    def _measure(self, watcher: Watcher, pixels: torch.Tensor, active: list[Job]) -> list[dict[str, np.ndarray]]:
        try:
            return measure_batch(watcher, pixels, [job.collector for job in active])
        except torch.OutOfMemoryError as error:
            raise DataError(
                f"{len(pixels)} images at once don't fit into the memory of '{self.device}'",
                hint=f"--batch-size {max(1, len(pixels) // 2)}",
            ) from error

    # ------------------------------------------------------------------ results

    def _finish(self, job: Job, about: dict[str, Any], indices: list[int]) -> None:
        if self._summarised(job) and not job.missing:
            return
        failure = job.collector.failure if job.collector else None
        outcome = None
        if failure is not None:
            outcome = Outcome("failed", failure.message, "", failure.details)
        elif job.collector is not None and not job.collector.applies:
            outcome = Outcome("does not apply", next(iter(job.collector.reasons.values()), "the model has no such layers"))
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
        outcome = Outcome(**{**outcome.__dict__, "pack": job.entry.pack, "version": job.entry.version})
        self.folder.end(job.name, outcome)
        self.listen(Event("metric", self.folder.model, self.folder.dataset, job.name, outcome.reason, outcome=outcome))

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
            options=dict(job.entry.options),
            pack=f"{job.entry.pack} {job.entry.version}".strip(),
            probekit=about["versions"].get("vit-probekit", ""),
        )
        write_result(self.folder.result(job.name), result)
        return Outcome("done", images=len(traces), seconds=time.perf_counter() - started)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
