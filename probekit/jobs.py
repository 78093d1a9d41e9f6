"""What is to be done on one cell: each metric of a grid with the traces its result is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from probekit.contract import wrong_declaration
from probekit.errors import MetricError, PluginError, ProbekitError
from probekit.metric import Metric
from probekit.passes import Measurement, tag_of
from probekit.plugins.catalog import Catalog, Entry
from probekit.plugins.loading import in_words
from probekit.store.cells import identity_hash


@dataclass(frozen=True)
class Chosen:
    """A metric of the grid, and the one whose traces it summarises where that is another."""

    entry: Entry
    metric: Metric
    source: tuple[Entry, Metric] | None = None

    @property
    def measured(self) -> tuple[Entry, Metric]:
        return self.source or (self.entry, self.metric)


@dataclass
class Job:
    """One metric on one cell, and the traces its result is made of.

    own:        on the measured images
    train:      on the train split
    variations: by name: on the measured images, and on the train split
    """

    chosen: Chosen
    own: Measurement
    train: Measurement | None = None
    variations: Mapping[str, tuple[Measurement, Measurement | None]] = field(default_factory=dict)

    @property
    def entry(self) -> Entry:
        return self.chosen.entry

    @property
    def metric(self) -> Metric:
        return self.chosen.metric

    @property
    def name(self) -> str:
        return str(self.entry.ref)

    @property
    def measurements(self) -> list[Measurement]:
        pairs = [m for pair in self.variations.values() for m in pair]
        return [m for m in (self.own, self.train, *pairs) if m is not None]

    @property
    def identity(self) -> str:
        """Of all that its result is made of."""
        if self.chosen.source is None and len(self.measurements) == 1:
            return self.own.identity
        return identity_hash(
            {**tag_of(self.entry, self.metric), "traces": [m.identity for m in self.measurements]}
        )


def choose_metrics(entries: Sequence[Entry], catalog: Catalog) -> list[Chosen]:
    """The metrics that entries name, each with the one it draws on. One that is broken fails in each cell."""
    found = []
    for entry in entries:
        try:
            metric = make_metric(entry, catalog)
            source = _source(entry, metric.source, catalog) if metric.source else None
        except (MetricError, PluginError) as error:
            metric, source = _Broken(error), None
        found.append(Chosen(entry, metric, source))
    return found


def _source(entry: Entry, named: str, catalog: Catalog) -> tuple[Entry, Metric]:
    """The metric whose traces `entry` takes. That its author names it wrongly is no mistake of the user's."""
    who = f"metric '{entry.name}' of '{entry.pack}' draws on '{named}', which"
    try:
        where = catalog.metric(named)
        metric = make_metric(where, catalog)
    except ProbekitError as error:
        raise MetricError(f"{who} can't be used: {error.message}", hint=error.hint) from error
    if metric.source:
        raise MetricError(f"{who} measures nothing itself", hint=f"source = '{metric.source}'")
    return where, metric


class _Broken(Metric):
    """In the place of a metric that can't be made: says why before anything is measured."""

    needs, dims = frozenset(), {}

    def __init__(self, error: ProbekitError):
        super().__init__()
        self._error = error

    def sample(self, count: int, labels: Sequence[int] | None) -> Sequence[int] | None:
        raise self._error


def make_metric(entry: Entry, catalog: Catalog) -> Metric:
    """The metric an entry names, with its options. Raises `PluginError`, `MetricError` or `UsageError`."""
    made = catalog.resolve_target(entry)
    hint = f"`probekit plugins check {entry.pack}` shows all that is wrong"
    try:
        metric = made(**entry.options)
        wrong = wrong_declaration(metric)
    except (ProbekitError, KeyboardInterrupt):
        raise
    except BaseException as error:
        text = f"{type(error).__name__}: {in_words(str, error)}"
        raise MetricError(f"metric '{entry.qualified}' can't be made: {text}", hint=hint) from error
    if not wrong and metric.name != entry.name:
        wrong = f"its class calls itself '{metric.name}'"
    if wrong:
        raise MetricError(f"metric '{entry.qualified}': {wrong}", hint=hint)
    return metric
