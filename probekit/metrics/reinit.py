"""Accuracy lost when first or last blocks are new (Park et al., ICLR 2023, Fig. F.3), without training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from probekit.errors import DoesNotApply, MetricError, UsageError
from probekit.metric import Traces, Variation
from probekit.metrics.depth import image_coordinate
from probekit.metrics.readout import (
    Readout,
    baseline,
    best_constant,
    chosen,
    dataset,
    numbers,
    share,
)
from probekit.summaries import bootstrap_interval, result_attributes

if TYPE_CHECKING:
    from torch import nn

    from probekit.anatomy import Anatomy

_POINTS = "percentage points"
_DIRECTIONS = ("first", "last")


@dataclass(frozen=True)
class FreshBlocks:
    """Give the first (or last) `count` blocks of the encoder the weights of a newly built model.

    Called as a `Variation`'s model. Raises `DoesNotApply` where the encoder has fewer blocks.
    """

    count: int
    last: bool

    def __call__(self, module: nn.Module, build: Callable[[], nn.Module], anatomy: Anatomy) -> None:
        blocks = encoder_blocks(anatomy)
        if self.count > len(blocks):
            raise DoesNotApply(f"the encoder has {len(blocks)} blocks, not {self.count}")
        fresh = build()
        for path in blocks[-self.count :] if self.last else blocks[: self.count]:
            module.get_submodule(path).load_state_dict(fresh.get_submodule(path).state_dict())


def encoder_blocks(anatomy: Anatomy) -> list[str]:
    """The paths of the encoder's blocks in order.

    A block is the shortest prefix of its attention module's path that no other layer's path starts with:
    ``blocks.3`` of ``blocks.3.attn``.
    """
    paths = [layer.name.split(".") for layer in anatomy.layers]
    found = []
    for number, (layer, path) in enumerate(zip(anatomy.layers, paths, strict=True)):
        if layer.part != "encoder":
            continue
        others = [other for i, other in enumerate(paths) if i != number]
        length = next(
            (n for n in range(1, len(path)) if all(other[:n] != path[:n] for other in others)), len(path)
        )
        found.append(".".join(path[:length]))
    return found


class Reinit(Readout):
    """Last-layer probe accuracy before minus after blocks get fresh weights, in percentage points.

    `reinit` at layer l: blocks up to l, counted from the input, are new. `reinit_last` at layer l: blocks
    from l to the end are. A probe is trained anew on the features of each changed model; nothing else is. The
    proxy for the paper's figure, where the changed model is fine-tuned.

    blocks: how many blocks, numbers between dashes; more than the encoder has are left out
    """

    name = "reinit"
    units = {"reinit": _POINTS, "reinit_last": _POINTS, "accuracy_before": "%", "accuracy_after": "%"}
    figure = "Fig. F.3"
    whose = frozenset({"encoder"})

    def __init__(self, blocks: str = "1-2-3-6", **shared):
        super().__init__({"blocks": blocks}, **shared)
        self.counts = _counts(blocks)
        self.conventions |= {
            "definition": "Park et al. 2023, Fig. F.3, with a linear probe in place of fine-tuning",
            "init": "the model's own, one draw [my reading]",
            "changed": "all weights of the blocks; not the embedding, what blocks share, or the decoder",
            "layer": "reinit: the last new block from the input; reinit_last: the first new one",
            "reading": "The higher, the more of what a last-layer probe finds was in the replaced blocks.",
            "does_not_show": (
                "Not what fine-tuning would recover: later blocks see inputs they never saw. One draw of the "
                "weights: the interval is over images."
            ),
        }

    def variations(self) -> Sequence[Variation]:
        """One for each direction and number of blocks, the train split too."""
        return [
            Variation(self._name(direction, count), model=FreshBlocks(count, direction == "last"), train=True)
            for direction in _DIRECTIONS
            for count in self.counts
        ]

    def summarize(self, traces: Traces) -> xr.Dataset:
        heads = self.heads(traces)
        layers = [i for i, row in enumerate(heads.rows) if row.site == "out"]
        counts = [count for count in self.counts if count <= len(layers)]
        if not counts:
            raise DoesNotApply(f"the encoder has {len(layers)} blocks, fewer than {self.counts[0]}")
        before = heads.right(traces, traces.labels)
        after = np.stack(
            [np.stack([self._after(traces, d, c) for c in counts], axis=1) for d in _DIRECTIONS], axis=1
        )  # (row, direction, blocks, image)
        drops = 100.0 * (before[-1].astype(np.float64) - after[-1])
        best = 100.0 * (_best(before).astype(np.float64) - _best(after))
        rows, n = len(heads.rows), len(traces)
        variables = {}
        mean, (low, high) = drops.mean(-1), bootstrap_interval(np.moveaxis(drops, -1, 0), traces.seed)
        for d, direction in enumerate(_DIRECTIONS):
            columns = np.full((3, rows), np.nan)
            for c, count in enumerate(counts):
                place = layers[-count] if direction == "last" else layers[count - 1]
                columns[:, place] = mean[d, c], low[d, c], high[d, c]
            variables |= numbers("reinit" if direction == "first" else "reinit_last", *columns, _POINTS)
        axes = ("direction", "blocks")
        variables |= numbers("drop", mean, low, high, _POINTS, axes)
        ends = bootstrap_interval(np.moveaxis(best, -1, 0), traces.seed)
        variables |= numbers("best_drop", best.mean(-1), *ends, _POINTS, axes)
        floor = best_constant(traces.labels, heads.known)
        variables |= {
            **share("accuracy_before", before.sum(1), n),
            **share("accuracy_after", after.sum(-1), n, ("layer", *axes)),
            "drop_to_chance": baseline(100 * before[-1].mean() - floor, rows, _POINTS),
            "correct": xr.Variable(("layer", "image"), before.astype(np.int8)),
            **chosen(heads),
        }
        coordinates = {
            "image": image_coordinate(traces),
            "direction": xr.Variable(("direction",), np.array(_DIRECTIONS, dtype=np.str_)),
            "blocks": xr.Variable(("blocks",), np.array(counts)),
        }
        interval = result_attributes(self, traces)["interval"] + ", paired"
        known = len(heads.known)
        return dataset(
            self, traces, heads.rows, variables, interval, coordinates, chance=floor, train_classes=known
        )

    def _after(self, traces: Traces, direction: str, count: int) -> np.ndarray:
        """Which images the changed model's probes get right, (rows, images) bool."""
        name = self._name(direction, count)
        changed = traces.variations.get(name)
        if changed is None or changed.train is None:
            raise MetricError(f"the images were not measured under '{name}'")
        train = replace(changed.train, labels=traces.train.labels)
        return self.heads(replace(changed, classes=traces.classes, train=train)).right(changed, traces.labels)

    def _name(self, direction: str, count: int) -> str:
        return f"reinit-{direction}-{count}"


def _best(right: np.ndarray) -> np.ndarray:
    """(rows, ..., images) -> (..., images): the row of highest accuracy of each, the first of equals."""
    return np.take_along_axis(right, right.mean(-1).argmax(0)[None, ..., None], 0)[0]


def _counts(text: str) -> list[int]:
    parts = str(text).split("-")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise UsageError(f"blocks is numbers from 1 on between dashes, like '1-2-3-6', not '{text}'")
    return sorted({int(part) for part in parts})
