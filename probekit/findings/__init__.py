"""Findings: claims about what models learn, tested on a run's results.

    from probekit.findings import Contrast, evaluate

    for tested in evaluate(probekit.open("runs/paper")):
        print(tested.name, tested.verdict.status, tested.verdict.reason)

Names are imported when first used: a plugin's module may import from here and stay light.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PLACES = {
    "Finding": "finding",
    "Verdict": "finding",
    "Effect": "finding",
    "Baseline": "finding",
    "NotMeasured": "finding",
    "judge": "finding",
    "combined": "finding",
    "Contrast": "contrast",
    "Nearer": "contrast",
    "Quantity": "quantities",
    "LastLess": "quantities",
    "Rank": "quantities",
    "Above": "quantities",
    "Span": "spans",
    "Change": "spans",
    "FIRST_THIRD": "spans",
    "MIDDLE_THIRD": "spans",
    "LAST_THIRD": "spans",
    "ALL_LAYERS": "spans",
    "FIRST_LAYER": "spans",
    "LAST_LAYER": "spans",
    "LATE_MINUS_EARLY": "spans",
    "EARLY_MINUS_LATE": "spans",
    "BEST_LAYER": "spans",
    "Evidence": "evidence",
    "Subject": "evidence",
    "Curves": "curves",
    "Tested": "evaluating",
    "evaluate": "evaluating",
    "Placed": "fingerprints",
    "fingerprint": "fingerprints",
}

__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'probekit.findings' has no attribute '{name}'")
    value = getattr(import_module(f"probekit.findings.{_PLACES[name]}"), name)
    globals()[name] = value
    return value
