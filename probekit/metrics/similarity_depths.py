"""How little attention turns the tokens (Park et al., ICLR 2023, Fig. 5, "depths")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from probekit.errors import DoesNotApply, UsageError
from probekit.metric import Metric
from probekit.metrics.similarity import EPS, inverse_norms

if TYPE_CHECKING:
    from probekit.layer import Layer


class SimilarityDepths(Metric):
    """Mean over patch tokens n of cos(x[n], y[n]), x before and y after self-attention.

    of: the paper doesn't say what is "after". ``stream``: the residual stream after the attention is added.
        ``branch``: what was added to it, with the projection, layer scale or norm that come first.
    zero_tokens: at how many tokens x or y has a norm below 1e-12; their cosine counts as 0.
    """

    name = "similarity_depths"
    needs = frozenset({"tokens_in", "tokens_mid"})
    dims: ClassVar[Mapping[str, tuple[str, ...]]] = {"similarity_depths": (), "zero_tokens": ()}
    units: ClassVar[Mapping[str, str]] = {"similarity_depths": "1", "zero_tokens": "tokens"}
    figure = "Fig. 5"
    windows = "own"  # token by token: windows don't matter

    def __init__(self, of: str = "stream"):
        super().__init__(of=of)
        if of not in ("stream", "branch"):
            raise UsageError(f"of is 'stream' or 'branch', not '{of}'")
        self.of = of
        self.conventions = {
            "definition": "Park et al. 2023, Fig. 5 (depths); no code was published",
            "of": "residual stream before and after the attention is added"
            if of == "stream"
            else "residual stream before the attention is added, and what is added",
            "prefix": "dropped",
            "centred": False,
            "averaging": "patch tokens; per image",
            "eps": EPS,
            "open": "the paper names neither the site, nor the tokens, nor the order of averaging",
            "reading": "1: attention leaves every token's direction as it was. 0: it turns them all the way."
            if of == "stream"
            else "0: attention adds something new. Above, it repeats the stream; below, it takes from it.",
            "does_not_show": (
                "Not what attention does: a stream that is long beside what is added hardly turns, whatever "
                "that is. Compare of=stream with of=branch."
            ),
        }

    def measure(self, layer: Layer) -> Mapping[str, Tensor]:
        """(B,) each."""
        before, after = layer.tokens_in, layer.tokens_mid
        if before.shape != after.shape:
            raise DoesNotApply(f"attention of '{layer.info.name}' changes the number or width of tokens")
        if self.of == "branch":
            after = after - before
        inverse = inverse_norms(before), inverse_norms(after)
        cosine = (before * after).sum(-1) * inverse[0] * inverse[1]
        zero = ((inverse[0] == 0) | (inverse[1] == 0)).sum(1).float()
        return {"similarity_depths": cosine.mean(1), "zero_tokens": zero}
