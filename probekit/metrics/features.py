"""Each image's pooled tokens at every site: what probes, kNN, CKA and spectra over images are made from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from probekit.errors import DoesNotApply, UsageError
from probekit.metric import Metric, Traces
from probekit.metrics.depth import depth_curve
from probekit.metrics.pooled import POOLED
from probekit.summaries import layer_coordinates, result_attributes, summary

if TYPE_CHECKING:
    from probekit.layer import Layer


class Features(Metric):
    """The residual stream pooled over an image's tokens, no norm applied.

    pool: ``mean`` of the patch tokens; ``cls``, the first prefix token (the class token where there is one);
        ``both``, cls and then mean

    The result is its mean over images and, as the curve, the root mean square over channels; the per-image
    vectors are the trace.
    """

    name = "features"
    needs = frozenset({"tokens"})
    dims: ClassVar[Mapping[str, tuple[str, ...]]] = {"features": ("channel",)}
    units: ClassVar[Mapping[str, str]] = {"features": "1"}

    def __init__(self, pool: str = "mean"):
        super().__init__(pool=pool)
        if pool not in POOLED:
            raise UsageError(f"pool is 'mean', 'cls' or 'both', not '{pool}'")
        self.pool = pool
        self.conventions = {
            "definition": "residual stream before any final norm",
            "pool": POOLED[pool],
            "curve": "root mean square over channels of an image's vector",
            "reading": "How large the pooled vector is. What the layers know is read by the probes.",
            "does_not_show": "What is encoded: the scale of the residual stream grows by itself.",
        }

    def measure(self, layer: Layer) -> Mapping[str, Tensor]:
        """(B, C), or (B, 2 C) with ``both``."""
        found = []
        if self.pool != "mean":
            if not layer.prefix:
                raise DoesNotApply("the model has no prefix token")
            found.append(layer.prefix_tokens()[:, 0].float())
        if self.pool != "cls":
            found.append(layer.tokens.mean(1))
        return {"features": torch.cat(found, -1)}

    def summarize(self, traces: Traces) -> xr.Dataset:
        """`features` (layer, channel) and its curve (layer)."""
        values = traces["features"]
        means = np.stack([values[:, r].mean(0, dtype=np.float64) for r in range(len(traces.rows))])
        sizes = np.stack(
            [
                np.sqrt(np.nanmean(values[:, r].astype(np.float64) ** 2, axis=1))
                for r in range(len(traces.rows))
            ],
            axis=1,
        )
        curve = summary(sizes, traces.seed)
        variables = {
            "features": (("layer", "channel"), means, {"units": "1", "role": "mean"}),
            **depth_curve(self.name, curve["mean"], curve["low"], curve["high"], units="1"),
        }
        return xr.Dataset(variables, layer_coordinates(traces.rows), result_attributes(self, traces))
