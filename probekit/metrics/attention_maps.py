"""Attention of three places in a few images, as pictures (Park et al., ICLR 2023, Fig. 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from probekit.errors import DoesNotApply, UsageError
from probekit.metric import Metric, Row, Traces
from probekit.metrics.choosing import evenly
from probekit.metrics.depth import depth_curve, image_coordinate
from probekit.summaries import layer_coordinates, result_attributes

if TYPE_CHECKING:
    from probekit.anatomy import WindowGroup
    from probekit.layer import Layer

QUERIES = ("centre", "corner", "third")


class AttentionMaps(Metric):
    """Attention of three queries over the image, head by head, and attention rollout.

    attention_maps: a[query, key] among patch tokens, rows renormalised, each key at its place in the image: a
        window's keys where the window was before any shift; NaN where the query can't look.
    rollout: (Abnar and Zuidema, ACL 2020) R_l = A_l R_(l-1), A = (mean over heads + I) / 2, all tokens; the
        row of the first prefix token (the class token where there is one), or the mean of the patches' rows
        without any, over the patch keys. Only where all layers of the model's first part are global, on one
        grid, and none attends to padding.

    Queries: the middle token, the upper left one, and the one at the shares `row` and `col` of height and
    width.

    images: how many, spread over the dataset
    """

    name = "attention_maps"
    version = 2
    needs = frozenset({"attention", "attention_full"})
    dims: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention_maps": ("head", "query", "key_row", "key_col"),
        "attention_mean": ("from", "to"),
    }
    units: ClassVar[Mapping[str, str]] = {"attention_maps": "1", "attention_mean": "1"}
    figure = "Fig. 2"
    windows = "own"
    holes = True
    conventions = {
        "definition": "cl-vs-mim, self_attention_analysis.ipynb; rollout: Abnar and Zuidema 2020",
        "prefix": "attention_maps: dropped from queries and keys; rollout: kept",
        "renormalised": True,
        "rollout": (
            "residual 1/2, heads averaged; row of the first prefix token (the class token where there is "
            "one), without any the mean of the patches' rows; not renormalised over the patches"
        ),
        "curve": "largest weight of a map, mean over images, heads and queries",
        "reading": "The same picture for all queries: attention depends on the image, not on the place.",
        "does_not_show": "A few images and places. Where attention goes isn't what the output depends on.",
    }

    def __init__(self, images: int = 4, row: float = 0.25, col: float = 0.75):
        super().__init__(images=images, row=row, col=col)
        if images < 1:
            raise UsageError(f"images is 1 or more, not {images}")
        if not (0 <= row < 1 and 0 <= col < 1):
            raise UsageError(f"row and col are shares of height and width, 0 to below 1, not {row} and {col}")
        self.images, self.third = images, (row, col)

    def sample(self, count: int, labels: Sequence[int] | None) -> Sequence[int] | None:
        return evenly(count, self.images)

    def measure(self, layer: Layer) -> Mapping[str, Tensor]:
        """(B, H, 3, rows, columns) and the mean over heads of all tokens' attention, (B, T, T): (B, 0, 0) of
        windows, and beside padding."""
        try:
            mean = layer.attention_full.mean(1)
        except DoesNotApply:
            mean = torch.empty(layer.batch, 0, 0)
        return {"attention_maps": self._maps(layer), "attention_mean": mean}

    def describe(self, layer: Layer) -> Mapping[str, np.ndarray]:
        """Where the rows and columns of keys are, px: as many as this layer's maps have."""
        return dict(zip(("key_row", "key_col"), _key_axes(_views(layer)), strict=True))

    def _maps(self, layer: Layer) -> Tensor:
        views = _views(layer)
        rows, cols = _key_axes(views)
        queries = self.places(*layer.grid)
        maps = None
        for view, group in views:
            keys = np.searchsorted(rows, group.key_positions[..., 0].round(6)) * len(cols)
            keys += np.searchsorted(cols, group.key_positions[..., 1].round(6))
            for query, (row, col) in enumerate(queries):
                for number, place in np.argwhere(group.tokens == row * layer.grid[1] + col):
                    weights = view.unfold(view.attention)[:, number, :, place]
                    if maps is None:
                        shape = (*weights.shape[:2], len(QUERIES), len(rows) * len(cols))
                        maps = weights.new_full(shape, torch.nan)
                    maps[:, :, query, torch.from_numpy(keys[number]).to(maps.device)] = weights
        return maps.unflatten(-1, (len(rows), len(cols)))

    def places(self, rows: int, cols: int) -> list[tuple[int, int]]:
        """Row and column of each query's token on a grid."""
        third = int(self.third[0] * rows), int(self.third[1] * cols)
        return [(rows // 2, cols // 2), (0, 0), third]

    def summarize(self, traces: Traces) -> xr.Dataset:
        """`attention_maps` (layer, image, head, query, key_row, key_col); `query_row` and `query_col`
        (layer, query), where the queries are; `rollout` (layer, image, key_row, key_col) where it exists.
        """
        maps = np.moveaxis(np.asarray(traces["attention_maps"]), 1, 0)
        with np.errstate(invalid="ignore"):
            peaks = np.fmax.reduce(maps.reshape(*maps.shape[:4], -1), axis=-1)
        curve = np.array([_mean(row) for row in peaks])
        picture = {"units": "1", "role": "picture", "picture": "maps"}
        shown = {
            "long_name": "attention of single queries, head by head",
            "picture_rows": "query",
            "picture_columns": "head",
            "picture_mark": "query_row query_col",
        }
        dims = ("layer", "image", "head", "query", "key_row", "key_col")
        where = np.array([self.places(*row.grid) for row in traces.rows])
        variables = {
            self.name: xr.Variable(dims, maps, picture | shown),
            **depth_curve(
                self.name, curve, units="1", reduced="largest weight", long_name="largest weight of a query"
            ),
            "query_row": xr.Variable(("layer", "query"), where[..., 0]),
            "query_col": xr.Variable(("layer", "query"), where[..., 1]),
        }
        rolled = {
            "long_name": "attention rollout",
            "picture_rows": "image",
            "picture_columns": "layer",
        }
        rollout = _rollout(traces)
        if rollout is not None:
            full = np.full((*maps.shape[:2], *maps.shape[4:]), np.nan)
            full[: len(rollout), :, : rollout.shape[2], : rollout.shape[3]] = rollout
            variables["rollout"] = xr.Variable(("layer", "image", *dims[4:]), full, picture | rolled)
        coordinates = {
            **layer_coordinates(traces.rows),
            "query": xr.Variable(("query",), np.array(QUERIES)),
            "image": image_coordinate(traces),
        }
        for axis in ("key_row", "key_col"):
            if axis in traces.constants:
                places = np.asarray(traces.constants[axis])
                coordinates[f"{axis}_by_layer"] = xr.Variable(("layer", axis), places, {"units": "px"})
        return xr.Dataset(variables, coordinates, {**result_attributes(self, traces), "interval": "none"})


def _views(layer: Layer) -> list[tuple[Layer, WindowGroup]]:
    return [(view, view.group or layer.info.groups[0]) for view in layer.windows()]


def _key_axes(views: Sequence[tuple[Layer, WindowGroup]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns that have a key, px."""
    places = np.concatenate([group.key_positions.reshape(-1, 2) for _, group in views])
    # to a millionth of a pixel: equal centres may differ in the last bit
    rows, cols = (np.unique(axis.round(6)) for axis in places.T)
    return rows, cols


def rollout(maps: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Attention rollout to each layer of maps (..., T, T) averaged over heads, rows summing to 1."""
    found: list[np.ndarray] = []
    for one in maps:
        mixed = 0.5 * (one + np.eye(one.shape[-1]))
        mixed = mixed / mixed.sum(-1, keepdims=True)
        found.append(mixed @ found[-1] if found else mixed)
    return found


def _rollout(traces: Traces) -> np.ndarray | None:
    """(layers of the first part, images, rows, columns); None where it isn't defined."""
    rows: list[Row] = [row for row in traces.rows if row.part == traces.rows[0].part]
    (height, width), maps = rows[0].grid, []
    for number, row in enumerate(rows):
        mean = np.asarray(traces["attention_mean"][:, number], dtype=np.float64)
        there = ~np.isnan(mean[0]) if mean.size else np.zeros((0, 0), bool)
        count = int(there.any(1).sum())
        square = count == int(there.any(0).sum()) and count >= height * width
        if not square or row.grid != (height, width) or (maps and count != maps[0].shape[-1]):
            return None
        maps.append(mean[:, :count, :count])
    prefix = maps[0].shape[-1] - height * width
    found = [one[:, 0] if prefix else one.mean(1) for one in rollout(maps)]
    return np.stack(found)[..., prefix:].reshape(len(rows), -1, height, width)


def _mean(values: np.ndarray) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean(dtype=np.float64)) if present.size else np.nan
