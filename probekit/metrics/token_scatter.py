"""Pictures of tokens before and after attention, in three directions (Park et al. 2023, Fig. 6, E.3a)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
import torch
import xarray as xr
from scipy.linalg import eigh
from torch import Tensor

from probekit.errors import UsageError
from probekit.metric import Metric, Traces
from probekit.metrics.choosing import evenly
from probekit.metrics.depth import depth_curve, image_coordinate
from probekit.metrics.token_translation import translation
from probekit.summaries import layer_coordinates, result_attributes

if TYPE_CHECKING:
    from probekit.layer import Layer

AXES = 3


class Scatter(NamedTuple):
    """Tokens of several images in the joint basis of all of them, before and after.

    before, after: (images, N, 3)
    share:         (3,) of the variance that each axis holds
    basis:         (3, C)
    """

    before: np.ndarray
    after: np.ndarray
    share: np.ndarray
    basis: np.ndarray


class TokenScatter(Metric):
    """Patch tokens of a few images before and after attention, along the 3 directions they vary most in.

    Per layer, the tokens of all these images, before and after, are stacked, their joint mean subtracted, and
    projected on the first three right singular vectors (sign: the coefficient of largest size is positive).
    So the points of one layer share axes, and those of different layers don't.

    The tokens themselves are the trace: images * N * C * 8 bytes a layer.

    images: how many, spread over the dataset
    """

    name = "token_scatter"
    needs = frozenset({"tokens_in", "tokens_mid"})
    dims: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "tokens_before": ("token", "channel"),
        "tokens_after": ("token", "channel"),
    }
    units: ClassVar[Mapping[str, str]] = {"tokens_before": "1", "tokens_after": "1"}
    figure = "Fig. 6"
    windows = "own"
    conventions = {
        "definition": "Park et al. 2023, Fig. 6, in words only: the joint basis and centring are ours",
        "prefix": "dropped",
        "basis": "of all images, before and after, joint mean subtracted; per layer",
        "sign": "the coefficient of largest size is positive",
        "token_scatter": "the translation ratio of these images; of all images: token_translation",
        "reading": "Two clouds of the same shape side by side: attention only translates the tokens.",
        "does_not_show": "A few images, and what three directions hold of their tokens' variance.",
    }

    def __init__(self, images: int = 2):
        super().__init__(images=images)
        if images < 1:
            raise UsageError(f"images is 1 or more, not {images}")
        self.images = images

    def sample(self, count: int, labels: Sequence[int] | None) -> Sequence[int] | None:
        return evenly(count, self.images)

    def measure(self, layer: Layer) -> Mapping[str, Tensor]:
        """(B, N, C) twice."""
        return {"tokens_before": layer.tokens_in, "tokens_after": layer.tokens_mid}

    def summarize(self, traces: Traces) -> xr.Dataset:
        """`before` and `after` (layer, image, token, axis3), NaN past a layer's tokens; `centre_before` and
        `centre_after` (layer, image, axis3); `explained` (layer, axis3); `translation_ratio` (layer, image)
        and its mean over these images, `token_scatter` (layer)."""
        layers, images = len(traces.rows), len(traces)
        tokens = traces["tokens_before"].shape[2]
        points = np.full((2, layers, images, tokens, AXES), np.nan)
        centres = np.full((2, layers, images, AXES), np.nan)
        share, ratio = np.full((layers, AXES), np.nan), np.full((layers, images), np.nan)
        for row in range(layers):
            before, after = (_present(traces[f"tokens_{end}"][:, row]) for end in ("before", "after"))
            if not before.size:  # the metric doesn't apply to this layer
                continue
            found = scatter(before, after)
            axes = len(found.share)
            for end, places in enumerate((found.before, found.after)):
                points[end, row, :, : places.shape[1], :axes] = places
                centres[end, row, :, :axes] = places.mean(1)
            share[row, :axes] = found.share
            ratio[row] = translation(torch.from_numpy(after - before)).numpy()
        variables = {
            self.name: xr.Variable(("layer",), ratio.mean(1), {"units": "1", "role": "mean"}),
            "translation_ratio": xr.Variable(("layer", "image"), ratio, {"units": "1", "role": "per image"}),
            "explained": xr.Variable(("layer", "axis3"), share, {"units": "1", "role": "mean"}),
            **depth_curve(self.name, ratio.mean(1), units="1", long_name="translation ratio"),
        }
        for end, name in enumerate(("before", "after")):
            picture = {"units": "1", "role": "picture"}
            drawn = {
                "long_name": "patch tokens before and after attention",
                "picture": "points",
                "picture_with": "after",
                "picture_share": "explained",
            }
            attrs = picture | drawn if name == "before" else picture
            variables[name] = xr.Variable(("layer", "image", "token", "axis3"), points[end], attrs)
            variables[f"centre_{name}"] = xr.Variable(("layer", "image", "axis3"), centres[end], picture)
        coordinates = {
            **layer_coordinates(traces.rows),
            "image": image_coordinate(traces),
        }
        return xr.Dataset(variables, coordinates, {**result_attributes(self, traces), "interval": "none"})


def scatter(before: np.ndarray, after: np.ndarray) -> Scatter:
    """Both (images, N, C), projected on the directions of largest variance of all of them together; float64.

    `share` is 0 where nothing varies. With fewer than 3 channels there are fewer axes.
    """
    stacked = np.stack([before, after]).astype(np.float64)
    centred = stacked - stacked.mean((0, 1, 2))
    flat = centred.reshape(-1, centred.shape[-1])
    channels = flat.shape[1]
    axes = min(AXES, channels)
    variances, vectors = eigh(flat.T @ flat, subset_by_index=(channels - axes, channels - 1))
    basis = vectors.T[::-1]
    largest = np.take_along_axis(basis, np.abs(basis).argmax(1)[:, None], 1)
    basis = basis * np.where(largest < 0, -1.0, 1.0)
    total = np.square(flat).sum()
    share = variances[::-1].clip(0) / total if total > 0 else np.zeros(axes)
    first, second = centred @ basis.T
    return Scatter(first, second, share, basis)


def _present(tokens: np.ndarray) -> np.ndarray:
    """(images, token, channel) without what only other layers have, float64."""
    there = ~np.isnan(tokens[0])
    return tokens[:, there.any(1)][:, :, there.any(0)].astype(np.float64)
