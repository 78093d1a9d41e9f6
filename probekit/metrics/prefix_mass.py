"""How much attention patch tokens give to prefix tokens: what the renormalised metrics hide."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from probekit.errors import DoesNotApply
from probekit.metric import Metric

if TYPE_CHECKING:
    from probekit.layer import Layer


class PrefixMass(Metric):
    """(1/N) sum over patch queries q of sum over prefix keys k of a[q, k], the model's own attention.

    Prefix tokens are CLS, distillation and register tokens. Distance, entropy and NMI drop them and
    renormalise (Park et al., ICLR 2023, Figs. 3 and 4), so they describe only the rest, 1 - prefix_mass.
    """

    name = "prefix_mass"
    needs = frozenset({"prefix_mass"})
    dims: ClassVar[Mapping[str, tuple[str, ...]]] = {"prefix_mass": ("head",)}
    units: ClassVar[Mapping[str, str]] = {"prefix_mass": "1"}
    conventions: ClassVar[Mapping[str, object]] = {
        "definition": "share of a patch query's attention that goes to prefix tokens",
        "prefix": "all of them together, as keys; left out as queries",
        "renormalised": False,
        "averaging": "queries; per image and head",
        "reading": (
            "Near 1 the patches look at CLS or registers alone, and distance, entropy and NMI of the head "
            "rest on the little that is left."
        ),
        "does_not_show": (
            "Not which prefix token, nor what it hands on: attention to a token with small values adds "
            "nothing."
        ),
    }

    def measure(self, layer: Layer) -> Mapping[str, Tensor]:
        """(B, H)."""
        _check(layer)
        return {"prefix_mass": layer.prefix_mass}

    def describe(self, layer: Layer) -> Mapping[str, float]:
        """`uniform`: of attention that is equal over all keys, prefix tokens included."""
        _check(layer)
        return {"uniform": layer.prefix / (layer.prefix + layer.info.groups[0].keys.shape[1])}


def _check(layer: Layer) -> None:
    if not layer.prefix:
        raise DoesNotApply(f"'{layer.info.name}' has no prefix tokens")
