"""Attention statistics from queries and keys: one sweep in cache-sized tiles, no N x N tensor kept.

Definitions (Park et al., ICLR 2023, Figs. 3 and 4), for one head with attention a[q, k] over patch tokens:

    distance              (1/N) sum_q sum_k a[q, k] D[q, k]          px of the network's input
    conditional entropy   (1/N) sum_q H(k | q)                       nats
    key entropy           H(k) of p(k) = (1/N) sum_q a[q, k]         nats

and each query's log mass, log sum_k exp(score): with it, what the query gives to keys outside the sweep
follows from their scores alone (`share_beside`).

With z the logits less their row's maximum, e = exp(z) and Z = sum_k e: H(k | q) = log Z - <e, z> / Z, so
no logarithm of an N x N tensor is taken. (Without subtracting the maximum first, the mutual information
loses three digits.)

Scores and softmax are float32 whatever the input's dtype, with autocast and TF32 off: a score product in
bfloat16 puts errors of 0.03 to 0.1 into probabilities. A row that gives no mass to any key has no
distribution and is left out of every mean over queries.

On a CPU an image's bits do not depend on the batch it is in, nor on the number of threads while that is at
most the number of heads: how rows are cut depends on the layer's shape alone, each sum stays within a row,
and no product is of a lone matrix (see `product`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

# On some processors MKL rounds a product by where its operands lie in memory, unless told not to. It reads
# this at its first product.
os.environ.setdefault("MKL_CBWR", "AUTO")

_TILE_BYTES = 6 << 18
"""What one CPU thread's two N x N buffers may take, so that they stay in its L2 cache (2 MB and up)."""

_TILE_BYTES_GPU = 1 << 28

_TINY = torch.finfo(torch.float32).tiny

_LOWEST = -87.0
"""Logits further below their row's maximum are raised to this; exp(-87) = 1.6e-38 is about the least normal
float32. Keeps 0 * inf (a mask of -inf) out of <e, z>, and underflow and denormals, which make a CPU's exp up
to 8 times slower, out of the sweep. Moves no probability by more than 1.6e-38."""


@dataclass(frozen=True)
class AttentionStats:
    """Statistics of each image's and head's attention over patch tokens.

    distance:            (B, H) px, mean over queries of the expected distance to the keys
    conditional_entropy: (B, H) nats, mean over queries of H(k | q)
    key_entropy:         (B, H) nats, H(k) of the mean row
    log_mass:            (B, H, Nq) float32, log of the sum over keys of exp(score) (of the probabilities as
                         given); -inf for a row left out

    The first three are float64 where the device has it: the mutual information is a small difference of the
    entropies.
    """

    distance: Tensor
    conditional_entropy: Tensor
    key_entropy: Tensor
    log_mass: Tensor

    @property
    def information(self) -> Tensor:
        """Mutual information I(q; k) = H(k) - H(k | q), (B, H) nats, never negative."""
        return (self.key_entropy - self.conditional_entropy).clamp(min=0)


def stats_from_scores(
    q: Tensor, k: Tensor, *, scale: float, bias: Tensor | None = None, distances: Tensor
) -> AttentionStats:
    """Statistics of softmax(scale * q k^T + bias) over the keys given.

    Hand in q and k of the patch tokens alone: a softmax over patch keys *is* the full softmax with its
    prefix dropped and its rows renormalised.

    q, k:      (B, H, Nq, d) and (B, H, Nk, d), any float dtype and strides
    bias:      added to the scores; broadcasts to (B, H, Nq, Nk); -inf or -100 masks a pair
    distances: (1 or B, 1, Nq, Nk) px
    """
    cut = _Cut((*q.shape[:3], k.shape[2]), q.device)
    distances = cut.tiles(distances.to(q.device, torch.float32).expand(cut.shape))
    biases = repeat(None) if bias is None else cut.tiles(bias.expand(cut.shape))
    rows = []
    with exact_float32(q.device):
        for queries, keys, d, added in zip(
            cut.tiles(q), cut.tiles(k, blocks=False), distances, biases, strict=False
        ):
            z, e = cut.buffers(d.shape)
            if added is not None:
                z.copy_(added)
            a, b = (t.float().flatten(0, -3) for t in (queries, keys))
            product(a, b.transpose(1, 2), scale=scale, out=z.flatten(0, -3), add=added is not None)
            peak, empty = z.amax(-1, keepdim=True), None
            if added is not None:
                empty = peak == -torch.inf
                peak.masked_fill_(empty, 0)
            torch.exp(z.sub_(peak).clamp_(min=_LOWEST), out=e)
            rows.append(_sums(z, e, d, peak, empty))
        return cut.stats(rows)


