"""Findings as texts: what the page, the command line and the Markdown table show of them alike."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from probekit.findings.evaluating import Tested, offered
from probekit.findings.evaluating import tested as test_all
from probekit.findings.evidence import Evidence
from probekit.findings.finding import Baseline, Effect, Finding, Verdict
from probekit.findings.fingerprints import Placed, fingerprint

if TYPE_CHECKING:
    from probekit.plugins.catalog import Catalog
    from probekit.store.runfolder import Run


@dataclass(frozen=True)
class Line:
    """One row of the table: a finding, or under it a combination of models.

    verdict: the status in words; of bundled miniatures, whether the claim is "seen" in them
    """

    name: str
    claim: str
    models: str
    quantity: str
    layers: str
    status: str
    verdict: str
    effect: str
    baseline: str
    reason: str


@dataclass(frozen=True)
class Missing:
    """Findings that can't be tested for one reason."""

    names: tuple[str, ...]
    reason: str
    hint: str


@dataclass(frozen=True)
class Tables:
    """All findings on one dataset.

    lines:   those that were tested, with a line for each combination of models where there are several
    missing: the others, by reason
    command: measures every metric that is missing; empty where none is
    failed:  names of findings that broke
    """

    dataset: str
    tested: tuple[Tested, ...]
    lines: tuple[Line, ...]
    missing: tuple[Missing, ...]
    command: str
    failed: tuple[str, ...]
    notes: tuple[str, ...]
    fingerprint: tuple[Placed, ...]


def tables(
    run: Run,
    catalog: Catalog,
    *,
    datasets: Sequence[str] = (),
    groups: Sequence[Sequence[str]] = (),
    folder: str = "",
) -> list[Tables]:
    """One for each dataset; `folder` is the run's as commands name it, its path by default.

    Raises `UsageError` for groups that can't be.
    """
    found = []
    named = offered(catalog)
    findings = [finding for _, _, finding in named if isinstance(finding, Finding)]
    for dataset in datasets or run.datasets:
        evidence = Evidence(run, dataset, groups, folder)
        tested = test_all(evidence, named)
        miniatures = {s.name for s in evidence.subjects if s.miniature}
        absent = [t for t in tested if t.verdict.status == "not measured" and not t.verdict.effect]
        metrics = dict.fromkeys(name for t in absent if not t.failure for name in t.verdict.missing)
        found.append(
            Tables(
                dataset,
                tuple(tested),
                tuple(line for t in tested if t not in absent for line in _lines(t, miniatures)),
                tuple(_missing(absent)),
                evidence.command(*metrics) if metrics else "",
                tuple(t.name for t in tested if t.failure),
                tuple(_notes(tested, miniatures, bool(evidence.untrained))),
                tuple(fingerprint(evidence, findings)),
            )
        )
    return found


def _lines(tested: Tested, miniatures: Collection[str]) -> Iterator[Line]:
    verdict = tested.verdict
    yield _line(tested.name, tested.claim, verdict, miniatures)
    for part in verdict.parts:
        yield _line("", "", part, miniatures)


_OF_MINIATURES = {"holds": "seen", "does not hold": "not seen"}


def _line(name: str, claim: str, verdict: Verdict, miniatures: Collection[str]) -> Line:
    models = {model for part in (verdict, *verdict.parts) for model in part.models}
    said = _OF_MINIATURES if not models.isdisjoint(miniatures) else {}
    return Line(
        name,
        claim,
        ", ".join(verdict.models),
        verdict.quantity.replace("_", " ") if name else "",
        verdict.layers,
        verdict.status,
        said.get(verdict.status, verdict.status),
        effect_text(verdict.effect),
        baseline_text(verdict.baseline),
        verdict.reason,
    )


def _missing(absent: Sequence[Tested]) -> Iterator[Missing]:
    names: dict[str, list[str]] = {}
    hints: dict[str, str] = {}
    for tested in absent:
        verdict = tested.verdict
        names.setdefault(verdict.reason, []).append(tested.name)
        if verdict.hint and not verdict.missing:  # one command measures all metrics that are missing
            hints.setdefault(verdict.reason, verdict.hint)
    for reason, each in names.items():
        yield Missing(tuple(each), reason, hints.get(reason, ""))


