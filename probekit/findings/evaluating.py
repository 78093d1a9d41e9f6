"""Testing findings on a run: each alone, so that a broken one costs only itself."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from probekit.errors import PluginError, ProbekitError
from probekit.findings.evidence import Evidence
from probekit.findings.finding import Finding, NotMeasured, Status, Verdict

if TYPE_CHECKING:
    from probekit.plugins.catalog import Catalog, Entry
    from probekit.store.runfolder import Run


@dataclass(frozen=True)
class Tested:
    """A finding on one dataset.

    name:    as it is looked up, ``pack/name`` where two offer it
    pack:    whose it is, with its version
    failure: what a broken finding raised; its verdict is then "not measured"
    details: the traceback
    """

    name: str
    dataset: str
    verdict: Verdict
    claim: str = ""
    sentence: str = ""
    metrics: tuple[str, ...] = ()
    pack: str = ""
    failure: str = ""
    details: str = ""


def evaluate(
    run: Run,
    findings: Iterable[Finding] | None = None,
    *,
    datasets: Sequence[str] = (),
    groups: Iterable[Sequence[str]] = (),
    catalog: Catalog | None = None,
) -> list[Tested]:
    """Every finding on every dataset of a run, or on those named.

    findings: these; by default all that the catalog offers
    groups:   models that are trainings of one, see `Evidence`
    catalog:  where findings are looked up; by default the built-in and installed ones

    Raises `UsageError` for groups and datasets that aren't the run's. What a finding raises becomes its
    `failure`.
    """
    groups = [tuple(group) for group in groups]
    named = [(str(f.name), "", f) for f in findings] if findings is not None else offered(catalog)
    found = []
    for dataset in datasets or run.datasets:
        found += tested(Evidence(run, dataset, groups), named)
    return found


def tested(evidence: Evidence, named: Iterable[tuple[str, str, Finding | Exception]]) -> list[Tested]:
    """Each of (name, pack, finding), as `offered` gives them, on one dataset."""
    return [_tested(name, pack, finding, evidence) for name, pack, finding in named]


def offered(catalog: Catalog | None = None) -> list[tuple[str, str, Finding | Exception]]:
    """(name, pack, finding) of all that a catalog offers; the error of one that can't be had."""
    from probekit.plugins.catalog import Catalog

    catalog = catalog or Catalog.load()
    found = []
    for name, entry in catalog.labelled("findings"):
        pack = " ".join(part for part in (entry.pack, entry.version) if part)
        try:
            found.append((name, pack, _made(catalog, entry)))
        except (Exception, SystemExit) as error:
            found.append((name, pack, error))
    return found


def _made(catalog: Catalog, entry: Entry) -> Finding:
    target = catalog.resolve_target(entry)
    finding = target() if isinstance(target, type) else target
    if not isinstance(finding, Finding):
        raise PluginError(f"its target is {type(finding).__name__}, not a probekit.findings.Finding")
    return finding


def _tested(name: str, pack: str, finding: Finding | Exception, evidence: Evidence) -> Tested:
    about = {"name": name, "dataset": evidence.dataset, "pack": pack}
    try:
        if not isinstance(finding, Finding):
            raise finding
        about["claim"], about["sentence"] = str(finding.claim), str(finding.sentence)
        about["metrics"] = tuple(map(str, finding.metrics))
        try:
            verdict = finding.evaluate(evidence)
        except NotMeasured as error:
            missing = error.metrics or _not_in(evidence, about["metrics"])
            verdict = Verdict("not measured", error.message, missing=missing, hint=error.hint or "")
        if not isinstance(verdict, Verdict) or verdict.status not in get_args(Status):
            raise PluginError(f"it returned {type(verdict).__name__}, not a Verdict with a known status")
        return Tested(verdict=verdict, **about)
    except (Exception, SystemExit) as error:
        said = error.message if isinstance(error, ProbekitError) else f"{type(error).__name__}: {error}"
        details = "".join(traceback.format_exception(error))
        verdict = Verdict("not measured", f"the finding failed: {said}")
        return Tested(verdict=verdict, failure=said, details=details, **about)


def _not_in(evidence: Evidence, metrics: Sequence[str]) -> tuple[str, ...]:
    known = {m.rpartition("/")[2].partition(":")[0] for m in evidence.run.metrics}
    return tuple(name for name in metrics if name not in known)