def stats_from_probabilities(p: Tensor, distances: Tensor) -> AttentionStats:
    """The same statistics of attention that exists already, its rows renormalised.

    p:         (B, H, Nq, Nk), not negative: the patch block of a softmax, normalised or not
    distances: (1 or B, 1, Nq, Nk) px
    """
    cut = _Cut(tuple(p.shape), p.device)
    distances = cut.tiles(distances.to(p.device, torch.float32).expand(cut.shape))
    rows = []
    with exact_float32(p.device):
        for part, d in zip(cut.tiles(p), distances, strict=True):
            z, e = cut.buffers(d.shape)
            e.copy_(part)
            empty = e.amax(-1, keepdim=True) < _TINY
            torch.log(e.clamp_(min=_TINY), out=z)  # no zeros or denormals, for `_LOWEST`'s reasons
            rows.append(_sums(z, e, d, torch.zeros_like(e[..., :1]), empty))
        return cut.stats(rows)


def share_beside(
    q: Tensor, k: Tensor, *, scale: float, bias: Tensor | None = None, log_mass: Tensor
) -> Tensor:
    """What each query gives to the keys `k`, of all it gives to them and to those swept, (B, H, Nq) float32.

    sigmoid(logsumexp_k(scale * q k^T + bias) - log_mass): the full softmax's share without the full softmax.
    0 for a query all of whose keys are masked.

    q, k:     (B, H, Nq, d) as swept, and (B, H, P, d) of the few keys that were not
    bias:     broadcasts to (B, H, Nq, P)
    log_mass: (B, H, Nq), `AttentionStats.log_mass`
    """
    scores = torch.empty(*k.shape[:3], q.shape[2], device=q.device)  # keys first: twice as fast for one key
    step = 1 if q.device.type == "cpu" else max(1, len(q))  # an image's queries needn't be copied
    with exact_float32(q.device):
        for a, b, out in zip(q.split(step), k.split(step), scores.split(step), strict=True):
            a, b = (t.float().flatten(0, 1) for t in (a, b))
            product(b, a.transpose(1, 2), scale=scale, out=out.flatten(0, 1))
        if bias is not None:
            scores += bias.transpose(2, 3)
        beside = scores.squeeze(2) if scores.shape[2] == 1 else scores.logsumexp(2)
        # A sigmoid written out: torch's computes what is left over of a vector's lanes by another formula.
        share = (log_mass - beside).exp_().add_(1).reciprocal_()
        return share if bias is None else share.masked_fill_(beside == -torch.inf, 0)


def probabilities(q: Tensor, k: Tensor, *, scale: float, bias: Tensor | None = None) -> Tensor:
    """softmax(scale * q k^T + bias), (B, H, Nq, Nk) float32; a row whose keys are all masked is zero.

    Shapes as in `stats_from_scores`.
    """
    with exact_float32(q.device):
        q, k = (t.to(torch.float32).contiguous() for t in (q, k))
        scores = torch.matmul(q, k.mT).mul_(scale)
        if bias is None:
            return scores.softmax(-1)
        scores += bias
        empty = scores.amax(-1, keepdim=True) == -torch.inf
        return scores.softmax(-1).masked_fill_(empty, 0)


def renormalise(p: Tensor) -> Tensor:
    """Rows of `p` (..., Nk) divided by their sums, float32; rows without mass stay zero."""
    p = p.to(torch.float32)
    mass = p.sum(-1, keepdim=True)
    return p / mass.masked_fill(mass == 0, 1)


def product(
    a: Tensor, b: Tensor, *, scale: float = 1.0, out: Tensor | None = None, add: bool = False
) -> Tensor:
    """scale * a b of M matrices each, (M, n, k) and (M, k, m); into `out`, or with `add` added to it.

    A lone matrix is multiplied as one of a pair: the BLAS would split it among threads, and with another
    order of sums its bits would differ from the same matrix's in a larger batch.
    """
    if out is None:
        out = a.new_empty(len(a), a.shape[1], b.shape[2])
    if len(out) > 1:
        return out.baddbmm_(a, b, beta=int(add), alpha=scale)
    pair = out.repeat(2, 1, 1).baddbmm_(a.expand(2, -1, -1), b.expand(2, -1, -1), beta=int(add), alpha=scale)
    return out.copy_(pair[:1])


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """No gradients, no autocast, and float32 products in float32: neither TF32 nor bfloat16."""
    products = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [product.fp32_precision for product in products]
    try:
        for product in products:
            product.fp32_precision = "ieee"
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for product, precision in zip(products, before, strict=True):
            product.fp32_precision = precision


