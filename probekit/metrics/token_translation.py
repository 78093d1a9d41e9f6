"""How much attention moves all tokens of an image the same way (Park et al., ICLR 2023, Fig. 6)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from probekit.metric import Metric

if TYPE_CHECKING:
    from probekit.layer import Layer


class TokenTranslation(Metric):
    """Share of the tokens' movement through attention that is one translation, per image:

        token_translation = ||mean_n s_n||^2 / mean_n ||s_n||^2,  s_n = tokens_mid[n] - tokens_in[n]

    1: every patch token moves by the same vector. Movements that have nothing in common, N of them, give 1/N
    in the mean (`independent`). 0 where no token moves.
    """

    name = "token_translation"
    needs = frozenset({"tokens_in", "tokens_mid"})
    dims: ClassVar[Mapping[str, tuple[str, ...]]] = {"token_translation": ()}
    units: ClassVar[Mapping[str, str]] = {"token_translation": "1"}
    figure = "Fig. 6"
    windows = "own"
    conventions = {
        "definition": "our number for what Park et al. 2023, Fig. 6, shows as a picture",
        "prefix": "dropped",
        "movement": "the attention's add to the residual stream, after LayerScale",
        "zero_by_zero": 0.0,
        "reading": "Towards 1, attention moves all tokens of an image alike and so keeps their arrangement.",
        "does_not_show": (
            "Not how far tokens move, nor whether different images move differently; a large bias of the "
            "output projection alone gives 1."
        ),
    }

    def measure(self, layer: Layer) -> Mapping[str, Tensor]:
        """(B,)."""
        shift = layer.tokens_mid - layer.tokens_in
        return {"token_translation": translation(shift).float()}

    def describe(self, layer: Layer) -> Mapping[str, np.ndarray]:
        """`independent`: 1/N."""
        return {"independent": np.asarray(1 / layer.tokens_in.shape[1])}


def translation(shift: Tensor) -> Tensor:
    """||mean||^2 / mean ||.||^2 over the second axis: (B, N, C) -> (B,), float64 where the device has it."""
    shift = shift.to(torch.float32 if shift.device.type == "mps" else torch.float64)
    common = shift.mean(1).square().sum(-1)
    whole = shift.square().sum(-1).mean(1)
    return common / whole.masked_fill(whole == 0, 1)
