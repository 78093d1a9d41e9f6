"""From positions of queries and keys to the shapes people name: images, windows, heads, prefix, grid."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from probekit.anatomy import WindowGroup


@dataclass(frozen=True)
class Lead:
    """What the axes before (queries, keys) are: some order of images, windows and heads.

    order:   the lead axes with images and windows first, heads last
    heads:   number of heads
    windows: windows per image
    slowest: what varies slowest where axes are merged; ``window`` and ``head`` are the exceptions
    inner:   heads that are merged into the image's axis while windows have their own
    """

    order: tuple[int, ...]
    heads: int
    windows: int
    slowest: Literal["image", "window", "head"] = "image"
    inner: int = 1

    def canonical(self, t: Tensor) -> Tensor:
        """(lead..., a, b) -> (images * windows, heads, a, b), image-major."""
        n = len(self.order)
        t = t.permute(*self.order, n, n + 1)
        if self.slowest == "head":
            return t.unflatten(0, (self.heads, -1)).transpose(0, 1)
        if self.inner > 1:
            t = t.unflatten(0, (-1, self.inner))
            t = t.movedim(1, t.dim() - 3)
        t = t.reshape(-1, self.heads, *t.shape[-2:])
        if self.slowest == "window":
            t = t.unflatten(0, (self.windows, -1)).transpose(0, 1).flatten(0, 1)
        return t


def varies(t: Tensor, axis: int) -> bool:
    """Whether positions differ along an axis, padding and what has no place aside."""
    if t.size(axis) == 1 or t.stride(axis) == 0:
        return False
    finite = t.isfinite()
    top = t.masked_fill(~finite, -math.inf).amax(axis)
    bottom = t.masked_fill(~finite, math.inf).amin(axis)
    return bool((top > bottom).any())


def lead_layout(queries: tuple[Tensor, ...], keys: tuple[Tensor, ...]) -> Lead | None:
    """Tell images, windows and heads apart by what varies along each lead axis of positions.

    queries, keys: of (lead..., Q) and (lead..., K). Two images were forwarded. None where an axis is none of
    the three.
    """
    image, y, x = (_side_by_side(q, k) for q, k in zip(queries, keys, strict=True))
    lead = range(image.dim() - 1)
    of_image = [a for a in lead if varies(image, a)]
    of_window = [a for a in lead if a not in of_image and (varies(y, a) or varies(x, a))]
    of_head = [a for a in lead if a not in of_image and a not in of_window]
    if len(of_image) > 1:
        return None
    order = (*of_image, *of_window, *of_head)
    heads = math.prod(image.shape[a] for a in of_head)
    if heads == 1 and of_image and of_window and image.size(of_image[0]) > 2:
        inner = _run_length(*(t.movedim(of_image[0], 0).flatten(1) for t in (image, y, x)))
        if inner > 1:
            image, y, x = (
                t[(slice(None),) * of_image[0] + (slice(None, None, inner),)] for t in (image, y, x)
            )
            found = lead_layout((image, y, x), (image, y, x))
            return replace(found, order=order, heads=inner, inner=inner) if found else None
    image, y, x = (t.permute(*order, len(order)).reshape(-1, heads, t.size(-1))[:, 0] for t in (image, y, x))
    merged = len(lead) == 1 and len(image) > 2
    if heads == 1 and len(image) > 2:  # heads may be merged into the batch: neighbours at the same places
        heads = _run_length(image, y, x)
        image, y, x = (t[::heads] for t in (image, y, x))
    if len(image) % 2:
        return None
    windows = len(image) // 2
    owner = torch.nan_to_num(image, nan=-1.0, posinf=-1.0).amax(1)
    expected = torch.arange(2, device=owner.device).repeat_interleave(windows)
    if bool(((owner == expected) | (owner < 0)).all()):
        return Lead(order, heads, windows)
    if bool(((owner == expected.view(2, windows).T.flatten()) | (owner < 0)).all()):
        if merged and heads == 1 and _run_length(y[::2], x[::2]) == windows:
            return Lead(order, windows, 1, "head")
        return Lead(order, heads, windows, "window")
    return None


def _side_by_side(a: Tensor, b: Tensor) -> Tensor:
    shape = torch.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    return torch.cat([a.expand(*shape, -1), b.expand(*shape, -1)], -1)


def _run_length(*rows: Tensor) -> int:
    same = torch.ones(len(rows[0]) - 1, dtype=torch.bool, device=rows[0].device)
    for t in rows:
        same &= ((t[1:] == t[:-1]) | (t[1:].isnan() & t[:-1].isnan())).all(1)
    breaks = torch.nonzero(~same).flatten() + 1
    length = int(breaks[0]) if len(breaks) else len(rows[0])
    regular = all(int(b) % length == 0 for b in breaks) and len(rows[0]) % length == 0
    return length if regular and len(breaks) == len(rows[0]) // length - 1 else 1


def first_image(lead: Lead, coordinates: tuple[Tensor, ...]) -> np.ndarray:
    """Positions (windows, tokens, 2) in the first image, of canonical order; inf is padding."""
    image, y, x = (lead.canonical(t.unsqueeze(-1))[: lead.windows, 0, :, 0] for t in coordinates)
    return _places(image, y, x)


def _places(image: Tensor, y: Tensor, x: Tensor) -> np.ndarray:
    """(..., 2) float64, to 1/64 px so that one place reached on two ways stays one place."""
    places = torch.stack((y, x), -1).masked_fill(image.isposinf().unsqueeze(-1), math.inf)
    return np.round(places.cpu().numpy().astype(np.float64) * 64) / 64


def raster(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unique finite positions in raster order (N, 2), and for each input point its number there (-1: none).

    `points` is (..., 2).
    """
    flat = points.reshape(-1, 2)
    finite = np.isfinite(flat).all(1)
    unique, inverse = np.unique(flat[finite], axis=0, return_inverse=True)
    number = np.full(len(flat), -1, dtype=np.int64)
    number[finite] = inverse.reshape(-1)
    return unique, number.reshape(points.shape[:-1])