class _Sums(NamedTuple):
    """Sums over the keys of one tile, of M = images * heads matrices and n queries."""

    mass: Tensor  # (M, n), of e; inf for a row left out
    ez: Tensor  # (M, n), <e, z>
    ed: Tensor  # (M, n), <e, D>
    peak: Tensor  # (M, n), what was taken off the scores
    received: Tensor  # (M, 1, Nk), the sum over queries of e / mass


def _sums(z: Tensor, e: Tensor, distances: Tensor, peak: Tensor, empty: Tensor | None) -> _Sums:
    """Sums of e = exp(z), (..., n, Nk), z + peak being the scores, without the rows marked `empty`.

    peak, empty: (..., n, 1). Spoils z and e.
    """
    flat = e.flatten(0, -3)
    mass = flat.sum(-1)
    if empty is not None:
        mass.masked_fill_(empty.view(mass.shape), torch.inf)
    received = product(mass.reciprocal().unsqueeze(1), flat)
    ez = z.mul_(e).flatten(0, -3).sum(-1)
    ed = e.mul_(distances).flatten(0, -3).sum(-1)
    return _Sums(mass, ez, ed, peak.reshape(mass.shape), received)


class _Cut:
    """How attention of `shape` (B, H, Nq, Nk) is cut: into a few images with all heads and queries, or, where
    an image is too much for the cache, into some of its heads and blocks of queries."""

    def __init__(self, shape: tuple[int, ...], device: torch.device):
        batch, heads, queries, keys = self.shape = shape
        on_cpu = device.type == "cpu"
        area = (_TILE_BYTES if on_cpu else _TILE_BYTES_GPU) // 8  # numbers in each of two buffers
        self.rows = -(-queries // -(-2 * queries * keys // area))  # two heads or more in a tile
        self.blocks = -(-queries // self.rows)
        fits = max(2, area * (torch.get_num_threads() if on_cpu else 1) // (self.rows * keys))
        self.images = min(batch, fits // heads) if fits >= 2 * heads and self.blocks == 1 else 1
        parts = 1 if fits >= heads else max(1, min(-(-heads // fits), heads // 2))
        self.heads = [(i + 1) * heads // parts - i * heads // parts for i in range(parts)]
        self.memory = torch.empty(2, self.images * max(self.heads) * self.rows * keys, device=device)
        self.views: tuple[Tensor, ...] = ()

    def tiles(self, t: Tensor, *, blocks: bool = True) -> Iterator[Tensor]:
        """Every tile's part of `t` (B, H, Nq, ...): (images, H, Nq, ...) or (heads, n, ...).

        With `blocks` off, of `t` (B, H, Nk, ...): whole, again for every block of queries.
        """
        if self.images > 1:
            yield from t.split(self.images)
            return
        for image in t.unbind():
            for part in image.split(self.heads):
                if self.blocks == 1:
                    yield part
                else:
                    yield from part.split(self.rows, 1) if blocks else repeat(part, self.blocks)

    def buffers(self, shape: torch.Size) -> tuple[Tensor, ...]:
        """Two tensors to work in. Taken once: page faults of fresh ones cost as much as the arithmetic."""
        if not self.views or self.views[0].shape != shape:
            self.views = self.memory[:, : shape.numel()].view(2, *shape).unbind()
        return self.views

    def stats(self, tiles: list[_Sums]) -> AttentionStats:
        """Put the tiles together; sums over queries in float64 where the device has it."""
        if self.blocks > 1:
            tiles = [_join(tiles[i : i + self.blocks]) for i in range(0, len(tiles), self.blocks)]
        mass, ez, ed, peak, received = (
            torch.cat(parts).unflatten(0, self.shape[:2]) for parts in zip(*tiles, strict=True)
        )
        wide = torch.float32 if mass.device.type == "mps" else torch.float64
        left_out = mass == torch.inf
        count = (self.shape[2] - left_out.sum(-1)).clamp(min=1)
        log_mass = mass.log()
        entropy = (log_mass - ez / mass).clamp_(min=0).masked_fill_(left_out, 0)
        total = received.sum(-1, keepdim=True, dtype=wide)
        share = received / total.masked_fill_(total == 0, 1)
        return AttentionStats(
            distance=(ed / mass).sum(-1, dtype=wide) / count,
            conditional_entropy=entropy.sum(-1, dtype=wide) / count,
            key_entropy=torch.special.entr(share).sum((-2, -1)),
            log_mass=log_mass.add_(peak).masked_fill_(left_out, -torch.inf),
        )


def _join(blocks: list[_Sums]) -> _Sums:
    """The sums of all queries, from those of blocks of queries."""
    *rows, received = zip(*blocks, strict=True)
    return _Sums(*(torch.cat(parts, 1) for parts in rows), torch.stack(received).sum(0))
