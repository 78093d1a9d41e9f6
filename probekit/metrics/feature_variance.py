"""How much the tokens of an image differ from their mean (Park and Kim, ICLR 2022, Fig. 9)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor
from torch.linalg import vector_norm

from probekit.metric import Metric

if TYPE_CHECKING:
    from probekit.layer import Layer


class FeatureVariance(Metric):
    """(1/C) sum over channels c of the variance of x[., c] over the N patch tokens of an image (ddof 0).

    feature_variance_share: the same over the mean square of x: the part of the tokens' energy in which they
    differ. The residual stream grows with depth, and by a factor that is each model's own; the share has no
    such scale. 0 for a map of zeros.
    """

    name = "feature_variance"
    needs = frozenset({"tokens"})
    dims: ClassVar[Mapping[str, tuple[str, ...]]] = {"feature_variance": (), "feature_variance_share": ()}
    units: ClassVar[Mapping[str, str]] = {"feature_variance": "1", "feature_variance_share": "1"}
    windows = "own"  # the whole feature map, whatever the attention's windows
    conventions: ClassVar[Mapping[str, object]] = {
        "definition": "Park and Kim 2022, Fig. 9; how-do-vits-work, featuremap_variance.ipynb",
        "prefix": "dropped",
        "ddof_tokens": 0,
        "averaging": "variance over tokens, then mean over channels, per image",
        "share": "of the mean square over tokens and channels",
        "reading": "A fall from one site to the next: the tokens were drawn together there; a rise: apart.",
        "does_not_show": (
            "Not at what distance the tokens differ: detail and slow gradients count alike. The unit is the "
            "model's own: compare models by the share."
        ),
    }

    def measure(self, layer: Layer) -> Mapping[str, Tensor]:
        """(B,) each."""
        x = layer.tokens
        mean = x.mean(1, keepdim=True)
        # A token's norm is summed in lanes and rounds less than one sum of all its squares.
        variance = vector_norm(x - mean, dim=-1).square_().mean(1) / x.shape[2]
        energy = variance + mean.square().mean((1, 2))
        share = variance / energy.masked_fill(energy == 0, 1)
        return {"feature_variance": variance, "feature_variance_share": share}
