"""A layer whose one window a mask cuts into sets of any tokens, as in shifted windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from probekit.anatomy import WindowGroup
from probekit.layer import Layer
from probekit.testing import make_layer


def block_maps(sets: Sequence[Sequence[int]], batch: int = 2, heads: int = 3, seed: int = 0) -> torch.Tensor:
    """(B, H, N, N) attention that is zero between sets, rows summing to 1, float32."""
    n = sum(map(len, sets))
    allowed = torch.zeros(n, n, dtype=torch.bool)
    for members in sets:
        allowed[np.ix_(members, members)] = True
    scores = torch.randn(batch, heads, n, n, generator=torch.Generator().manual_seed(seed)) * 2
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1)


def masked_layer(maps: torch.Tensor, grid: tuple[int, int], sets: Sequence[Sequence[int]]) -> Layer:
    """A layer with these maps (B, H, N, N), whose tokens attend within the sets only; 16 px between tokens."""
    layer = make_layer(maps, grid=grid)
    groups = []
    for size in sorted({len(members) for members in sets}):
        chosen = np.array([sorted(members) for members in sets if len(members) == size])
        places = layer.info.positions[chosen]
        groups.append(WindowGroup(np.zeros(len(chosen), dtype=np.int64), chosen, chosen, chosen, places))
    return replace(layer, info=replace(layer.info, groups=tuple(groups), masked=True))


NINE = ((0, 1, 3, 4), (2, 5), (6, 7), (8,))
"""Sets of 4, 2, 2 and 1 of the tokens of a 3 x 3 grid: a shifted window's regions."""