def _notes(tested: Sequence[Tested], miniatures: Collection[str], baseline: bool) -> Iterator[str]:
    """What every reader of the table must know."""
    verdicts = [v for t in tested for v in (t.verdict, *t.verdict.parts) if v.effect]
    if not verdicts:
        return
    if miniatures:
        yield (
            f"{', '.join(sorted(miniatures))}: bundled miniatures, tiny networks trained for minutes or a "
            "few hours on drawn images. A claim is seen or not seen in these miniatures; that says nothing "
            "for or against the paper's models."
        )
    counts: dict[str, set[int]] = {}
    for verdict in verdicts:
        counts.setdefault(verdict.effect.over, set()).add(verdict.effect.count)
    yield (
        "Effects are positive in the direction of the claim, with 95 % intervals, each claim by itself. A "
        "claim holds if its interval lies above 0 and, where the run has an untrained network, the model it "
        "gives the property to goes beyond that one."
    )
    if "images" in counts:
        count = " to ".join(str(n) for n in sorted({min(counts["images"]), max(counts["images"])}))
        yield (
            f"Intervals are over images (paired bootstrap, {count} in common) and do not cover other "
            "trainings of the same models: another seed may differ by more. `probekit findings RUN --group` "
            "takes several of them."
        )
    if "results" in counts:
        yield (
            "Where a metric keeps no values of each image, intervals are its results' own, combined as if "
            "independent; they do not cover other trainings either."
        )
    if "trainings" in counts:
        yield (
            "With grouped trainings, intervals are over trainings (t-interval over seeds; where one side has "
            "a single training, its spread is taken to be the other's)."
        )
    if not baseline:
        yield (
            "The run has no untrained network (`MODEL@random`): random weights alone show some of these "
            "properties, so a claim that holds here may be none of training's."
        )


def effect_text(effect: Effect | None) -> str:
    """``+0.0412 [+0.0301, +0.0523] px``"""
    if effect is None:
        return ""
    interval = f" [{signed(effect.low)}, {signed(effect.high)}]" if effect.known else ""
    return f"{signed(effect.value)}{interval}{f' {effect.units}' if effect.units else ''}"


def baseline_text(baseline: Baseline | None) -> str:
    """``-0.01; beyond it by +0.05 [+0.04, +0.06]``"""
    if baseline is None:
        return ""
    beyond = baseline.beyond
    interval = f" [{signed(beyond.low)}, {signed(beyond.high)}]" if beyond.known else ""
    return f"{signed(baseline.effect.value)}; beyond it by {signed(beyond.value)}{interval}"


def signed(value: float) -> str:
    """Three significant digits with the sign; a dash for what isn't there."""
    return "-" if math.isnan(value) else f"{value:+#.3g}".rstrip(".")


def positions(placed: Sequence[Placed], models: Sequence[str]) -> list[tuple[str, list[str]]]:
    """For each axis, each model's position between CL (0) and MIM (1), else its plain value in brackets."""
    axes: dict[str, Mapping[str, Placed]] = {}
    for one in placed:
        axes.setdefault(one.axis, {})[one.model] = one
    return [
        (axis, [_position(by_model[m]) for m in models])
        for axis, by_model in axes.items()
        if any(one.value for one in by_model.values())
    ]


def _position(placed: Placed) -> str:
    if placed.position is None:
        return f"({placed.value.value:.3g})" if placed.value else ""
    at = placed.position
    value, low, high = (round(v, 2) + 0.0 for v in (at.value, at.low, at.high))  # no "-0.00"
    return f"{value:.2f} [{low:.2f}, {high:.2f}]" if at.known else f"{value:.2f}"


def unplaced(placed: Sequence[Placed]) -> str:
    """Why numbers stand in brackets; empty where none does."""
    reasons = dict.fromkeys(one.reason for one in placed if one.value and one.position is None)
    return "; ".join(reasons)


def markdown(found: Sequence[Tables]) -> str:
    """The tables in Markdown."""
    blocks = []
    for each in found:
        blocks.append(f"## Findings on {_cell(each.dataset)}")
        if each.lines:
            rows = [
                # of models without an effect, why there is none
                (
                    _cell_of_claim(line),
                    line.verdict,
                    _cell(line.effect or (line.reason if line.models else "")),
                    _cell(line.baseline),
                )
                for line in each.lines
            ]
            blocks.append(_grid(("claim", "verdict", "effect [95 %]", "untrained"), rows))
        if each.missing:
            texts = [f"- {_cell(', '.join(m.names))}: {_cell(m.reason)}" for m in each.missing]
            blocks.append("Not measured:\n\n" + "\n".join(texts))
        blocks += [_cell(note) for note in each.notes]
    return "\n\n".join(blocks) + "\n"


def _cell_of_claim(line: Line) -> str:
    about = f"({_cell('; '.join(text for text in (line.models, line.quantity, line.layers) if text))})"
    said = f"**{_cell(line.name)}** {_cell(line.claim)}" if line.name else "↳"
    return f"{said} {about}" if about != "()" else said


def _grid(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(text: Any) -> str:
    """A text of others that can't end its cell, nor become a tag or a link."""
    from probekit.reports.charts import clean

    plain = " ".join(clean(str(text)).split())
    escaped = "".join(f"\\{c}" if c in "\\`*_<>|#" else c for c in plain)
    return escaped.replace("](", "]\\(")
