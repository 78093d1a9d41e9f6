"""One pass over a cell's images: which metrics it measures, which shards are missing, and the measuring."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from probekit.contract import wrong_sample
from probekit.engine import Collector, collector, measure_batch, within_memory
from probekit.errors import MetricError
from probekit.events import Event, Listener
from probekit.metric import Metric, Traces
from probekit.plugins.catalog import Entry, source_of
from probekit.store.cells import MEASURED, CellFolder, TraceFolder, identity_hash
from probekit.store.runfolder import shard_size
from probekit.store.writing import Writer, remove_temporaries
from probekit.subject import Source, Subject, View


@dataclass
class Measurement:
    """The traces of one metric on one pass, and what of them is missing."""

    entry: Entry
    metric: Metric
    view: View
    traces: TraceFolder
    missing: list[int] = field(default_factory=list)
    collector: Collector | None = None

    @property
    def identity(self) -> str:
        return identity_hash(self.traces.identity)

    @property
    def unmeasurable(self) -> bool:
        """Whether nothing more can come of it: it failed, or has no meaning for any layer."""
        return self.collector is not None and (
            self.collector.failure is not None or not self.collector.applies
        )

    def read(self, subject: Subject, seed: int, *, mapped: bool) -> Traces:
        """Its traces with the ids and labels of the images it was measured on."""
        ids, labels = subject.listed()
        return self.traces.read(ids, labels, seed, mapped=mapped)


def measurement(
    entry: Entry, metric: Metric, view: View, subject: Subject, cell: CellFolder, identity: Mapping[str, Any]
) -> Measurement:
    """A metric's traces under a view. `identity` is the cell's, `subject` shows the view's images."""
    ids, labels = subject.listed()
    sample = metric.sample(len(ids), labels)
    if sample is not None and (wrong := wrong_sample(sample, len(ids))):
        raise MetricError(f"metric '{entry.qualified}': {wrong}")
    tag = {"cell": identity_hash(identity), **tag_of(entry, metric)}
    if view.name != MEASURED:
        tag["view"] = view.name
    if view.owner is not None:  # a variation's name tells apart what its options choose
        tag["varied by"] = {k: v for k, v in tag_of(*view.owner).items() if k != "options"}
    if view.split == "train":
        tag["images"] = subject.identity()["images"]
    path = cell.trace(str(entry.ref), metric.version, view.name)
    chosen = None if sample is None else tuple(sorted(int(i) for i in sample))
    return Measurement(entry, metric, view, TraceFolder(path, tag, len(ids), shard_size(len(ids)), chosen))


def tag_of(entry: Entry, metric: Metric) -> dict[str, Any]:
    """All of a metric that its numbers depend on."""
    said = {"metric": entry.qualified, "version": metric.version, "options": dict(entry.options)}
    return said | source_of(entry, type(metric))


def left_to_do(measurements: Sequence[Measurement]) -> list[int]:
    """Shards that one of the measurements of a pass still misses."""
    return sorted({k for m in measurements for k in m.missing})


def images_to_do(measurements: Sequence[Measurement]) -> int:
    """Images that a pass has still to forward."""
    wanted = {(k, i) for m in measurements for k in m.missing for i in m.traces.held(k)}
    return len(wanted)


def try_out(subject: Subject, measurements: Sequence[Measurement]) -> tuple[int, float]:
    """What a pass would keep, in bytes, and take, in seconds, from two measured images."""
    with subject.active():
        source, pixels = subject.watch()
        collectors = [collector(m.metric, source) for m in measurements]
        measure_batch(source, pixels, collectors)
        started = time.perf_counter()
        values = measure_batch(source, pixels, collectors)
        each = (time.perf_counter() - started) / len(pixels)
    kept = sum(
        sum(len(m.traces.held(k)) for k in m.missing) * sum(v.nbytes // len(pixels) for v in found.values())
        for m, found in zip(measurements, values, strict=True)
    )
    return kept, each * images_to_do(measurements)


@dataclass
class PassRunner:
    """Measures what is missing of a pass, shard after shard."""

    subject: Subject
    measurements: Sequence[Measurement]
    batch_size: int
    workers: int
    names: tuple[str, str]  # the cell's model and dataset, for events
    listen: Listener

    def prepare(self, source: Source) -> None:
        for m in self.measurements:
            if m.missing:
                remove_temporaries(m.traces.path)
            if len(m.missing) == len(m.traces.shards):
                m.traces.forget_rows()
            m.collector = collector(m.metric, source) if m.missing else None

    def run(self, source: Source) -> None:
        with Writer() as writer:
            for shard in left_to_do(self.measurements):
                self._shard(shard, source, writer)

    def _shard(self, shard: int, source: Source, writer: Writer) -> None:
        active = [m for m in self.measurements if shard in m.missing and not m.unmeasurable]
        held = [set(m.traces.held(shard)) for m in active]
        indices = self.subject.indices
        wanted = sorted(set().union(*held)) if held else []
        place = {indices[i]: i for i in wanted}
        parts: list[list[dict[str, np.ndarray]]] = [[] for _ in active]
        kept: list[list[int]] = [[] for _ in active]
        bad: list[dict[str, Any]] = []
        for batch in self.subject.batches([indices[i] for i in wanted], self.batch_size, self.workers):
            bad += [{"index": place[b.index], "id": b.id, "reason": b.reason} for b in batch.bad]
            if len(batch):
                here = [place[i] for i in batch.indices]
                chosen = [[n for n, i in enumerate(here) if i in images] for images in held]
                with within_memory(self.subject.device, len(batch)):
                    pixels = batch.pixels.to(self.subject.device, non_blocking=True)
                    found = measure_batch(source, pixels, [m.collector for m in active], chosen)
                for number, values in enumerate(found):
                    if chosen[number]:
                        parts[number].append(values)
                        kept[number] += [here[n] for n in chosen[number]]
            for b in batch.bad:
                self.listen(Event("bad-image", *self.names, text=f"'{b.id}' is left out: {b.reason}"))
            self.listen(Event("images", done=len(batch) + len(batch.bad)))
        for m, images, found, numbers in zip(active, held, parts, kept, strict=True):
            if not m.unmeasurable:
                self._write(shard, m, found, numbers, [b for b in bad if b["index"] in images], writer)

    def _write(
        self,
        shard: int,
        m: Measurement,
        found: list[dict[str, np.ndarray]],
        kept: list[int],
        bad: list[dict[str, Any]],
        writer: Writer,
    ) -> None:
        if found and not m.traces.path.joinpath("rows.json").exists():
            c = m.collector
            writer.submit(m.traces.write_rows, c.rows, c.constants, dict(c.reasons))
        arrays = {f"values/{n}": np.concatenate([p[n] for p in found]) for n in m.metric.dims if found}
        arrays["index"] = np.asarray(kept, dtype=np.int64)
        writer.write_shard(m.traces.shard(shard), arrays, {**m.traces.expected(shard), "bad": bad})
