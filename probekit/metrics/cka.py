"""How alike two layers, or two models, arrange the same images (Kornblith et al., ICML 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import xarray as xr

from probekit.errors import DoesNotApply
from probekit.metric import Metric, Row, Traces
from probekit.metrics.depth import depth_curve, last_layer
from probekit.metrics.pooled import POOLED, between_layers, pooled, source
from probekit.summaries import layer_coordinates, result_attributes

LEAST = 4
"""Images the unbiased estimator needs."""

_VALUES = 2**23  # features converted to float64 at once (64 MB)

_CONSTANT = float(np.finfo(np.float32).eps) ** 2
"""Share of its second moment below which a site's variance is rounding of float32 features."""


class CKA(Metric):
    """Debiased linear CKA of the pooled features X (n, C) and Y (n, C') at two sites:

        CKA(X, Y) = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)),  K = X X^T, L = Y Y^T
        HSIC(K, L) = (tr(K~ L~) + sum K~ sum L~ / ((n - 1)(n - 2)) - 2 / (n - 2) 1^T K~ L~ 1) / (n (n - 3))

    with K~ the matrix K with a zero diagonal: the unbiased estimator of Song et al. (JMLR 2012), as in Nguyen
    et al. (ICLR 2021). 1: the same up to rotation and scale; about 0, below it too: unrelated. The biased
    estimate grows with C / n and is 1 for unrelated features of C >> n channels.

    No n x n matrix is made. The estimator doesn't change when X is centred, and then K has row sums 0; with
    d_i = ||x_i||^2 and e_i = ||y_i||^2, both centred,

        tr(K~ L~) = ||X^T Y||^2 - d.e,  sum K~ = -sum d,  1^T K~ L~ 1 = d.e

    pool: ``mean`` of the patch tokens; ``cls``, the first prefix token (the class token where there is one)
    """

    name = "cka"
    others = True
    units: ClassVar = {"cka": "1"}

    def __init__(self, pool: str = "mean"):
        super().__init__(pool=pool)
        self.source = source(pool)
        self.conventions = {
            "definition": "Kornblith et al. 2019; unbiased HSIC of Song et al. 2012, as Nguyen et al. 2021",
            "features": POOLED[pool],
            "kernel": "linear",
            "zero_by_zero": "NaN: features that are the same for all images",
            "curve": "each layer with the last one",
            "reading": "1: two layers arrange the images the same way, up to rotation and scale.",
            "does_not_show": (
                "Directions of large variance decide: layers that differ in small ones are alike. Alike "
                "doesn't mean that a classifier can read the same."
            ),
        }

    def summarize(self, traces: Traces) -> xr.Dataset:
        """`cka` (layer, other_layer), rows before, between and after layers. With other models of the run,
        `cka_with` (model, layer, model_layer): NaN past a model's last row, whose labels are `cka_with_layer`
        (model, model_layer), and depths `model_depth`; `cka_with_images` (model), how many images both have,
        matched by id: below 4, all is NaN.

        Raises `DoesNotApply` below 4 images.
        """
        if len(traces) < LEAST:
            raise DoesNotApply(f"{len(traces)} images: the unbiased estimator needs {LEAST}")
        own, rows = _sites(traces), [traces.rows[row] for row in between_layers(traces)]
        matrix = cka(own, own)
        curve = matrix[:, last_layer(rows)]
        variables = {
            self.name: xr.Variable(
                ("layer", "other_layer"),
                matrix,
                {"units": "1", "role": "mean", "picture": "matrix", "long_name": "CKA between layers"},
            ),
            **depth_curve(
                self.name,
                curve,
                units="1",
                reduced="with the last layer",
                long_name="CKA with the last layer",
            ),
        }
        coordinates = {
            **layer_coordinates(rows),
            "other_layer": xr.Variable(("other_layer",), _labels(rows)),
            "other_depth": xr.Variable(("other_layer",), np.array([row.depth for row in rows])),
        }
        if traces.others:
            between, names, depths = self._with_others(traces, own)
            variables |= between
            coordinates |= {"model": xr.Variable(("model",), names), "model_depth": depths}
        attrs = {**result_attributes(self, traces), "interval": "none"}
        return xr.Dataset(variables, coordinates, attrs)

    def _with_others(
        self, traces: Traces, own: Sequence[np.ndarray]
    ) -> tuple[dict[str, xr.Variable], np.ndarray, xr.Variable]:
        """The variables of `cka_with`, the models' names, and their rows' depths."""
        theirs = {name: between_layers(other) for name, other in traces.others.items()}
        longest = max(map(len, theirs.values()))
        values = np.full((len(theirs), len(own), longest), np.nan)
        labels = np.full((len(theirs), longest), "", dtype=object)
        depths = np.full((len(theirs), longest), np.nan)
        common = np.zeros(len(theirs), dtype=np.int64)
        for number, (name, other) in enumerate(traces.others.items()):
            rows = theirs[name]
            labels[number, : len(rows)] = [other.rows[row].label for row in rows]
            depths[number, : len(rows)] = [other.rows[row].depth for row in rows]
            places = {image: place for place, image in enumerate(other.images)}
            pairs = [(i, places[image]) for i, image in enumerate(traces.images) if image in places]
            common[number] = len(pairs)
            if len(pairs) >= LEAST:
                mine, other_places = (list(side) for side in zip(*pairs, strict=True))
                values[number, :, : len(rows)] = cka(
                    [features[mine] for features in own],
                    [features[other_places] for features in _sites(other)],
                )
        variables = {
            "cka_with": xr.Variable(
                ("model", "layer", "model_layer"),
                values,
                {"units": "1", "picture": "matrix", "long_name": "CKA with layers of other models"},
            ),
            "cka_with_layer": xr.Variable(("model", "model_layer"), labels.astype(np.str_)),
            "cka_with_images": xr.Variable(("model",), common),
        }
        names = np.array(list(theirs), dtype=np.str_)
        return variables, names, xr.Variable(("model", "model_layer"), depths)


