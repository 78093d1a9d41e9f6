"""The scores of a model's own classifier, for metrics of what it decides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import xarray as xr
from torch import Tensor

from probekit.metric import Metric, Traces
from probekit.metrics.depth import depth_curve
from probekit.summaries import layer_coordinates, result_attributes, summary

if TYPE_CHECKING:
    from probekit.layer import Layer


class ClassScores(Metric):
    """Log-probabilities of the classes, (image, class): the log-softmax of what the model returns.

    The curve is the probability of the class it chooses, its confidence. Only for models that end in a
    classifier: a backbone without one returns features, and log-softmax of those says nothing.
    """

    name = "class_scores"
    needs = frozenset({"output"})
    dims: ClassVar[Mapping[str, tuple[str, ...]]] = {"class_scores": ("class",)}
    units: ClassVar[Mapping[str, str]] = {"class_scores": "nats"}
    conventions: ClassVar[Mapping[str, object]] = {
        "definition": "log-softmax of the model's output",
        "log": "natural",
        "curve": "probability of the most probable class",
        "reading": "How sure the model's own classifier is.",
        "does_not_show": "Whether it is right, and nothing at all for a backbone that returns features.",
    }

    def measure(self, layer: Layer) -> Mapping[str, Tensor]:
        """(B, K) nats."""
        return {"class_scores": layer.output.log_softmax(-1)}

    def summarize(self, traces: Traces) -> xr.Dataset:
        """`class_scores` (layer, class), means over images, and the confidence as its curve (layer)."""
        values = np.asarray(traces["class_scores"], dtype=np.float64)
        curve = summary(np.exp(values.max(-1)), traces.seed)
        variables = {
            "class_scores": (("layer", "class"), values.mean(0), {"units": "nats", "role": "mean"}),
            **depth_curve(
                self.name,
                curve["mean"],
                curve["low"],
                curve["high"],
                units="1",
                reduced="probability of the most probable class",
                long_name="probability of the most probable class",
            ),
        }
        return xr.Dataset(variables, layer_coordinates(traces.rows), result_attributes(self, traces))
