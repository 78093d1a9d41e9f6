"""How much a head's attention depends on the query (Park et al., ICLR 2023, Fig. 4)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from probekit.attention import AttentionStats, stats_from_probabilities
from probekit.errors import UsageError
from probekit.metric import Metric, Traces
from probekit.metrics.compat import official, refuse_beside

if TYPE_CHECKING:
    import xarray as xr

    from probekit.layer import Layer

_NO_SPREAD = 1e-6
"""Heads nearer to each other than rounding (3e-7) can tell have no density."""


class NMI(Metric):
    """Normalised mutual information of query and key, I(q; k) / sqrt(H(q) H(k)).

    With p(q) = 1/N and p(k | q) the attention among patch tokens: H(q) = log N,
    H(k) is the entropy of the mean row, I = H(k) - mean over q of H(k | q). 0: every query sees the same map;
    1: every query has a key of its own. Also high for random but peaked attention: read it with the distance.

    Windowed attention, sets g of n_g of an image's N tokens:

        nmi         sum_g (n_g / N) I_g / sqrt(log n_g H_g(k)), within the windows; 0 for a window of 1 token
        nmi_global  of the whole N x N map, zero between windows. By the chain rule, with
                    H(G) = -sum_g (n_g / N) log(n_g / N):
                    I = H(G) + sum_g (n_g / N) I_g,  H(k) = H(G) + sum_g (n_g / N) H_g(k)

    Mostly the partition itself speaks in nmi_global of windowed layers (`uniform_global`), so never mix it
    with the curve of a ViT. With global attention the two are one.

    The result also has the density of a layer's heads (Fig. E.1): `nmi_density` at `density_at`.

    prefix: ``drop``, or ``keep``: the model's own map, with its prefix tokens among queries and keys; global
            attention only
    """

    name = "nmi"
    version = 3
    needs = frozenset({"attention_stats"})
    dims: ClassVar[Mapping[str, tuple[str, ...]]] = {"nmi": ("head",), "nmi_global": ("head",)}
    units: ClassVar[Mapping[str, str]] = {"nmi": "1", "nmi_global": "1"}
    figure = "Fig. 4"
    windows = "own"

    def __init__(self, compat: str = "", prefix: str = "drop"):
        super().__init__(compat=compat, prefix=prefix)
        self.eps = 1e-8 if official(compat) else 0.0
        if prefix not in ("drop", "keep"):
            raise UsageError(f"prefix is 'drop' or 'keep', not '{prefix}'")
        refuse_beside(compat, "prefix", prefix, "drop")
        self.keep = prefix == "keep"
        self.needs = frozenset({"attention_full"} if self.eps or self.keep else {"attention_stats"})
        self.conventions = {
            "definition": "cl-vs-mim, self_attention_analysis.ipynb"
            if self.eps
            else "Park et al. 2023, Fig. 4",
            "prefix": "kept among queries and keys" if self.keep else "dropped from queries and keys",
            "renormalised": not self.keep,
            "log": "natural",
            "averaging": "NMI per image and head, then means",
            "eps": self.eps,
            "zero_by_zero": 0.0,
            "density": (
                "Gaussian kernels over the image means of a layer's heads; bandwidth by Scott's rule, "
                "heads^(-1/5) times their standard deviation (ddof 1), not below 0.01"
            ),
            "reading": ("0: every query sees the same map. Towards 1: each query sees keys of its own."),
            "does_not_show": (
                "Not where the keys are, and not how spread a map is: uniform and collapsed maps are "
                "both 0, and random but peaked attention is high."
            ),
        }

    def measure(self, layer: Layer) -> Mapping[str, Tensor]:
        """(B, H) each, in [0, 1]."""
        if self.keep:
            full = layer.attention_full
            stats = stats_from_probabilities(full, torch.zeros(1, 1, *full.shape[-2:], device=full.device))
            nmi = _ratio(stats.information, math.log(full.shape[-2]), stats.key_entropy).float()
            return {"nmi": nmi, "nmi_global": nmi}
        parts = layer.windows()
        within, information, key_entropy = 0, _partition_entropy(parts), _partition_entropy(parts)
        for part in parts:
            stats = self._stats(part)
            share = part.window_share / part.window_count  # n_g / N
            nmi = _ratio(stats.information, math.log(part.tokens_count), stats.key_entropy)
            within = within + share * part.unfold(nmi).sum(1)
            information = information + share * part.unfold(stats.information).sum(1)
            key_entropy = key_entropy + share * part.unfold(stats.key_entropy).sum(1)
        whole = _ratio(information, math.log(_tokens(parts)), key_entropy)
        return {"nmi": within.float(), "nmi_global": whole.float()}

    def describe(self, layer: Layer) -> Mapping[str, float]:
        """`uniform` and `uniform_global`: nmi and nmi_global of attention that is equal over its window."""
        parts = layer.windows()
        apart = _partition_entropy(parts)
        # Uniform keys: I_g = 0 and H_g(k) = log m_g. A window may have more keys (m_g) than queries: Hiera.
        keys = apart + sum(part.window_share * math.log(part.distances.shape[-1]) for part in parts)
        whole = apart / math.sqrt(math.log(_tokens(parts)) * keys) if apart else 0.0
        return {"uniform": 0.0, "uniform_global": whole}

    def summarize(self, traces: Traces) -> xr.Dataset:
        """As every metric, and `nmi_density` (layer, density_at), which integrates to 1 over the real line.

        NaN for a layer of one head, or whose heads are all alike.
        """
        result = super().summarize(traces)
        at = np.linspace(0, 1, 101)
        density = np.stack([_density(heads[~np.isnan(heads)], at) for heads in result["nmi"].values])
        drawn = {
            "units": "1",
            "role": "density",
            "picture": "profile",
            "long_name": "density of a layer's heads over NMI",
        }
        result["nmi_density"] = (("layer", "density_at"), density, drawn)
        return result.assign_coords(density_at=("density_at", at, {"units": "1", "long_name": "NMI"}))

    def _stats(self, layer: Layer) -> AttentionStats:
        if not self.eps:
            return layer.attention_stats
        a = layer.attention_full[:, :, layer.prefix :, layer.prefix :]
        return stats_from_probabilities(a + self.eps, layer.distances)


def _density(heads: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Density of a layer's heads at the places `at`, by Gaussian kernels.

    None is narrower than the places' distance: it would lie between two of them.
    """
    from scipy.stats import gaussian_kde  # takes long to import

    if len(heads) < 2 or np.ptp(heads) < _NO_SPREAD:
        return np.full(len(at), np.nan)
    estimate = gaussian_kde(heads)
    if math.sqrt(estimate.covariance.item()) < at[1] - at[0]:
        estimate.set_bandwidth((at[1] - at[0]) / heads.std(ddof=1))
    return estimate(at)


def _tokens(parts: list[Layer]) -> int:
    return sum(part.window_count * part.tokens_count for part in parts)


def _partition_entropy(parts: list[Layer]) -> float:
    """H(G) in nats: of the window a token is in; 0 when attention is global."""
    return sum(p.window_share * math.log(p.window_count / p.window_share) for p in parts)


def _ratio(information: Tensor, query_entropy: float, key_entropy: Tensor) -> Tensor:
    """I / sqrt(H(q) H(k)) in [0, 1]; 0/0, where there is but one query or one key, is 0.

    As I <= H(k), the ratio is below 1e-6 before H(k) is too small (1e-12) to be told from 0.
    """
    ratio = information / (query_entropy * key_entropy).sqrt()
    return (
        ratio.masked_fill(key_entropy < 1e-12, 0).clamp(0, 1)
        if query_entropy > 0
        else torch.zeros_like(ratio)
    )
