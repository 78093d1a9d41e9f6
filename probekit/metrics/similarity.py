"""Cosine similarities of many vectors without all their pairs (Park et al., ICLR 2023, Fig. 5).

The mean over pairs i != j of n unit vectors u is (|sum u|^2 - n) / (n (n - 1)). A vector of norm below `EPS`
has no direction: its cosine with any other is 0, and metrics count the tokens it happens at.
"""

from __future__ import annotations

import torch
from torch import Tensor

from probekit.attention import exact_float32, product

EPS = 1e-12

_BLOCK = 64
"""Tokens added up in float32 before float64 takes over: a sum of thousands of unit vectors would be wrong by
as much as a similarity near 0."""


def inverse_norms(x: Tensor) -> Tensor:
    """1 / |x| over the last axis; 0 where the norm is below `EPS`."""
    norms = torch.linalg.vector_norm(x, dim=-1)
    return norms.reciprocal().masked_fill_(norms < EPS, 0)


def mean_cosine(x: Tensor, inverse: Tensor) -> Tensor:
    """Mean cosine of all pairs of N > 1 vectors, (B, N, C) -> (B,); `inverse`: their `inverse_norms`."""
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    total = x.new_zeros(len(x), x.shape[2], dtype=wide)
    with exact_float32(x.device):
        for part, weights in zip(x.split(_BLOCK, 1), inverse.split(_BLOCK, 1), strict=True):
            total += product(weights.unsqueeze(1), part).squeeze(1)
    n = x.shape[1]
    return ((total.square().sum(1) - (inverse > 0).sum(1)) / (n * (n - 1))).float()