def grid_of(positions: np.ndarray) -> tuple[tuple[int, int] | None, tuple[float, float] | None]:
    """Rows and columns, and the stride in pixels, if the positions (N, 2) fill a regular grid."""
    if not len(positions):
        return None, None
    ys, xs = np.unique(positions[:, 0]), np.unique(positions[:, 1])
    if len(ys) * len(xs) != len(positions):
        return None, None
    steps = []
    for axis in (ys, xs):
        gaps = np.diff(axis)
        if len(gaps) and np.ptp(gaps) > 0.05:
            return (len(ys), len(xs)), None
        steps.append(float(gaps.mean()) if len(gaps) else math.nan)
    if math.isnan(steps[0]) or math.isnan(steps[1]):
        steps = [steps[1] if math.isnan(steps[0]) else steps[0]] * 2
    return (len(ys), len(xs)), None if math.isnan(steps[0]) else (steps[0], steps[1])


def window_groups(
    queries: np.ndarray, keys: np.ndarray, numbers: np.ndarray, allowed: np.ndarray | None
) -> tuple[tuple[WindowGroup, ...], bool]:
    """Sets of tokens that attend among themselves, grouped by size; and whether a mask divided windows.

    queries, keys: (windows, Q|K, 2) positions; numbers: (windows, Q) raster numbers, -1 for none;
    allowed: (windows, Q, K), pairs that were seen to attend. Prefix tokens and padding are left out. A mask
    that doesn't divide a window into sets (a sliding neighbourhood, a causal one) leaves it whole.
    """
    sets: list[tuple[int, np.ndarray, np.ndarray]] = []
    masked = False
    for w in range(len(queries)):
        q = np.flatnonzero(numbers[w] >= 0)
        k = np.flatnonzero(np.isfinite(keys[w]).all(1))
        if not len(q) or not len(k):
            continue
        regions = _regions(allowed[w][np.ix_(q, k)]) if allowed is not None else []
        masked |= len(regions) > 1
        for rows, columns in regions if len(regions) > 1 else [(slice(None), slice(None))]:
            rq, rk = q[rows], k[columns]
            order = np.argsort(numbers[w][rq], kind="stable")
            ordered = rk[np.lexsort((keys[w][rk, 1], keys[w][rk, 0]))]
            sets.append((w, rq[order], ordered))
    groups = []
    for size in sorted({(len(q), len(k)) for _, q, k in sets}):
        chosen = [(w, q, k) for w, q, k in sets if (len(q), len(k)) == size]
        groups.append(
            WindowGroup(
                windows=np.array([w for w, _, _ in chosen], dtype=np.int64),
                queries=np.stack([q for _, q, _ in chosen]).astype(np.int64),
                keys=np.stack([k for _, _, k in chosen]).astype(np.int64),
                tokens=np.stack([numbers[w][q] for w, q, _ in chosen]),
                key_positions=np.stack([keys[w][k] for w, _, k in chosen]),
            )
        )
    return tuple(groups), masked


