"""Maps of attention in the plan pass: their axes, their rows' sums, whether they mix a softmax's heads."""

from __future__ import annotations

import torch
from torch import Tensor

from probekit.watch.geometry import varies
from probekit.watch.positions import Where

_MIXED = {torch.float32: 1e-2, torch.float64: 1e-2}
"""How much of a factor's spread a mix of the softmax's heads may leave unexplained; 5e-2 in lower precision.
Rounding of float32 leaves 1e-4 of it where attention is all but uniform."""

_SAMPLE = (2, 32)
"""Images (or windows) and queries of a softmax that are kept to compare with what the model makes of it."""


def moves(channel: tuple[Tensor, ...], axis: int) -> bool:
    """Whether places (y or x) differ along an axis."""
    return varies(channel[1], axis) or varies(channel[2], axis)


def map_axes(where: Where) -> tuple[int, ...] | None:
    """Axes of a map in the order (image, head, query, key); None where it has others, or lacks one."""
    axes = range(len(where.shape))
    query = [i for i in axes if moves(where.rows, i)]
    key = [i for i in axes if moves(where.keys, i)]
    image = [i for i in axes if varies(where.rows[0], i)]
    head = [i for i in axes if i not in (*query, *key, *image)]
    if any(len(found) != 1 for found in (query, key, image, head)):
        return None
    return (*image, *head, *query, *key)


def sampled(maps: Tensor) -> Tensor:
    """A copy of some rows of (image, head, query, key), evenly spread over images and queries."""
    for axis, most in zip((0, 2), _SAMPLE, strict=True):
        n = maps.size(axis)
        maps = maps.index_select(axis, torch.linspace(0, n - 1, min(n, most), device=maps.device).long())
    return maps


def is_mix(maps: Tensor, heads: Tensor) -> bool:
    """Whether each head of `maps` is one weighted sum of `heads`, plus a constant, at every pair."""
    y, x = (t.movedim(1, -1).flatten(0, -2).cpu().double() for t in (maps, heads))
    x, y = x - x.mean(0), y - y.mean(0)
    if len(x) <= 2 * x.size(1) or not bool(x.isfinite().all() & y.isfinite().all()):
        return False  # any factor would fit, or none
    left = y - x @ torch.linalg.lstsq(x, y, driver="gelsd").solution
    return bool((left.norm(dim=0) <= _MIXED.get(maps.dtype, 5e-2) * y.norm(dim=0) + 1e-6).all())


def row_tolerance(maps: Tensor) -> float:
    """How far from 1 rows of probabilities may sum to, by their precision."""
    return 2e-2 if maps.dtype in (torch.float16, torch.bfloat16) else 1e-3


def row_stochastic(maps: Tensor) -> bool:
    if not maps.is_floating_point():
        return False
    total = maps.sum(-1, dtype=torch.float32)
    if bool(total.isnan().any()):
        return True  # nobody knows; the run says that attention is NaN
    return bool((maps.amin() > -1e-5) & ((total - 1).abs().amax() < row_tolerance(maps)))
