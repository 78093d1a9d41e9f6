"""How a metric ends on a cell: its result, or why there is none; and what compares the models of a run."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from probekit.contract import wrong_summary
from probekit.errors import DoesNotApply, MetricError, ProbekitError
from probekit.events import Event, Listener
from probekit.metric import Metric, Traces
from probekit.passes import tag_of
from probekit.plugins.catalog import Entry
from probekit.plugins.loading import in_words
from probekit.store.cells import CellFolder, Outcome, TraceFolder, identity_hash
from probekit.store.results import write_result
from probekit.store.runfolder import Run, shard_size
from probekit.store.writing import shard_problem

if TYPE_CHECKING:
    import xarray as xr


def store_result(
    folder: CellFolder,
    entry: Entry,
    result: xr.Dataset,
    about: Mapping[str, Any],
    traced: tuple[Entry, Metric],
) -> None:
    """Seal a metric's result with where it comes from.

    about: what the cell's file says; traced: the metric whose traces it was made from

    Raises `MetricError` for a result that can't be told or stored.
    """
    source, measured = traced
    if wrong := wrong_summary(entry.name, result):
        raise MetricError(f"metric '{entry.qualified}': {wrong}")
    result.attrs.setdefault("metric", entry.name)
    result.attrs.update(
        source=str(source.ref),
        source_version=measured.version,
        model=folder.model,
        dataset=folder.dataset,
        objective=about["objective"],
        weights_sha256=about["identity"]["weights"],
        images_fingerprint=about["identity"]["images"],
        preprocessing=about["identity"]["preprocessing"],
        dtype=about["identity"]["dtype"],
        device=about["device"],
        pack=f"{entry.pack} {entry.version}".strip(),
        probekit=about["versions"].get("vit-probekit", ""),
    )
    write_result(folder.result(str(entry.ref)), result)


def end_metric(folder: CellFolder, entry: Entry, outcome: Outcome, identity: str, listen: Listener) -> None:
    """Record how a metric ended, and say so. `identity` is that of what its result is made of."""
    name = str(entry.ref)
    outcome = replace(outcome, pack=entry.pack, version=entry.version, trace=identity)
    folder.end(name, outcome)
    listen(Event("metric", folder.model, folder.dataset, name, outcome.reason, outcome=outcome))


def contained(make: Callable[[], Outcome], who: str = "'summarize'") -> Outcome:
    """The outcome `make` gives, or what went wrong in it. Raises what no cell can survive."""
    try:
        return make()
    except DoesNotApply as reason:
        return Outcome("does not apply", reason.message)
    except ProbekitError as error:
        if not error.contained:
            raise
        return Outcome("failed", error.message, error.hint or "")
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        text = f"{who} raised {type(error).__name__}: {in_words(str, error)}"
        return Outcome("failed", text, "", traceback.format_exc())


@dataclass(frozen=True)
class _Held:
    """One model's complete traces of a metric, on disk."""

    traces: TraceFolder
    about: Mapping[str, Any]
    identity: str

    def read(self, seed: int) -> Traces:
        traces = self.traces.read(self.about["ids"], self.about["labels"], seed, mapped=True)
        return replace(traces, image_size=tuple(self.about["anatomy"]["image_size"]))


def compare_models(
    run: Run, entry: Entry, metric: Metric, traced: tuple[Entry, Metric], listen: Listener
) -> None:
    """Summarise a metric that looks at all models of a run (`Metric.others`), where one is new.

    traced: the metric whose traces it takes
    """
    for dataset in run.datasets:
        held = {model: _held(run, model, dataset, traced) for model in run.models}
        complete = {model: one for model, one in held.items() if one is not None}
        tag = tag_of(entry, metric)
        together = {model: one.identity for model, one in complete.items()}
        for model, one in complete.items():
            folder, name = run.folder(model, dataset), str(entry.ref)
            identity = identity_hash({**tag, "model": model, "traces": together})
            before = folder.outcome(name)
            if before.trace == identity and before.status == "done" and folder.result(name).exists():
                continue

            listen(Event("summary", model, dataset, name))
            rest = {m: o for m, o in complete.items() if m != model}
            outcome = contained(partial(_compared, folder, entry, metric, traced, one, rest, run.seed))
            end_metric(folder, entry, outcome, identity, listen)
            listen(Event("cell-done", model, dataset))


def _compared(
    folder: CellFolder,
    entry: Entry,
    metric: Metric,
    traced: tuple[Entry, Metric],
    one: _Held,
    rest: Mapping[str, _Held],
    seed: int,
) -> Outcome:
    started = time.perf_counter()
    traces = replace(one.read(seed), others={model: other.read(seed) for model, other in rest.items()})
    store_result(folder, entry, metric.summarize(traces), one.about, traced)
    return Outcome("done", images=len(traces), seconds=time.perf_counter() - started)


def _held(run: Run, model: str, dataset: str, traced: tuple[Entry, Metric]) -> _Held | None:
    """A model's traces of a metric, if they are complete and of this version of it."""
    entry, metric = traced
    folder, about = run.folder(model, dataset), run.about(model, dataset)
    if not about:
        return None
    count = len(about["ids"])
    tag = {"cell": identity_hash(about["identity"]), **tag_of(entry, metric)}
    path = folder.trace(str(entry.ref), metric.version)
    traces = TraceFolder(path, tag, count, shard_size(count))
    if traces.rows() is None:
        return None
    traces = traces.as_written()
    if any(shard_problem(traces.shard(k), traces.expected(k)) for k in traces.shards):
        return None
    return _Held(traces, about, identity_hash(tag))
