"""How well a linear classifier segments from patch tokens (a proxy of Park et al., ICLR 2023, Table G.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from probekit.errors import DoesNotApply, MetricError, UsageError
from probekit.metric import Metric, Row, Traces
from probekit.metrics.depth import image_coordinate
from probekit.metrics.patches import iou, mean_iou, patches, pixel_accuracy, resampled, sampled, tally
from probekit.metrics.probing import Probe, fit_many
from probekit.metrics.readout import (
    Heads,
    baseline,
    chosen,
    dataset,
    numbers,
    recipe,
    recipe_conventions,
)
from probekit.summaries import result_attributes

if TYPE_CHECKING:
    from probekit.layer import Layer

VALUE = "segmentation_tokens"


class SegmentationProbe(Metric):
    """Mean IoU and pixel accuracy in % of a linear classifier of patch tokens, over a sample of patches.

    `tokens` patches an image, the same places in all images, are kept. The classifier learns the majority
    class of each patch of the train split; on a test patch its answer stands for all pixels of the patch
    (nearest upsampling). With confusion counts of pixels over all test images:

        IoU_c = tp_c / (tp_c + fp_c + fn_c),   segmentation_probe = mean over classes with tp + fp + fn > 0

    Pixels to ignore count nowhere. `own_majority` is the score of each test patch's own majority class, what
    one class a patch can reach; `chance` that of the train split's commonest class everywhere.
    """

    name = "segmentation_probe"
    needs = frozenset({"tokens"})
    dims: ClassVar[Mapping[str, tuple[str, ...]]] = {VALUE: ("patch", "channel")}
    units: ClassVar[Mapping[str, str]] = {
        VALUE: "1",
        "segmentation_probe": "%",
        "segmentation_probe_accuracy": "%",
    }
    requires: ClassVar[frozenset[str]] = frozenset({"train", "masks"})
    figure = "Table G.1"
    windows = "own"

    def __init__(
        self,
        tokens: int = 4,
        norm: str = "bn",
        solver: str = "lbfgs",
        l2: str | float = "",
        lr: str | float = "",
    ):
        super().__init__(tokens=tokens, norm=norm, solver=solver, l2=l2, lr=lr)
        if tokens < 1:
            raise UsageError(f"tokens is at least 1, not {tokens}")
        self.tokens = tokens
        self.recipe = recipe(norm, solver, l2, lr)
        self.conventions = {
            "definition": "linear classifier of single tokens, a proxy of Table G.1's ADE20k fine-tuning",
            "patches": f"{tokens} of each grid, evenly drawn, seed 0, the same in every image [my reading]",
            "features": "patch tokens, raw residual stream, no final norm of the model",
            "label": "majority class of the patch's pixels, the lowest of equals [my reading]",
            "held_out": "whole images",
            "upsampling": "nearest",
            "averaging": "counts of pixels over all images, then IoU per class, then the mean over classes",
            **recipe_conventions(self.recipe),
            "reading": "The higher, the more of what is where a linear classifier finds in single tokens.",
            "does_not_show": (
                "Not a segmentation benchmark: one linear layer, one class a patch (see own_majority), a "
                "sample of patches, at the network's input size and crop."
            ),
        }

    def rows(self, rows: Sequence[Row]) -> Sequence[Row]:
        return [row for row in rows if row.site in ("embed", "out")]

    def measure(self, layer: Layer) -> Mapping[str, Tensor]:
        """(B, patches, C): the tokens at the chosen places of the grid."""
        places = torch.from_numpy(sampled(layer.grid, self.tokens)).to(layer.tokens.device)
        return {VALUE: layer.tokens.index_select(1, places).float()}

    def summarize(self, traces: Traces) -> xr.Dataset:
        if traces.train is None or not len(traces.train) or traces.mask is None or traces.train.mask is None:
            raise DoesNotApply("there is no train split with masks to train a probe on")
        places = [
            p for p, row in enumerate(traces.rows) if row in self.rows(traces.rows) and _there(traces, p)
        ]
        if not places:
            raise DoesNotApply("no layer of this model has tokens on a grid")
        rows = [traces.rows[p] for p in places]
        grids = list(dict.fromkeys(tuple(row.grid) for row in rows))
        train = patches(traces.train.mask, len(traces.train), self.tokens, grids)
        test = patches(traces.mask, len(traces), self.tokens, grids)
        if test.largest < 0 or train.largest < 0:
            raise DoesNotApply("no sampled patch of the masks has a pixel with a class")
        classes = 1 + max(train.largest, test.largest)
        tallies, common, own, probes = [], [], [], []
        for row, place in zip(rows, places, strict=True):
            grid = tuple(row.grid)
            targets, histogram = train.majority(grid), test.histogram(grid, classes)
            probe = self._trained(traces, place, targets, classes)
            answers = probe.decide(_tokens(traces, place, targets.shape[1])).reshape(len(traces), -1)
            commonest = np.bincount(targets[targets >= 0]).argmax()
            probes.append(probe)
            tallies.append(tally(histogram, answers))
            common.append(tally(histogram, np.full_like(answers, commonest)).sum(0))
            own.append(tally(histogram, np.maximum(test.majority(grid), 0)).sum(0))
        variables: dict[str, xr.Variable] = {}
        for name, score in ((self.name, mean_iou), (f"{self.name}_accuracy", pixel_accuracy)):
            ends = np.array([resampled(t, score, traces.seed) for t in tallies]).T
            variables |= numbers(name, [score(t.sum(0)) for t in tallies], *ends, "%")
            suffix = name.removeprefix(self.name)
            variables[f"chance{suffix}"] = baseline(score(np.stack(common)), len(rows))
            variables[f"own_majority{suffix}"] = baseline(score(np.stack(own)), len(rows))
        each = 100 * iou(np.stack([t.sum(0) for t in tallies]))
        by_image = np.stack([pixel_accuracy(t) for t in tallies]).astype(np.float32)
        variables |= {
            "iou": xr.Variable(
                ("layer", "class"),
                each,
                {
                    "units": "%",
                    "role": "mean",
                    "long_name": "IoU of each class",
                    "picture": "dots",
                    "picture_line": self.name,
                },
            ),
            "image_accuracy": xr.Variable(("layer", "image"), by_image, {"units": "%", "role": "image"}),
            **chosen(Heads(rows, places, probes)),
        }
        return dataset(
            self,
            traces,
            rows,
            variables,
            result_attributes(self, traces)["interval"],
            {"image": image_coordinate(traces), "class": xr.Variable(("class",), np.arange(classes))},
            patches=self.tokens,
            train_classes=max(len(probe.known) for probe in probes),
        )

    def _trained(self, traces: Traces, place: int, targets: np.ndarray, classes: int) -> Probe:
        """A classifier of the train split's tokens at a row, but of patches without a labelled pixel."""
        kept = targets.ravel() >= 0
        image = np.repeat(np.arange(len(traces.train)), targets.shape[1])
        tokens = _tokens(traces.train, place, targets.shape[1])[kept]
        labels = targets.ravel()[kept]
        options = {"seed": traces.seed, "groups": image[kept], "device": traces.device}
        return fit_many([tokens], labels, classes, self.recipe, **options)[0]


def _there(traces: Traces, place: int) -> bool:
    """Whether a row has tokens at all."""
    return not np.isnan(traces.train[VALUE][0, place, 0, 0])


def _tokens(traces: Traces, place: int, count: int) -> np.ndarray:
    """(images * count, C) tokens of a row: its own width and patches, without the padding of wider rows."""
    values = np.asarray(traces[VALUE][:, place, :count])
    width = int((~np.isnan(values[0, 0])).sum())
    tokens = values[..., :width].reshape(-1, width)
    if not np.isfinite(tokens).all():
        raise MetricError(f"the tokens at '{traces.rows[place].label}' hold NaN or infinity")
    return tokens
