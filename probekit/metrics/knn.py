"""Weighted kNN accuracy of every layer's features (DINO's protocol, Caron et al., ICCV 2021)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from probekit.attention import exact_float32
from probekit.errors import DoesNotApply, UsageError
from probekit.metric import Metric, Traces
from probekit.metrics.depth import depth_curve, image_coordinate
from probekit.metrics.pooled import POOLED, between_layers, pooled, source
from probekit.metrics.readout import wilson
from probekit.summaries import layer_coordinates, result_attributes

NEIGHBOURS = (10, 20, 100, 200)
TEMPERATURE = 0.07

_PAIRS = 2**24  # similarities at once (64 MB)


class KNN(Metric):
    """Top-1 accuracy of a vote of the k nearest train images, in percent.

        s_j = cosine of the test image's features and train image j's
        votes(class) = sum over the k largest s_j of that class of exp(s_j / 0.07)

    Nothing is trained and nothing is tuned. Features are divided by their length, not centred or otherwise
    normalised. Interval: Wilson's score interval, 95 %, over test images.

    k: of the value `knn`; 10, 20, 100 and 200 are in `knn_by_k` too. Never more than there are train images.
    pool: ``mean`` of the patch tokens; ``cls``, the first prefix token (the class token where there is one)
    """

    name = "knn"
    requires = frozenset({"labels", "train"})
    units: ClassVar = {"knn": "%"}

    def __init__(self, k: int = 20, pool: str = "mean"):
        super().__init__(k=k, pool=pool)
        if k < 1:
            raise UsageError(f"k is 1 or more, not {k}")
        self.k, self.source = k, source(pool)
        self.conventions = {
            "definition": "weighted kNN of Caron et al. 2021 (DINO), eval_knn.py",
            "features": POOLED[pool],
            "normalised": "each image's features to length 1; no centring, no final norm of the model",
            "similarity": "cosine, float32",
            "weights": "exp(similarity / 0.07)",
            "reading": "How far the classes are already apart in a layer, without training a classifier.",
            "does_not_show": (
                "What a trained classifier could read: a few channels of large size decide the cosine. "
                "Depends on the number of train images, which the result states."
            ),
        }

    def summarize(self, traces: Traces) -> xr.Dataset:
        """`knn` (layer), `knn_by_k` (layer, k), both with intervals; `correct` (layer, image), of `knn`. Rows
        are those before, between and after layers.

        Raises `DoesNotApply` without train images.
        """
        train = traces.train
        if train is None or not len(train):
            raise DoesNotApply("there are no train images of the test images' classes")
        main = min(self.k, len(train))
        ks = sorted({main, *(k for k in NEIGHBOURS if k <= len(train))})
        labels, known = (torch.as_tensor(np.asarray(t.labels, dtype=np.int64)) for t in (traces, train))
        rows = between_layers(traces)
        hits = np.stack(
            [
                (predictions(pooled(traces, row), pooled(train, row), known, ks) == labels).numpy()
                for row in rows
            ]
        )
        low, high = wilson(hits.sum(-1), len(traces))
        percent = {"units": "%", "role": "mean"}
        here = ks.index(main)
        variables = {
            self.name: xr.Variable(("layer",), 100 * hits[:, here].mean(-1), percent),
            "knn_by_k": xr.Variable(("layer", "k"), 100 * hits.mean(-1), percent),
            "correct": xr.Variable(("layer", "image"), hits[:, here].astype(np.int8), {"role": "outcome"}),
            **depth_curve(self.name, 100 * hits[:, here].mean(-1), low[:, here], high[:, here], units="%"),
        }
        for end, bounds in (("low", low), ("high", high)):
            attrs = {"units": "%", "role": end}
            variables[f"{self.name}_{end}"] = xr.Variable(("layer",), bounds[:, here], attrs)
            variables[f"knn_by_k_{end}"] = xr.Variable(("layer", "k"), bounds, attrs)
        coordinates = {
            **layer_coordinates([traces.rows[row] for row in rows]),
            "k": xr.Variable(("k",), np.array(ks)),
            "image": image_coordinate(traces),
        }
        attrs = {
            **result_attributes(self, traces),
            "interval": "95 % Wilson score interval over test images",
            "train_images": len(train),
            "k_used": main,
        }
        return xr.Dataset(variables, coordinates, attrs)


def predictions(test: np.ndarray, train: np.ndarray, labels: Tensor, ks: list[int]) -> Tensor:
    """The class of each test image by the votes of its k nearest train images, (len(ks), n) int64.

    test, train: (n, C) and (m, C) float32; labels: (m,), classes 0, 1, ...; ks: ascending, at most m. The
    lower class wins a tie.
    """
    known = _unit(train).T
    classes = int(labels.max()) + 1
    found = torch.empty(len(ks), len(test), dtype=torch.int64)
    height = max(1, _PAIRS // len(train))
    with exact_float32(known.device):
        for start in range(0, len(test), height):
            part = slice(start, start + height)
            near, which = (_unit(test[part]) @ known).topk(ks[-1], dim=1)
            weights, voted = (near.double() / TEMPERATURE).exp(), labels[which]
            votes = torch.zeros(len(near), classes, dtype=torch.float64)
            before = 0
            for number, k in enumerate(ks):
                votes.scatter_add_(1, voted[:, before:k], weights[:, before:k])
                found[number, part], before = votes.argmax(1), k
    return found


def _unit(features: np.ndarray) -> Tensor:
    wide = torch.from_numpy(np.ascontiguousarray(features)).double()
    return torch.nn.functional.normalize(wide, dim=1).float()
