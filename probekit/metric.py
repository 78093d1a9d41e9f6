"""What a metric is: `measure` one layer of one batch on the device, `summarize` all images afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

if TYPE_CHECKING:
    import xarray as xr
    from torch import Tensor, nn

    from probekit.anatomy import Anatomy
    from probekit.layer import Layer


@dataclass(frozen=True)
class Variation:
    """Another pass over the same images, with their pixels or the model changed.

    name:   of its folder: letters, digits, ``.``, ``_``, ``-``; tells apart whatever gives other numbers
    pixels: (3, rows, cols) normalised image and its index -> the same shape; survives pickling
    model:  changes the module in place; its second argument builds the same architecture with fresh weights,
            its third says which module is which layer. The weights are put back afterwards
    train:  whether the train split is measured under it too
    """

    name: str
    pixels: Callable[[Tensor, int], Tensor] | None = None
    model: Callable[[nn.Module, Callable[[], nn.Module], Anatomy], None] | None = None
    train: bool = False


class Metric:
    """One quantity, measured per image and layer while the forward pass runs.

    A complete metric is `name`, `needs`, `dims` and a `measure` of a few lines. Constructor keyword
    arguments are the metric's options; they become part of the trace's identity.

    A metric of a whole dataset (a probe, a spectrum over images) has a `source` instead: it measures nothing
    itself and works in `summarize`, on the traces of the metric it names.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    """Changes when the numbers do: part of the trace's identity."""
    needs: ClassVar[frozenset[str] | set[str]] = frozenset()
    """Fields of `Layer` that `measure` reads; nothing else is computed. With ``"tokens"`` the metric is
    measured at every token site (embedding, after attention, after MLP) instead of every layer."""
    dims: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Each value's axes after the image axis: ``{"nmi": ("head",)}``."""
    source: str = ""
    """The metric, with its options, whose traces `summarize` gets: ``"features:pool=cls"``."""
    requires: ClassVar[frozenset[str] | set[str]] = frozenset()
    """What the dataset must have, of ``labels``, ``train``, ``cues`` and ``masks``; else the metric does not
    apply. With ``train``, the source's traces on the train split come as `Traces.train`."""
    others: ClassVar[bool] = False
    """Whether it compares the model with the run's others on the same images (`Traces.others`)."""
    holes: ClassVar[bool] = False
    """Whether values may be NaN (keys outside a window); else NaN is a failure."""
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

    def rows(self, rows: Sequence[Row]) -> Sequence[Row]:
        """The entries of the layer axis it is measured at, of all that the model has."""
        return rows

    def sample(self, count: int, labels: Sequence[int] | None) -> Sequence[int] | None:
        """Positions of the images it is measured on, of `count` with these labels; None for all."""
        return None

    def variations(self) -> Sequence[Variation]:
        """Further passes over the images whose traces come as `Traces.variations`."""
        return ()

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

    values:     ``{name: (images, rows, *dims)}`` float32; NaN where a row has no such head or index
    rows:       the layer axis
    constants:  `Metric.describe` of every row, stacked: ``{name: (rows, ...)}``
    of:         how many images these were sampled from; 0 when they are all
    classes:    names of the labels
    train:      the same on the train split, labels in the same numbering
    variations: the same under each of `Metric.variations`, by name
    others:     the same for the run's other models, by name
    cues:       class numbers of each image by cue, ``{"shape": ..., "texture": ...}``
    class_of:   what number a class of another dataset has here, by its name; None for none
    device:     where heavy sums may be done: the run's device
    mask:       position of an image -> (rows, cols) class map at the network's input size, -1 to ignore
    image_size: rows and columns of the network's input; None where nobody says
    """

    values: Mapping[str, np.ndarray]
    rows: Sequence[Row]
    images: Sequence[str]
    labels: Sequence[int] | None = None
    constants: Mapping[str, np.ndarray] = field(default_factory=dict)
    seed: int = 0
    of: int = 0
    classes: Sequence[str] | None = None
    train: Traces | None = None
    variations: Mapping[str, Traces] = field(default_factory=dict)
    others: Mapping[str, Traces] = field(default_factory=dict)
    cues: Mapping[str, Sequence[int]] = field(default_factory=dict)
    mask: Callable[[int], np.ndarray] | None = None
    class_of: Callable[[str], int | None] | None = None
    device: str = "cpu"
    image_size: tuple[int, int] | None = None

    def __getitem__(self, name: str) -> np.ndarray:
        return self.values[name]

    def __len__(self) -> int:
        return len(self.images)