def _regions(pairs: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Queries and keys (places) of each connected part of (Q, K) allowed pairs.

    Connected and not just equal rows: peaked attention can leave an allowed pair without any probability.
    """
    n = len(pairs)
    count, label = connected_components(
        csr_array(
            np.block(
                [[np.zeros((n, n), bool), pairs], [np.zeros((pairs.shape[1], n + pairs.shape[1]), bool)]]
            )
        ),
        directed=False,
    )
    parts = [(np.flatnonzero(label[:n] == c), np.flatnonzero(label[n:] == c)) for c in range(count)]
    return parts if all(len(q) and len(k) for q, k in parts) else []


@dataclass(frozen=True)
class TokenLayout:
    """Where images, tokens and channels lie in a residual-stream tensor.

    axes:   batch, token axes, channel: a permutation to (B * folds, tokens..., C)
    folds:  groups of an image's tokens that lie along the batch axis, image-major (mostly 1)
    order:  places of the patch tokens in raster order among the flattened tokens
    prefix: places of the prefix tokens
    total:  tokens of any kind, padding included
    """

    axes: tuple[int, ...]
    order: np.ndarray
    prefix: np.ndarray
    total: int
    folds: int = 1

    @property
    def start(self) -> int | None:
        """The first patch token's place, if patch tokens follow each other in raster order."""
        n = len(self.order)
        plain = n and np.array_equal(self.order, np.arange(self.order[0], self.order[0] + n))
        return int(self.order[0]) if plain else None

    def flat(self, t: Tensor) -> Tensor:
        """(B, tokens, C), prefix tokens included."""
        return t.permute(self.axes).reshape(t.shape[self.axes[0]] // self.folds, -1, t.shape[self.axes[-1]])

    def patches(self, t: Tensor) -> Tensor:
        """(B, N, C), raster order, float32."""
        flat = self.flat(t)
        if self.start is not None:
            return flat.narrow(1, self.start, len(self.order)).float()
        return flat[:, torch.from_numpy(self.order).to(t.device)].float()

    def prefix_tokens(self, t: Tensor) -> Tensor:
        """(B, P, C), float32."""
        return self.flat(t)[:, torch.from_numpy(self.prefix).to(t.device)].float()


def token_layout(rows: tuple[Tensor, ...]) -> tuple[TokenLayout, np.ndarray] | None:
    """The layout of a token tensor and its patch positions (N, 2), from positions of two images' tokens."""
    image, y, x = rows
    batch = [a for a in range(image.dim()) if varies(image, a)]
    if len(batch) != 1:
        return None
    token = [a for a in range(image.dim()) if a not in batch and (varies(y, a) or varies(x, a))]
    rest = [a for a in range(image.dim()) if a not in batch and a not in token]
    if not rest:
        return None
    channel = max(rest, key=lambda a: (image.size(a), a))
    token = [a for a in range(image.dim()) if a not in (batch[0], channel)]
    axes = (batch[0], *token, channel)
    folds, odd = divmod(image.shape[batch[0]], 2)
    owner = torch.nan_to_num(image, nan=-1.0, posinf=-1.0).permute(axes).flatten(1).amax(1)
    expected = torch.arange(2, device=owner.device).repeat_interleave(folds)
    if odd or not bool(((owner == expected) | (owner < 0)).all()):
        return None
    points = _places(*(t.permute(axes)[:folds, ..., 0].reshape(-1) for t in rows))
    unique, number = raster(points)
    places = np.flatnonzero(number >= 0)
    if len(places) != len(unique):
        return None  # two tokens of one place: not a grid of patches
    order = np.empty(len(unique), dtype=np.int64)
    order[number[places]] = places
    prefix = np.flatnonzero(np.isnan(points).any(1))
    return TokenLayout(axes, order, prefix, len(points), folds), unique
