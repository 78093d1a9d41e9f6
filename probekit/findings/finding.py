"""What a finding is: a claim as a testable statement over a run's results, and what came of testing it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from probekit.errors import ProbekitError

if TYPE_CHECKING:
    from probekit.findings.evidence import Evidence

Status = Literal["holds", "does not hold", "can't tell", "not measured"]
Source = Literal["", "images", "trainings", "results"]
NAN = float("nan")


class NotMeasured(ProbekitError):
    """What a finding reads isn't in the run. The message names it, the hint is the command that measures it.

    metrics: those that the run has not, or has not finished
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None, metrics: Sequence[str] = ()):
        super().__init__(message, hint=hint)
        self.metrics = tuple(metrics)


@dataclass(frozen=True)
class Effect:
    """A difference in `units` with its 95 % interval, positive in the direction of the claim.

    low, high: NaN where no interval is known; `why` then says why
    over:      what the interval is over: ``images`` (paired bootstrap), ``trainings`` (t-interval over the
               seeds of a model), ``results`` (the results' own intervals, combined)
    count:     how many images or trainings
    note:      what else a reader of the number must know
    """

    value: float
    low: float = NAN
    high: float = NAN
    units: str = ""
    over: Source = ""
    count: int = 0
    why: str = ""
    note: str = ""

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return not (math.isnan(self.low) or math.isnan(self.high))


@dataclass(frozen=True)
class Baseline:
    """The untrained network in the place of the model that a claim gives a property to.

    model:  the untrained network
    of:     the model whose place it takes
    effect: what the effect then is
    beyond: how much further than that the trained model goes; positive is further in the claim's direction
    """

    model: str
    of: str
    effect: Effect
    beyond: Effect

    @property
    def passed(self) -> bool:
        """Whether the trained model goes further: the interval lies above 0."""
        return self.beyond.known and self.beyond.low > 0

    @property
    def failed(self) -> bool:
        """Whether it does not: the interval holds nothing above 0."""
        return self.beyond.known and self.beyond.high <= 0


@dataclass(frozen=True)
class Verdict:
    """What came of testing a claim.

    reason:    one lower-case sentence
    effect:    None where nothing was measured, and where there are several `parts`
    quantity:  the value that is compared, by its name
    layers:    the layers it is about, as they are in these models
    models:    those compared, in the order of the claim
    baselines: one for each model the claim gives a property to and each untrained network it is held against;
               empty where the run has none
    missing:   metrics to be measured
    hint:      the command that measures what is missing
    parts:     where several models share an objective, a verdict for each combination
    """

    status: Status
    reason: str
    effect: Effect | None = None
    quantity: str = ""
    layers: str = ""
    models: tuple[str, ...] = ()
    baselines: tuple[Baseline, ...] = ()
    missing: tuple[str, ...] = ()
    hint: str = ""
    parts: tuple[Verdict, ...] = ()

    @property
    def baseline(self) -> Baseline | None:
        """The untrained network that the claim goes least beyond."""
        return min(self.baselines, key=lambda b: (b.passed, b.beyond.known, b.beyond.low), default=None)


class Finding:
    """A claim that a run can support or contradict.

    `Contrast` is one of these that is all data. For anything else, subclass and write `evaluate`.

    name:     what users type; the spec's
    claim:    one sentence, present tense
    sentence: the sentence it tests, quoted or paraphrased, and where it stands
    metrics:  names of the metrics it reads
    layers:   the layers it is about
    """

    name: str
    claim: str
    sentence: str
    metrics: tuple[str, ...] = ()
    layers: str = ""

    def evaluate(self, evidence: Evidence) -> Verdict:
        """The verdict on one dataset of a run; `judge` and `combined` apply the rules.

        Raises `NotMeasured` (as `Evidence` does) where something is missing: that becomes a verdict.
        """
        raise NotImplementedError


def judge(effect: Effect, baselines: Sequence[Baseline] = (), **about: str | tuple[str, ...]) -> Verdict:
    """The rules that turn an effect into a verdict.

    holds:         its interval lies above 0, and so does that of every baseline's `beyond`
    does not hold: its interval lies below 0, or that of a `beyond` holds nothing above 0
    can't tell:    an interval that is needed includes 0, or isn't known

    about: the verdict's `quantity`, `layers` and `models`
    """
    failed = next((b for b in baselines if b.failed), None)
    unsure = next((b for b in baselines if not b.passed), None)
    if not effect.known:
        status, reason = "can't tell", f"there is no interval: {effect.why or 'none is known'}"
    elif effect.low <= 0 <= effect.high:
        status, reason = "can't tell", "the interval includes 0"
    elif effect.high < 0:
        status, reason = "does not hold", "the difference is the other way round"
    elif failed:
        status = "does not hold"
        reason = f"'{failed.of}' does not go beyond the untrained network '{failed.model}'"
    elif unsure:
        status = "can't tell"
        reason = f"whether '{unsure.of}' goes beyond the untrained network '{unsure.model}': "
        if unsure.beyond.known:
            reason += "the interval includes 0"
        else:
            reason += f"there is no interval: {unsure.beyond.why or 'none is known'}"
    elif baselines:
        status, reason = "holds", "the interval excludes 0, also beyond the untrained network"
    else:
        status, reason = "holds", "the interval excludes 0; no untrained network was held against it"
    reason += f"; {effect.note}" if effect.note else ""
    return Verdict(status, reason, effect, baselines=tuple(baselines), **about)


def combined(parts: Sequence[Verdict]) -> Verdict:
    """One verdict from those of several combinations of models: what they all say, else "can't tell"."""
    if len(parts) == 1:
        return parts[0]
    measured = [part for part in parts if part.status != "not measured"]
    missing = tuple(dict.fromkeys(name for part in parts for name in part.missing))
    hint = next((part.hint for part in parts if part.hint), "")
    layers = measured[0].layers if measured else ""
    more = {
        "quantity": parts[0].quantity,
        "layers": layers,
        "missing": missing,
        "hint": hint,
        "parts": tuple(parts),
    }
    if not measured:
        return Verdict("not measured", parts[0].reason, **more)
    said = {part.status for part in measured}
    status = said.pop() if len(said) == 1 else "can't tell"
    held = sum(part.status == "holds" for part in measured)
    reason = f"so for {held} of {len(measured)} combinations of models"
    absent = len(parts) - len(measured)
    return Verdict(status, reason + (f", {absent} not measured" if absent else ""), **more)
