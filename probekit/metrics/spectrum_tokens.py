"""How many directions an image's tokens fill (Park et al., ICLR 2023, Fig. 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from torch import Tensor

from probekit.errors import DoesNotApply, UsageError
from probekit.metric import Metric, Traces
from probekit.metrics import spectra
from probekit.metrics.depth import depth_curve
from probekit.summaries import summarize, summary

if TYPE_CHECKING:
    import xarray as xr

    from probekit.layer import Layer

_SMALL = 64
"""A run of at most so many images measures all of them."""


class SpectrumTokens(Metric):
    """Natural log of the eigenvalues of the unbiased covariance of an image's patch tokens, largest first.

        spectrum_tokens(i) = log lambda_i,  i = 1 .. min(N - 1, C),  nats; a mean of logs over images
        effective_rank     = exp(H(p)), p_i = sqrt(lambda_i) / sum_j sqrt(lambda_j)

    float64 throughout. An eigenvalue that rounding can't tell from 0 is raised to max(N, C) * 2.2e-16 *
    lambda_1; `floored_ranks` counts these.

    every: one image in so many is measured, in dataset order; all of them in a run of at most 64.
    """

    name = "spectrum_tokens"
    needs = frozenset({"tokens"})
    dims: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "spectrum_tokens": ("rank",),
        "effective_rank": (),
        "floored_ranks": (),
    }
    units: ClassVar[Mapping[str, str]] = {
        "spectrum_tokens": "nats",
        "effective_rank": "1",
        "floored_ranks": "1",
    }
    figure = "Fig. 7"
    windows = "own"

    def __init__(self, every: int = 8):
        super().__init__(every=every)
        if every < 1:
            raise UsageError(f"every is 1 or more, not {every}", hint="every=1 measures every image")
        self.every = every
        self.conventions = {
            "definition": "Park et al. 2023, Fig. 7; pseudo-code in naver-ai/cl-vs-mim, issue 2",
            "prefix": "dropped",
            "log": "natural",
            "values": "eigenvalues of the covariance, not singular values of the data: a factor 2 in the log",
            "ddof": 1,
            "averaging": "logarithms over images",
            "ranks": "1-based, to min(N - 1, C)",
            "floor": "max(N, C) * 2.2e-16 * the largest",
            "effective_rank": "singular values of the centred tokens (RankMe's formula), per image",
            "curve": spectra.CURVE,
            "reading": "The nearer to 0, the more directions an image's tokens fill evenly.",
            "does_not_show": (
                "Layers of different width or number of tokens have spectra of different length: compare "
                "equal ones. Which directions, and whether they mean anything, is not seen."
            ),
        }

    def sample(self, count: int, labels: Sequence[int] | None) -> Sequence[int] | None:
        return None if count <= _SMALL or self.every == 1 else range(0, count, self.every)

    def measure(self, layer: Layer) -> Mapping[str, Tensor]:
        """(B, min(N - 1, C)), (B,) and (B,)."""
        tokens = layer.tokens
        if tokens.shape[1] < 2:
            raise DoesNotApply("a single token has no covariance")
        size = max(tokens.shape[1:])
        eigenvalues = spectra.covariance_eigenvalues(tokens)
        logs, floored = spectra.logs(eigenvalues, size)
        return {
            "spectrum_tokens": logs.float(),
            "effective_rank": spectra.effective_rank(eigenvalues, size).float(),
            "floored_ranks": floored.float(),
        }

    def summarize(self, traces: Traces) -> xr.Dataset:
        """Besides the default: `relative_to_second` and `relative_to_first` (layer, rank), and `rank_64` and
        `rank_128` (layer), relative to rank 2, where a layer has so many ranks."""
        spectrum = traces["spectrum_tokens"]
        against_depth = {f"rank_{rank}": spectra.relative_to_second(spectrum, rank) for rank in spectra.RANKS}
        against_depth = {name: values for name, values in against_depth.items() if not np.isnan(values).all()}
        wider = copy(self)
        wider.dims = {**self.dims, **dict.fromkeys(against_depth, ())}
        wider.units = {**self.units, **dict.fromkeys(against_depth, "nats")}
        result = summarize(wider, replace(traces, values={**traces.values, **against_depth}))
        line = summary(spectra.relative_to_second(spectrum, spectra.RANKS[0], or_last=True), traces.seed)
        curve = depth_curve(
            self.name, line["mean"], line["low"], line["high"], units="nats", reduced=spectra.CURVE
        )
        means = result[self.name].values
        result = result.assign(curve | spectra.relative_variables(means))
        return result.assign_coords(rank=spectra.rank_coordinate(means))
