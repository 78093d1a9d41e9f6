"""Eigenvalues of covariances, for the spectra over tokens and over images (Park et al., ICLR 2023, Fig. 7).

The paper plots "singular values of the distribution"; by its author's pseudo-code (naver-ai/cl-vs-mim, issue
2) these are the singular values, so the eigenvalues, of the *unbiased covariance*: lambda_i = sigma_i^2 /
(n - 1) with sigma_i those of the centred data. A difference of log lambda is twice that of log sigma.
"""

from __future__ import annotations

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from probekit.attention import exact_float32, product

RANKS = (64, 128)
"""1-based, drawn against depth in Fig. 7."""

CURVE = "rank 64 (the last where there are fewer) relative to rank 2"

_ROWS = 4096  # converted to float64 at once


def covariance_eigenvalues(x: Tensor) -> Tensor:
    """Of the unbiased covariance of N vectors: (B, N, C) -> (B, min(N - 1, C)) float64, largest first.

    From the Gram matrix where it is the smaller one: its eigenvalues are the same. N is at least 2.
    """
    if x.device.type == "mps":  # it has no float64
        x = x.cpu()
    n, c = x.shape[1:]
    with exact_float32(x.device):
        x = x.double()
        x = x - x.mean(1, keepdim=True)
        scatter = product(x, x.mT) if n <= c else product(x.mT, x)
        return _largest_first(scatter / (n - 1), min(n - 1, c))


def covariance_eigenvalues_of_many(x: np.ndarray) -> Tensor:
    """The same for one set (n, C), n large: (min(n - 1, C),). Memory beside `x` stays with C^2."""
    n, c = x.shape
    if n <= c:
        return covariance_eigenvalues(torch.from_numpy(x)[None])[0]
    mean, scatter = x.mean(0, dtype=np.float64), np.zeros((c, c))
    for start in range(0, n, _ROWS):
        centred = x[start : start + _ROWS] - mean
        scatter += centred.T @ centred
    return _largest_first(torch.from_numpy(scatter / (n - 1)), c)


def logs(eigenvalues: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Natural logarithms (..., ranks), and how many of them were raised to the floor, (...).

    The floor is size * 2.2e-16 * the largest eigenvalue, where rounding in float64 starts; `size` is the
    larger side of the data. Where all are zero it is 2.2e-308.
    """
    floor = _floor(eigenvalues, size)
    return torch.maximum(eigenvalues, floor).log(), (eigenvalues < floor).sum(-1)


def effective_rank(eigenvalues: Tensor, size: int) -> Tensor:
    """exp of the entropy of p_i = sigma_i / sum sigma, sigma_i = sqrt(lambda_i): (..., ranks) -> (...).

    The formula of Roy and Vetterli 2007 and of RankMe (Garrido et al., ICML 2023), of *centred* data, which
    RankMe doesn't centre, and without its 1e-7. 0 where all eigenvalues are zero.
    """
    sigma = eigenvalues.where(eigenvalues >= _floor(eigenvalues, size), 0).sqrt()
    total = sigma.sum(-1, keepdim=True)
    entropy = torch.special.entr(sigma / total.masked_fill(total == 0, 1)).sum(-1)
    return entropy.exp().where(total[..., 0] > 0, 0)


def relative_to_second(spectrum: np.ndarray, rank: int, *, or_last: bool = False) -> np.ndarray:
    """log lambda at a 1-based rank less that at rank 2: (..., rows, ranks) -> (..., rows).

    NaN where a row has no such rank; with `or_last` its last one is taken.
    """
    found = np.full(spectrum.shape[:-1], np.nan)
    for row in range(spectrum.shape[-2]):
        values = spectrum[..., row, :]
        count = int((~np.isnan(values)).any(tuple(range(values.ndim - 1))).sum())
        place = min(rank, count) if or_last else rank
        if 2 <= place <= count:
            found[..., row] = values[..., place - 1].astype(np.float64) - values[..., 1]
    return found


def relative_variables(spectrum: np.ndarray) -> dict[str, xr.Variable]:
    """``relative_to_second`` and ``relative_to_first`` (layer, rank) of a spectrum (layer, rank).

    The first is what the paper draws (Fig. 7).
    """
    found = {}
    for name, place in (("relative_to_second", 1), ("relative_to_first", 0)):
        values = (
            spectrum - spectrum[:, place, None]
            if spectrum.shape[1] > place
            else np.full_like(spectrum, np.nan)
        )
        attrs = {"units": "nats", "role": "mean"}
        if place == 1:
            attrs |= {"picture": "profile", "long_name": "log eigenvalues relative to the second"}
        found[name] = xr.Variable(("layer", "rank"), values, attrs)
    return found


def rank_coordinate(spectrum: np.ndarray) -> xr.Variable:
    """1-based."""
    return xr.Variable(("rank",), np.arange(1, spectrum.shape[1] + 1))


def _floor(eigenvalues: Tensor, size: int) -> Tensor:
    numbers = torch.finfo(torch.float64)
    return (size * numbers.eps * eigenvalues[..., :1]).clamp(min=numbers.tiny)


def _largest_first(matrices: Tensor, count: int) -> Tensor:
    return torch.linalg.eigvalsh(matrices).flip(-1)[..., :count].clamp(min=0)
