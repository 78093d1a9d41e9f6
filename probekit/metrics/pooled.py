"""Reading the traces of `features`: one vector per image and token site, widths differing between sites."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from probekit.errors import DoesNotApply, UsageError
from probekit.metric import Traces

POOLS = {"mean": "features", "cls": "features:pool=cls", "both": "features:pool=both"}
"""A metric's option ``pool`` and the source it stands for."""

POOLED = {
    "mean": "mean of patch tokens",
    "cls": "first prefix token (the class token where there is one)",
    "both": "first prefix token (the class token where there is one), then mean of patch tokens",
}
"""What the features are then. Nothing in a model's anatomy tells a register from a class token."""


def source(pool: str, allowed: Collection[str] = ("mean", "cls")) -> str:
    """The metric whose traces hold features pooled so. Raises `UsageError` for a `pool` not `allowed`."""
    if pool not in allowed:
        raise UsageError(
            f"pool is {' or '.join(map(repr, allowed))}, not '{pool}'",
            hint=f"mean: of patch tokens; cls: {POOLED['cls']}",
        )
    return POOLS[pool]


def pooled(traces: Traces, row: int) -> np.ndarray:
    """The features at one site, (images, C) float32, without the columns only wider sites have."""
    found = traces["features"][:, row]
    return found[:, ~np.isnan(found[0])]


def measured(traces: Traces, *sites: str) -> list[int]:
    """Numbers of the rows that have features, of these sites (all by default).

    Raises `DoesNotApply` where there is none.
    """
    rows = [
        number
        for number, row in enumerate(traces.rows)
        if (not sites or row.site in sites) and not np.isnan(traces["features"][0, number]).all()
    ]
    if not rows:
        raise DoesNotApply("there are no features of these sites")
    return rows


def between_layers(traces: Traces) -> list[int]:
    """The measured rows before, between and after layers: ``embed`` and ``out``, not ``mid``."""
    return measured(traces, "embed", "out")
