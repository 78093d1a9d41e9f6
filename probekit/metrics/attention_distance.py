"""How far each head looks, in pixels (Park et al., ICLR 2023, Fig. 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from probekit.attention import renormalise as normalised
from probekit.metric import Metric
from probekit.metrics.compat import official, refuse_beside

if TYPE_CHECKING:
    from probekit.layer import Layer


class AttentionDistance(Metric):
    """(1/N) sum over queries q and keys k of a[q, k] D[q, k], D in pixels of the network's input.

    a: attention among patch tokens, prefix dropped; `renormalise` makes its rows sum to 1, as the paper's
       code does. Without it (probing-vits, Dosovitskiy et al., Raghu et al.) a query's distance is lower by
       the share of attention it gives to prefix tokens.
    D: Euclidean distance between token centres; in windowed attention between their true places.

    attention_distance_share is the distance over `uniform`, that of attention which is equal over all keys of
    its window: both are means over the layer's tokens first. So layers of different grids, strides and
    windows are on one scale. 1, as for any uniform attention, where all keys are in one place.

    The published code (``compat=cl-vs-mim``) adds 1e-32 to the patches' attention before it makes rows sum to
    1: that shows only where a query leaves all patches together less than about 1e-27.
    """

    name = "attention_distance"
    version = 2
    needs = frozenset({"attention_stats"})
    dims: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention_distance": ("head",),
        "attention_distance_share": ("head",),
    }
    units: ClassVar[Mapping[str, str]] = {"attention_distance": "px", "attention_distance_share": "1"}
    figure = "Fig. 3"
    windows = "own"  # the share is of the whole layer's uniform distance

    def __init__(self, compat: str = "", renormalise: bool = True):
        super().__init__(compat=compat, renormalise=renormalise)
        self.eps = 1e-32 if official(compat) else 0.0
        refuse_beside(compat, "renormalise", renormalise, True)
        self.renormalise = renormalise
        self.needs = frozenset({"attention_stats" if renormalise and not self.eps else "attention_full"})
        self.conventions = {
            "definition": "Park et al. 2023, Fig. 3"
            if renormalise
            else "probing-vits, Dosovitskiy et al. 2021",
            "prefix": "dropped from queries and keys",
            "renormalised": renormalise,
            "averaging": "keys, then queries; per image and head",
            "eps": self.eps,
            "distance": "Euclidean, token centres, pixels of the network's input",
            "share": "of the layer's uniform attention, within windows",
            "reading": (
                "Near the dotted line a head looks everywhere alike; far below it, at its neighbourhood."
            ),
            "does_not_show": (
                "Not what is looked at, nor whether it depends on the query: a map that is one for all "
                "queries can have any distance."
            ),
        }

    def measure(self, layer: Layer) -> Mapping[str, Tensor]:
        """(B, H) px, and (B, H) of uniform."""
        parts = layer.windows()
        distance = sum(part.unfold(self._distance(part)).mean(1) * part.window_share for part in parts)
        uniform = _uniform(parts)
        share = torch.where(uniform > 0, distance / uniform, 1.0)
        return {"attention_distance": distance.float(), "attention_distance_share": share.float()}

    def describe(self, layer: Layer) -> Mapping[str, float]:
        """`uniform`: the distance of attention that is equal over all keys (of the window), in px;
        `uniform_share` is 1.

        It is not the largest possible; late layers of contrastive models come close to it.
        """
        return {"uniform": float(_uniform(layer.windows())), "uniform_share": 1.0}

    def _distance(self, layer: Layer) -> Tensor:
        if "attention_stats" in self.needs:
            return layer.attention_stats.distance
        a = layer.attention_full[:, :, layer.prefix :, layer.prefix :]
        if self.renormalise:
            a = normalised(a + self.eps)
        return (a * layer.distances).sum(-1).mean(-1)


def _uniform(parts: Sequence[Layer]) -> Tensor:
    """px, the mean over the layer's queries of the mean distance to the keys of their window."""
    return sum(part.distances[: part.window_count].mean() * part.window_share for part in parts)
