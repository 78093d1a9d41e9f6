"""Where each model of a run stands between its CL and its MIM models, on every axis the findings compare."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from probekit.findings.contrast import Contrast
from probekit.findings.evaluating import offered
from probekit.findings.evidence import Evidence, Subject
from probekit.findings.finding import Effect, Finding, NotMeasured


@dataclass(frozen=True)
class Placed:
    """One model on one axis.

    axis:     name of the finding whose quantity and layers it is
    value:    the quantity over these layers; None where it isn't measured
    position: 0 where the CL models are, 1 where the MIM models are; may lie outside. None where the model
              can't be placed
    reason:   why there is no value or no position
    """

    axis: str
    quantity: str
    layers: str
    model: str
    value: Effect | None
    position: Effect | None
    reason: str = ""


def fingerprint(evidence: Evidence, findings: Iterable[Finding] | None = None) -> list[Placed]:
    """Every model on the axis of every `Contrast` between CL and MIM, by axis, then by model.

    findings: these; by default all that are built in or installed

    The references are the means of the run's trained CL models and of its trained MIM models. Intervals are
    over images, also where trainings are grouped: each has its own fingerprint.
    """
    if findings is None:
        findings = [f for _, _, f in offered() if isinstance(f, Finding)]
    found, seen = [], set()
    for finding in findings:
        if not isinstance(finding, Contrast) or set(finding.sides) != {"CL", "MIM"}:
            continue
        if (finding.reads, finding.over) in seen:  # one axis, another claim
            continue
        seen.add((finding.reads, finding.over))
        found += [_placed(evidence, finding, model) for model in evidence.run.models]
    return found


def _placed(evidence: Evidence, finding: Contrast, model: str) -> Placed:
    about = {"axis": finding.name, "quantity": finding.reads.name, "layers": finding.over.name}
    about["model"] = model
    try:
        value = evidence.effect([(_single(model), 1.0)], finding.reads, finding.over)
    except NotMeasured as error:
        return Placed(value=None, position=None, reason=error.message, **about)
    try:
        return Placed(value=value, position=_position(evidence, finding, model), **about)
    except NotMeasured as error:
        return Placed(value=value, position=None, reason=f"not placed: {error.message}", **about)


def _position(evidence: Evidence, finding: Contrast, model: str) -> Effect:
    references = {
        objective: [m for s in evidence.of(objective) for m in s.models] for objective in ("CL", "MIM")
    }
    cl, mim = references["CL"], references["MIM"]
    apart = [*((_single(m), 1 / len(mim)) for m in mim), *((_single(m), -1 / len(cl)) for m in cl)]
    span = evidence.effect(apart, finding.reads, finding.over)
    if span.known and span.low <= 0 <= span.high:
        raise NotMeasured("the run's CL and MIM models do not differ here")
    weights = [(_single(model), 1.0), *((_single(m), 0.0) for m in (*cl, *mim))]

    def position(readings: np.ndarray) -> np.ndarray:
        here = readings[..., 0]
        low = readings[..., 1 : 1 + len(cl)].mean(axis=-1)
        high = readings[..., 1 + len(cl) :].mean(axis=-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return (here - low) / (high - low)

    found = evidence.effect(weights, finding.reads, finding.over, position)
    if not np.isfinite(found.value):
        raise NotMeasured("the run's CL and MIM models do not differ here")
    return Effect(found.value, found.low, found.high, "", found.over, found.count, found.why, found.note)


def _single(model: str) -> Subject:
    return Subject(model, (model,), "", False)