def cka(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> np.ndarray:
    """Debiased linear CKA of every X (n, C) of `a` with every Y (n, C') of `b`, (len(a), len(b)).

    n is at least 4. NaN where X or Y is the same for all images. float64; n C C' multiplications a pair, half
    the pairs where `b` is `a`.
    """
    xs = [Centred(features) for features in a]
    ys = xs if b is a else [Centred(features) for features in b]
    between = np.empty((len(xs), len(ys)))
    for i, x in enumerate(xs):
        for j, y in enumerate(ys):
            between[i, j] = between[j, i] if ys is xs and j < i else hsic(x, y)
    own = (
        [np.diagonal(between), np.diagonal(between)]
        if ys is xs
        else [[hsic(x, x) for x in s] for s in (xs, ys)]
    )
    # an estimate of 0 or below has no square root: no similarity is defined
    x_size, y_size = (np.sqrt(np.where(np.asarray(side) > 0, side, np.nan)) for side in own)
    return between / x_size[:, None] / y_size


class Centred:
    """Features (n, C) less their mean, converted to float64 a few rows at a time.

    squares: (n,) each row's squared length; NaN where the features don't differ between images
    """

    def __init__(self, features: np.ndarray):
        self.features, self.mean = features, features.mean(0, dtype=np.float64)
        self.squares = np.concatenate([np.square(self.part(rows)).sum(1) for rows in _cut(self, self)])
        variance = self.squares.mean()
        if variance <= _CONSTANT * (variance + np.square(self.mean).sum()):
            self.squares[:] = np.nan

    def part(self, rows: slice) -> np.ndarray:
        return self.features[rows] - self.mean


def hsic(x: Centred, y: Centred) -> float:
    """The unbiased estimate of Song et al. 2012, eq. 5, for linear kernels."""
    n = len(x.features)
    cross = np.zeros((x.features.shape[1], y.features.shape[1]))
    for rows in _cut(x, y):
        cross += x.part(rows).T @ y.part(rows)
    shared = x.squares @ y.squares
    sums = x.squares.sum() * y.squares.sum() / ((n - 1) * (n - 2))
    return float((np.square(cross).sum() - shared + sums - 2 / (n - 2) * shared) / (n * (n - 3)))


def _cut(x: Centred, y: Centred) -> list[slice]:
    height = max(1, _VALUES // (x.features.shape[1] + y.features.shape[1]))
    return [slice(start, start + height) for start in range(0, len(x.features), height)]


def _sites(traces: Traces) -> list[np.ndarray]:
    return [pooled(traces, row) for row in between_layers(traces)]


def _labels(rows: Sequence[Row]) -> np.ndarray:
    return np.array([row.label for row in rows], dtype=np.str_)
