"""How alike the outputs of a layer's heads are (Park et al., ICLR 2023, Fig. 5, "heads")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from probekit.errors import DoesNotApply
from probekit.metric import Metric
from probekit.metrics.similarity import EPS, inverse_norms

if TYPE_CHECKING:
    from probekit.layer import Layer


class SimilarityHeads(Metric):
    """Mean over patch tokens n and pairs of heads h != h' of cos(o[h, n], o[h', n]), o = attention @ v.

        u[h, n] = o[h, n] / |o[h, n]|,   similarity_heads = mean_n (|sum_h u[h, n]|^2 - H) / (H (H - 1))

    The outputs are those before the projection: what the paper's published models return beside their
    attention. Their cosines depend on the basis of each head's values.

    zero_tokens: at how many tokens some head's output has a norm below 1e-12; its cosines count as 0.
    """

    name = "similarity_heads"
    needs = frozenset({"head_outputs"})
    dims: ClassVar[Mapping[str, tuple[str, ...]]] = {"similarity_heads": (), "zero_tokens": ()}
    units: ClassVar[Mapping[str, str]] = {"similarity_heads": "1", "zero_tokens": "tokens"}
    figure = "Fig. 5"
    windows = "own"  # token by token: windows don't matter
    conventions: ClassVar[Mapping[str, object]] = {
        "definition": "Park et al. 2023, Fig. 5 (heads); no code was published",
        "of": "attention @ v of each head, before the projection",
        "prefix": "dropped",
        "centred": False,
        "averaging": "pairs of different heads, then patch tokens; per image",
        "eps": EPS,
        "open": "the paper names neither the site, nor the tokens, nor the order of averaging",
        "reading": "1: all heads hand on the same vector. 0: heads have nothing in common.",
        "does_not_show": (
            "Not whether heads do the same: each has values of its own, and a turn of theirs, undone by the "
            "projection, changes the cosines but not the model."
        ),
    }

    def measure(self, layer: Layer) -> Mapping[str, Tensor]:
        """(B,) each."""
        outputs = layer.head_outputs
        heads = outputs.shape[1]
        if heads < 2:
            raise DoesNotApply(f"'{layer.info.name}' has one head, and no pair of them")
        inverse = inverse_norms(outputs)
        together = (outputs * inverse.unsqueeze(-1)).sum(1).square_().sum(-1)
        pairs = (together - (inverse > 0).sum(1)) / (heads * (heads - 1))
        return {"similarity_heads": pairs.mean(1), "zero_tokens": (inverse == 0).any(1).sum(1).float()}
