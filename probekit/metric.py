"""What a metric is: `measure` one layer of one batch on the device, `summarize` all images afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

if TYPE_CHECKING:
    import xarray as xr
    from torch import Tensor

    from probekit.layer import Layer


class Metric:
    """One quantity, measured per image and layer while the forward pass runs.

    A complete metric is `name`, `needs`, `dims` and a `measure` of a few lines. Constructor keyword
    arguments are the metric's options; they become part of the trace's identity.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    """Changes when the numbers do: part of the trace's identity."""
    needs: ClassVar[frozenset[str] | set[str]]
    """Fields of `Layer` that `measure` reads; nothing else is computed. With ``"tokens"`` the metric is
    measured at every token site (embedding, after attention, after MLP) instead of every layer."""
    dims: ClassVar[Mapping[str, tuple[str, ...]]]
    """Each value's axes after the image axis: ``{"nmi": ("head",)}``."""
    units: ClassVar[Mapping[str, str]] = {}
    figure: ClassVar[str] = ""
    windows: ClassVar[Literal["each", "own"]] = "each"
    """``each``: measured per attention window and averaged by tokens; ``own``: handles windows itself."""
    curve: ClassVar[Literal["mean", "last"]] = "mean"
    """How one image's values become one number per layer in the plot."""
    conventions: ClassVar[Mapping[str, Any]] = {}
    """What a reader must know to compare the number with another tool's; stored with the result."""

    def __init__(self, **options: Any):
        self.options = options

    def measure(self, layer: Layer) -> Mapping[str, Tensor]:
        """Values of one layer (or site): ``{name: (B, *dims)}``, float32, on the layer's device.

        Raises `DoesNotApply` where the quantity has no meaning for this layer.
        """
        raise NotImplementedError

    def describe(self, layer: Layer) -> Mapping[str, float | np.ndarray]:
        """What holds for a layer whatever the image: coordinates of an axis (named like it) and baselines.

        Called once per layer and cell.
        """
        return {}

    def summarize(self, traces: Traces) -> xr.Dataset:
        """Mean, sd, sem and bootstrap interval over images; override for anything else."""
        from probekit.summaries import summarize

        return summarize(self, traces)


@dataclass(frozen=True)
class Row:
    """One entry of a result's layer axis: an attention layer, or a token site."""

    label: str
    depth: float
    site: str  # "attention", "embed", "mid" or "out"
    part: str
    stage: int
    heads: int
    grid: tuple[int, int]
    stride: tuple[float, float]


@dataclass(frozen=True)
class Traces:
    """Per-image values of one metric on one model and dataset, in dataset order.

    values:    ``{name: (images, rows, *dims)}`` float32; NaN where a row has no such head or index
    rows:      the layer axis
    constants: `Metric.describe` of every row, stacked: ``{name: (rows, ...)}``
    """

    values: Mapping[str, np.ndarray]
    rows: Sequence[Row]
    images: Sequence[str]
    labels: Sequence[int] | None = None
    constants: Mapping[str, np.ndarray] = field(default_factory=dict)
    seed: int = 0

    def __getitem__(self, name: str) -> np.ndarray:
        return self.values[name]

    def __len__(self) -> int:
        return len(self.images)
