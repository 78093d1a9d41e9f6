"""How alike the tokens of an image are (Park et al., ICLR 2023, Fig. 5, "tokens")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from probekit.errors import DoesNotApply, UsageError
from probekit.metric import Metric
from probekit.metrics.similarity import EPS, inverse_norms, mean_cosine

if TYPE_CHECKING:
    from probekit.layer import Layer


class SimilarityTokens(Metric):
    """Mean over pairs n != m of an image's N patch tokens of cos(z[n], z[m]).

        u[n] = z[n] / |z[n]|,   similarity_tokens = (|sum_n u[n]|^2 - N) / (N (N - 1))

    which is exact and needs no N x N products.

    of: the paper doesn't say what z is. ``stream``: the residual stream, at every token site. ``attention``:
        what attention gives, attention @ v of all heads side by side, before the projection.
    zero_tokens: how many tokens have a norm below 1e-12; their cosines count as 0.
    """

    name = "similarity_tokens"
    needs = frozenset({"tokens"})
    dims: ClassVar[Mapping[str, tuple[str, ...]]] = {"similarity_tokens": (), "zero_tokens": ()}
    units: ClassVar[Mapping[str, str]] = {"similarity_tokens": "1", "zero_tokens": "tokens"}
    figure = "Fig. 5"
    windows = "own"  # all tokens of the image, whatever the attention's windows

    def __init__(self, of: str = "stream"):
        super().__init__(of=of)
        if of not in ("stream", "attention"):
            raise UsageError(f"of is 'stream' or 'attention', not '{of}'")
        self.of = of
        self.needs = frozenset({"tokens" if of == "stream" else "head_outputs"})
        self.conventions = {
            "definition": "Park et al. 2023, Fig. 5 (tokens); no code was published",
            "of": "residual stream" if of == "stream" else "attention @ v of all heads, not projected",
            "prefix": "dropped",
            "centred": False,
            "averaging": "all pairs of different tokens of an image; per image",
            "eps": EPS,
            "open": "the paper names neither the site, nor the tokens, nor the order of averaging",
            "reading": "1: all tokens point one way, so positions can't be told apart. 0: nothing in common.",
            "does_not_show": (
                "Not why: one large channel, or a mean that all tokens share, makes any tokens alike, as "
                "cosines aren't centred."
            ),
        }

    def measure(self, layer: Layer) -> Mapping[str, Tensor]:
        """(B,) each."""
        tokens = layer.tokens if self.of == "stream" else layer.head_outputs.transpose(1, 2).flatten(2)
        if tokens.shape[1] < 2:
            raise DoesNotApply(f"'{layer.row.label}' has one token, and no pair of them")
        inverse = inverse_norms(tokens)
        zero = (inverse == 0).sum(1).float()
        return {"similarity_tokens": mean_cosine(tokens, inverse), "zero_tokens": zero}
