"""How well a linear classifier reads the classes out of each layer (Park et al., ICLR 2023, Fig. 11)."""

from __future__ import annotations

import numpy as np
import xarray as xr

from probekit.metric import Traces
from probekit.metrics.depth import image_coordinate
from probekit.metrics.readout import (
    WILSON,
    Readout,
    baseline,
    best_constant,
    chosen,
    class_names,
    dataset,
    share,
)


class LinearProbe(Readout):
    """Top-1 and top-5 accuracy of a probe trained on the train split, per token site.

    Images whose class has no training image are counted as wrong. `chance` is the share of the commonest
    class (the best constant answer), `chance_top5` of the five commonest. Top-5 of five or fewer classes is
    always right, so it is NaN.
    """

    name = "linear_probe"
    units = {"linear_probe": "%", "linear_probe_top5": "%"}
    figure = "Fig. 11"

    def __init__(self, **shared):
        super().__init__(**shared)
        self.conventions |= {
            "definition": "Park et al. 2023, Fig. 11",
            "reading": "The higher, the more of the classes a linear classifier finds in this layer.",
            "does_not_show": (
                "Not what the network itself uses. Accuracies of probes trained another way, or on other "
                "images, are other numbers."
            ),
        }

    def summarize(self, traces: Traces) -> xr.Dataset:
        heads = self.heads(traces)
        labels = np.asarray(traces.labels)
        ranks = heads.ranks(traces, labels)
        right, many = ranks == 0, len(heads.known) > 5
        top5 = (ranks < 5).sum(1) if many else np.full(len(ranks), np.nan)
        names = class_names(traces)
        count, n = len(heads.rows), len(labels)
        chance5 = best_constant(labels, heads.known, 5) if many else np.nan
        variables = {
            **share("linear_probe", right.sum(1), n),
            **share("linear_probe_top5", top5, n),
            "chance": baseline(best_constant(labels, heads.known), count),
            "chance_top5": baseline(chance5, count),
            "correct": xr.Variable(("layer", "image"), right.astype(np.int8)),
            "train_images": xr.Variable(("class",), np.bincount(traces.train.labels, minlength=len(names))),
            **chosen(heads),
        }
        return dataset(
            self,
            traces,
            heads.rows,
            variables,
            WILSON.format(over="test images"),
            {"image": image_coordinate(traces), "class": xr.Variable(("class",), names)},
            train_classes=len(heads.known),
            unknown=int((~np.isin(labels, heads.known)).sum()),
        )
