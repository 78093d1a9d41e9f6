"""Findings that are all data: a curve over some layers is higher in some models than in others, or nearer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from probekit.findings.finding import Finding, NotMeasured, Verdict, combined, judge
from probekit.findings.quantities import Quantity
from probekit.findings.spans import LAST_THIRD, Over

if TYPE_CHECKING:
    from probekit.findings.evidence import Evidence, Subject


@dataclass(frozen=True, kw_only=True)
class _Compared(Finding):
    """A quantity of one model of each objective, over some layers: what `Contrast` and `Nearer` share.

    quantity: a metric's name, or a `Quantity`
    over:     the layers, `probekit.findings.spans`
    """

    name: str
    claim: str
    sentence: str
    quantity: Quantity | str
    over: Over = LAST_THIRD

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
    def objectives(self) -> tuple[str, ...]:
        """Those it compares, each once."""
        raise NotImplementedError

    def weighted(self, evidence: Evidence, subjects: Sequence[Subject]) -> Sequence[tuple[Subject, float]]:
        """One subject of each objective, with their weights in the effect that the claim says is above 0.

        Raises `NotMeasured`, or `_Untold` where these models can't decide the claim.
        """
        raise NotImplementedError

    def owns(self, subject: Subject) -> bool:
        """Whether the claim gives its property to this one: it must go beyond the untrained network."""
        raise NotImplementedError

    def evaluate(self, evidence: Evidence) -> Verdict:
        groups = [evidence.of(objective) for objective in self.objectives]
        return combined([self._verdict(evidence, chosen) for chosen in itertools.product(*groups)])

    def _verdict(self, evidence: Evidence, subjects: Sequence[Subject]) -> Verdict:
        about = {"models": tuple(s.name for s in subjects), "quantity": self.reads.name}
        try:
            weights = self.weighted(evidence, subjects)
            found = evidence.effect(weights, self.reads, self.over)
            about["layers"] = self._layers(evidence, subjects)
        except NotMeasured as error:
            return _lacking(error, **about)
        except _Untold as error:
            return Verdict("can't tell", str(error), layers=self._layers(evidence, subjects), **about)
        owners = [s for s in subjects if self.owns(s)]
        try:
            return judge(found, evidence.baselines(weights, owners, self.reads, self.over), **about)
        except NotMeasured as error:
            alone = judge(found, **about)  # a claim that fails anyway needs no baseline
            return _lacking(error, effect=found, **about) if alone.status == "holds" else alone

    def _layers(self, evidence: Evidence, subjects: Sequence[Subject]) -> str:
        """``last third (layers 9-12)``, for each depth there is."""
        curves = [evidence.curves(self.reads, model) for s in subjects for model in s.models]
        return " and ".join(dict.fromkeys(self.over.layers(c.numbers, c.place) for c in curves))


@dataclass(frozen=True, kw_only=True)
class Contrast(_Compared):
    """``higher`` minus ``than``, in the quantity `over` some layers: the claim is that it is above 0.

    quantity:   a metric's name, or a `Quantity`
    higher:     an objective; of several, their mean
    than:       another; None for a claim about how a curve changes within a model
    over:       the layers, `probekit.findings.spans`
    attributed: the objectives the claim gives the property to: their models must go beyond the untrained
                network, in the claimed direction. By default those that are `higher`
    """

    higher: str | tuple[str, ...]
    than: str | tuple[str, ...] | None = None
    attributed: str | tuple[str, ...] = ()

    @property
    def sides(self) -> dict[str, float]:
        """The weight of each objective."""
        above, below = _several(self.higher), _several(self.than)
        return {**dict.fromkeys(above, 1 / len(above)), **{name: -1 / len(below) for name in below}}

    @property
    def objectives(self) -> tuple[str, ...]:
        return tuple(self.sides)

    def weighted(self, evidence: Evidence, subjects: Sequence[Subject]) -> Sequence[tuple[Subject, float]]:
        return list(zip(subjects, self.sides.values(), strict=True))

    def owns(self, subject: Subject) -> bool:
        return subject.objective in (_several(self.attributed) or _several(self.higher))


@dataclass(frozen=True, kw_only=True)
class Nearer(_Compared):
    """A model of one objective is nearer to one of another than to one of a third, on the line of a quantity.

    The effect is how far it lies from the middle of the two, towards the one it is to be nearer to. On which
    side that one is, is measured: where the two can't be told apart, neither can this.

    of, to, than: the objectives; it is `of`'s models that must go beyond the untrained network
    quantity, over: as a `Contrast`'s
    """

    of: str
    to: str
    than: str

    @property
    def objectives(self) -> tuple[str, ...]:
        return self.of, self.to, self.than

    def weighted(self, evidence: Evidence, subjects: Sequence[Subject]) -> Sequence[tuple[Subject, float]]:
        one, near, far = subjects
        apart = evidence.effect([(near, 1.0), (far, -1.0)], self.reads, self.over)
        if not apart.known:
            raise _Untold(f"there is no interval of how far '{near.name}' is from '{far.name}': {apart.why}")
        if apart.low <= 0 <= apart.high:
            between = f"[{apart.low:+.3g}, {apart.high:+.3g}]{f' {apart.units}' if apart.units else ''}"
            raise _Untold(f"'{near.name}' and '{far.name}' are not told apart here: they differ by {between}")
        side = math.copysign(1.0, apart.value)
        return [(one, side), (near, -side / 2), (far, -side / 2)]

    def owns(self, subject: Subject) -> bool:
        return subject.objective == self.of


class _Untold(Exception):
    """A verdict of "can't tell", with its reason."""


def _several(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names or ())


def _lacking(error: NotMeasured, **about: Any) -> Verdict:
    return Verdict("not measured", error.message, missing=error.metrics, hint=error.hint or "", **about)
