"""A third-party metric: how spread a head's attention is, as a share of the most it could be.

probekit run --plugin examples/entropy.py --model moco:vit-b16@random --metrics entropy -d folder:photos
"""

import math

import torch

from probekit import Metric


class Entropy(Metric):
    """Mean over queries of H(k | q) / log N: 1 is uniform, 0 is one key per query."""

    name = "entropy"
    needs = {"attention"}
    dims = {"entropy": ("head",)}
    units = {"entropy": "1"}

    def measure(self, layer):
        rows = torch.special.entr(layer.attention).sum(-1)
        return {"entropy": rows.mean(-1) / math.log(layer.tokens_count)}
