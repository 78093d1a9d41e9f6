"""What metrics with a `summarize` of their own share: depth curve, image ids, which row is the last layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from probekit.metric import Row, Traces


def depth_curve(
    name: str,
    mean: np.ndarray,
    low: np.ndarray | None = None,
    high: np.ndarray | None = None,
    *,
    units: str,
    reduced: str = "mean",
    long_name: str = "",
) -> dict[str, xr.Variable]:
    """``NAME_curve``, ``NAME_curve_low`` and ``NAME_curve_high`` (layer): what a report draws against depth.

    low, high: (layer,); NaN where no interval is known, so by default everywhere
    reduced:   how one layer's values became one number
    long_name: what the curve is, where the metric's name doesn't say it: the label of the axis
    """
    unknown = np.full(len(mean), np.nan)
    columns = {"": mean, "_low": unknown if low is None else low, "_high": unknown if high is None else high}
    attrs = {"units": units, "reduced": reduced, **({"long_name": long_name} if long_name else {})}
    return {
        f"{name}_curve{end}": xr.Variable(("layer",), column, {**attrs, "role": f"curve{end}"})
        for end, column in columns.items()
    }


def image_coordinate(traces: Traces) -> xr.Variable:
    """The images' ids, for results that keep something of each."""
    return xr.Variable(("image",), np.array(list(traces.images), dtype=np.str_))


def last_layer(rows: Sequence[Row]) -> int:
    """Number of the row after the last layer of the model's first part (the encoder, not the decoder)."""
    first = [number for number, row in enumerate(rows) if row.part == rows[0].part]
    return max((number for number in first if rows[number].site == "out"), default=first[-1])
