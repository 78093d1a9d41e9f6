"""Attention statistics at N = 4096 tokens: time against the fused attention, and memory a head.

    python benchmarks/long_sequences.py [--tokens 4096] [--heads 4] [--repeats 5]

Ratio of process times of `stats_from_scores` and scaled_dot_product_attention on the same q, k, v, one
thread, interleaved; the memory is how much the process grew at most while it computed, by the heads.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time

import torch
import torch.nn.functional as F

from probekit.attention import probabilities, stats_from_scores


def peak() -> int:
    """Bytes of the largest size this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    side = int(given.tokens**0.5)
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, given.heads, side * side, 64, generator=generator).unbind()
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float() * 16
    distances = torch.cdist(places, places)[None, None]
    scale = 64**-0.5
    with torch.no_grad():
        F.scaled_dot_product_attention(q, k, v, scale=scale)
        before = peak()
        stats = stats_from_scores(q, k, scale=scale, distances=distances)
        grown = peak() - before
        ratios = []
        for _ in range(given.repeats):
            start = time.process_time()
            F.scaled_dot_product_attention(q, k, v, scale=scale)
            middle = time.process_time()
            stats_from_scores(q, k, scale=scale, distances=distances)
            ratios.append((time.process_time() - middle) / (middle - start))
        p = probabilities(q[:, :1], k[:, :1], scale=scale).double()
        exact = (p * distances).sum(-1).mean(-1)
    error = abs(float(stats.distance[0, 0] / exact[0, 0]) - 1)
    print(
        f"N = {side * side}: statistics / fused attention = {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f}), {grown / given.heads / 1e6:.0f} MB a head, "
        f"distance off by {error:.1e} of its value"
    )


if __name__ == "__main__":
    main()
