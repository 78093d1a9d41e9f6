"""The finding that is all data: a curve is higher in one group of models than in another over some layers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from probekit.findings.finding import Finding, NotMeasured, Verdict, combined, judge
from probekit.findings.quantities import Quantity
from probekit.findings.spans import LAST_THIRD, Over

if TYPE_CHECKING:
    from probekit.findings.evidence import Evidence, Subject


@dataclass(frozen=True, kw_only=True)
class Contrast(Finding):
    """``higher`` minus ``than``, in the quantity `over` some layers: the claim is that it is above 0.

    quantity:   a metric's name, or a `Quantity`
    higher:     an objective; of several, their mean
    than:       another; None for a claim about how a curve changes within a model
    over:       the layers, `probekit.findings.spans`
    attributed: the objectives the claim gives the property to: their models must go beyond the untrained
                network, in the claimed direction. By default those that are `higher`
    """

    name: str
    claim: str
    sentence: str
    quantity: Quantity | str
    higher: str | tuple[str, ...]
    than: str | tuple[str, ...] | None = None
    over: Over = LAST_THIRD
    attributed: str | tuple[str, ...] = ()

    @property
    def metrics(self) -> tuple[str, ...]:
        return (self.reads.metric,)

    @property
    def layers(self) -> str:
        return self.over.name

    @property
    def reads(self) -> Quantity:
        return Quantity(self.quantity) if isinstance(self.quantity, str) else self.quantity

    @property
    def sides(self) -> dict[str, float]:
        """The weight of each objective."""
        above, below = _several(self.higher), _several(self.than)
        return {**dict.fromkeys(above, 1 / len(above)), **{name: -1 / len(below) for name in below}}

    def evaluate(self, evidence: Evidence) -> Verdict:
        groups = [evidence.of(objective) for objective in self.sides]
        return combined([self._verdict(evidence, chosen) for chosen in itertools.product(*groups)])

    def _verdict(self, evidence: Evidence, subjects: Sequence[Subject]) -> Verdict:
        """For one model of each objective."""
        weights = list(zip(subjects, self.sides.values(), strict=True))
        about = {"models": tuple(s.name for s in subjects)}
        attributed = _several(self.attributed) or _several(self.higher)
        owners = [s for s in subjects if s.objective in attributed]
        try:
            found = evidence.effect(weights, self.reads, self.over)
            about["layers"] = self._layers(evidence, subjects)
        except NotMeasured as error:
            return _lacking(error, **about)
        try:
            return judge(found, evidence.baselines(weights, owners, self.reads, self.over), **about)
        except NotMeasured as error:
            alone = judge(found, **about)  # a claim that fails anyway needs no baseline
            return _lacking(error, effect=found, **about) if alone.status == "holds" else alone

    def _layers(self, evidence: Evidence, subjects: Sequence[Subject]) -> str:
        """``last third (layers 9-12)``, for each depth there is."""
        curves = [evidence.curves(self.reads, model) for s in subjects for model in s.models]
        return " and ".join(dict.fromkeys(self.over.layers(c.numbers, c.place) for c in curves))


def _several(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names or ())


def _lacking(error: NotMeasured, **about: Any) -> Verdict:
    return Verdict("not measured", error.message, missing=error.metrics, hint=error.hint or "", **about)
