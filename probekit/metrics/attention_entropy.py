"""How spread each query's attention is: tells uniform from homogeneous maps, where the NMI can't."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from probekit.metric import Metric

if TYPE_CHECKING:
    from probekit.layer import Layer


class AttentionEntropy(Metric):
    """(1/N) sum over queries q of H(k | q) = -sum_k a[q, k] log a[q, k], in nats, 0 log 0 = 0.

    a: attention among patch tokens, prefix dropped, rows summing to 1.

    It is the second term of the mutual information in Park et al., ICLR 2023, Fig. 4: I = H(k) - H(k | q). An
    NMI of 0 says that all queries see one map; with an entropy near log N that map is uniform, with a lower
    one it is homogeneous: all queries look at the same few tokens.

    attention_entropy_share: each window's entropy over the logarithm of its number of keys; 1 for a single
    key. In windowed attention both are measured within the window and averaged over tokens.
    """

    name = "attention_entropy"
    needs = frozenset({"attention_stats", "distances"})
    dims: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention_entropy": ("head",),
        "attention_entropy_share": ("head",),
    }
    units: ClassVar[Mapping[str, str]] = {"attention_entropy": "nats", "attention_entropy_share": "1"}
    conventions: ClassVar[Mapping[str, object]] = {
        "definition": "mean of H(k | q), a term of the mutual information of Park et al. 2023, Fig. 4",
        "prefix": "dropped from queries and keys",
        "renormalised": True,
        "log": "natural",
        "averaging": "queries; per image and head",
        "share": "of the logarithm of the number of keys of the window; 1 for a single key",
        "reading": (
            "Near the dotted line attention is uniform; 0: every query sees one key. With an NMI near 0 it "
            "says which map all queries share: a uniform one, or few tokens."
        ),
        "does_not_show": (
            "Not where the keys are, nor whether queries see the same ones. Attention to prefix tokens is "
            "left out."
        ),
    }

    def measure(self, layer: Layer) -> Mapping[str, Tensor]:
        """(B, H) each."""
        entropy = layer.attention_stats.conditional_entropy
        most = _most(layer)
        share = entropy / most if most > 0 else torch.ones_like(entropy)
        return {"attention_entropy": entropy.float(), "attention_entropy_share": share.float()}

    def describe(self, layer: Layer) -> Mapping[str, float]:
        """`uniform` and `uniform_share`: of attention that is equal over all keys (of the window)."""
        return {"uniform": _most(layer), "uniform_share": 1.0}


def _most(layer: Layer) -> float:
    """The entropy of uniform attention: log of the number of keys."""
    return math.log(layer.distances.shape[-1])
