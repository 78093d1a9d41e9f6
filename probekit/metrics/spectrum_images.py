"""How many directions images fill (Park et al., ICLR 2023, Fig. 7)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import xarray as xr

from probekit.errors import DoesNotApply
from probekit.metric import Metric, Traces
from probekit.metrics import spectra
from probekit.metrics.depth import depth_curve
from probekit.metrics.pooled import POOLED, measured, pooled, source
from probekit.summaries import layer_coordinates, result_attributes


class SpectrumImages(Metric):
    """Natural log of the eigenvalues of the unbiased covariance of the images' features, largest first.

        spectrum_images(i) = log lambda_i,  i = 1 .. min(n - 1, C),  nats, n images
        effective_rank     = exp(H(p)), p_i = sqrt(lambda_i) / sum_j sqrt(lambda_j)

    float64. With n <= C + 1 images the tail of the spectrum is that of the sample: the result then has an
    attribute ``warning``. No intervals: a bootstrap is C^3 a resample, and biased (a resample has fewer
    different images, so a shorter spectrum).

    pool: ``mean`` of the patch tokens, as published; ``cls``: the first prefix token (the class token
        where there is one)
    """

    name = "spectrum_images"
    figure = "Fig. 7"
    units: ClassVar = {"spectrum_images": "nats", "effective_rank": "1", "floored_ranks": "1"}

    def __init__(self, pool: str = "mean"):
        super().__init__(pool=pool)
        self.source = source(pool)
        self.conventions = {
            "definition": "Park et al. 2023, Fig. 7; pseudo-code in naver-ai/cl-vs-mim, issue 2",
            "features": POOLED[pool],
            "log": "natural",
            "values": "eigenvalues of the covariance, not singular values of the data: a factor 2 in the log",
            "ddof": 1,
            "ranks": "1-based, to min(n - 1, C); a tail worth reading needs n > C + 1 images",
            "floor": "max(n, C) * 2.2e-16 * the largest",
            "effective_rank": "singular values of the centred features (RankMe's formula)",
            "curve": spectra.CURVE,
            "reading": "The nearer to 0, the more directions the images fill evenly.",
            "does_not_show": (
                "With few images, the tail is the sample's. Which directions, and whether they separate "
                "classes, is not seen."
            ),
        }

    def summarize(self, traces: Traces) -> xr.Dataset:
        """`spectrum_images`, `relative_to_second` and `relative_to_first` (layer, rank); `effective_rank`,
        `floored_ranks` and, where there are so many ranks, `rank_64` and `rank_128` (layer).

        Raises `DoesNotApply` for a single image.
        """
        images = len(traces)
        if images < 2:
            raise DoesNotApply("a single image has no covariance")
        found, scalars, widths = [], {"effective_rank": [], "floored_ranks": []}, []
        rows = measured(traces)
        for row in rows:
            features = pooled(traces, row)
            size = max(features.shape)
            eigenvalues = spectra.covariance_eigenvalues_of_many(features)
            logs, floored = spectra.logs(eigenvalues, size)
            found.append(logs.numpy())
            scalars["floored_ranks"].append(float(floored))
            scalars["effective_rank"].append(float(spectra.effective_rank(eigenvalues, size)))
            widths.append(features.shape[1])
        spectrum = np.full((len(found), max(map(len, found))), np.nan)
        for row, values in enumerate(found):
            spectrum[row, : len(values)] = values
        for rank in spectra.RANKS:
            values = spectra.relative_to_second(spectrum, rank)
            if not np.isnan(values).all():
                scalars[f"rank_{rank}"] = values
        variables = {
            self.name: xr.Variable(("layer", "rank"), spectrum, {"units": "nats", "role": "mean"}),
            **spectra.relative_variables(spectrum),
        }
        for name, values in scalars.items():
            attrs = {"units": self.units.get(name, "nats"), "role": "mean"}
            variables[name] = xr.Variable(("layer",), np.asarray(values, dtype=np.float64), attrs)
        line = spectra.relative_to_second(spectrum, spectra.RANKS[0], or_last=True)
        variables |= depth_curve(self.name, line, units="nats", reduced=spectra.CURVE)
        attrs = {**result_attributes(self, traces), "interval": "none"}
        if images <= max(widths) + 1:
            attrs["warning"] = (
                f"{images} images for up to {max(widths)} channels: the tail of the spectrum is the sample's"
            )
        coordinates = {
            **layer_coordinates([traces.rows[row] for row in rows]),
            "rank": spectra.rank_coordinate(spectrum),
        }
        return xr.Dataset(variables, coordinates, attrs)
