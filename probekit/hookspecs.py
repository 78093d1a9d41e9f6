"""The hooks a plugin may implement. Each returns plain specs; nothing heavy is imported to list them.

A plugin is a module (or object) named by an entry point of the group ``probekit``:

    [project.entry-points.probekit]
    mypack = "mypack.plugin"

    # mypack/plugin.py
    from probekit import MetricSpec, hookimpl

    PROBEKIT_API = 1

    @hookimpl
    def probekit_metrics():
        return [MetricSpec(name="entropy", summary="...", target="mypack.entropy:Entropy")]
"""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from probekit.specs import CommandSpec, DatasetSpec, FindingSpec, MetricSpec, ModelSpec, ReportSpec

API = 1
"""The contract's version. A plugin states the one it was written for as ``PROBEKIT_API``."""

GROUP = "probekit"
hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec
def probekit_models() -> Iterable[ModelSpec]:
    """Model entries, one per ``NAME:VARIANT``."""


@hookspec
def probekit_metrics() -> Iterable[MetricSpec]:
    """Metrics: classes with `measure`, and optionally `summarize`."""


@hookspec
def probekit_datasets() -> Iterable[DatasetSpec]:
    """Datasets: ordered images with a fingerprint."""


@hookspec
def probekit_reports() -> Iterable[ReportSpec]:
    """Reports: what turns a finished run into something to look at."""


@hookspec
def probekit_findings() -> Iterable[FindingSpec]:
    """Findings: claims as testable statements over results."""


@hookspec
def probekit_commands() -> Iterable[CommandSpec]:
    """Commands: Typer apps or functions that become ``probekit NAME``."""
