"""Spatial frequencies of the tokens (Park et al., ICLR 2023, Fig. 9)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from probekit.attention import exact_float32, product
from probekit.errors import DoesNotApply, UsageError
from probekit.metric import Metric, Traces
from probekit.metrics.compat import refuse_beside

if TYPE_CHECKING:
    import xarray as xr

    from probekit.layer import Layer


class Fourier(Metric):
    """Log amplitude of the 2-D Fourier transform of the token map, at frequencies (f, f), natural log.

        F[c](f) = sum over tokens (row, col) of x[row, col, c] exp(-2 pi i f (row + col))
        log_amplitude(f) = mean over channels c of log(|F[c](f)| + 1e-6)
        fourier(f) = log_amplitude(f) - log_amplitude(0)

    f = k / min(rows, cols) for k = 0 .. ceil(min(rows, cols) / 2) - 1: the published code's half diagonal,
    which stops before the Nyquist frequency (6/7 pi on a 14 x 14 grid, labelled pi there). So grids of
    different size are measured at different frequencies: compare along the axis `frequency`, |f| per axis in
    units of pi. Where f is no frequency of the longer axis' discrete transform, log(|F| + 1e-6) is
    interpolated linearly between the two of its frequencies beside f. (F at f itself would not do: along that
    axis no whole number of periods fits, so whatever varies along the other axis alone would leak in.)

    dc: ``include`` subtracts frequency 0, as published, which confounds "little high frequency" with "a large
    mean"; ``exclude`` subtracts the lowest frequency above it, and does not apply where that is the only one
    (sides of 3 and 4).
    average: ``logs`` over channels, as published; ``amplitudes`` before one logarithm of their mean, so that
    large channels decide and constant ones hardly count.
    fourier_common: `fourier` at one frequency, 0.75 pi, for comparing grids of different size, linear between
    its neighbours; at the last one on a grid that ends before (sides of 3, 4 and 6).
    floor_channels: share of channels with nothing above frequency 0 (all amplitudes below 1e-6): constant
    ones draw the mean of logarithms down by as much as 19 each.
    """

    name = "fourier"
    version = 2
    needs = frozenset({"tokens"})
    dims: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "fourier": ("frequency",),
        "log_amplitude": ("frequency",),
        "fourier_common": (),
        "floor_channels": (),
    }
    units: ClassVar[Mapping[str, str]] = {
        "fourier": "nats",
        "log_amplitude": "nats",
        "fourier_common": "nats",
        "floor_channels": "1",
        "frequency": "pi",
    }
    figure = "Fig. 9"
    windows = "own"  # the whole feature map, whatever the attention's windows
    curve = "last"
    eps = 1e-6
    common = 0.75  # pi

    def __init__(self, compat: str = "", dc: str = "include", average: str = "logs"):
        super().__init__(compat=compat, dc=dc, average=average)
        if dc not in ("include", "exclude"):
            raise UsageError(f"dc is 'include' or 'exclude', not '{dc}'")
        refuse_beside(compat, "dc", dc, "include")
        if average not in ("logs", "amplitudes"):
            raise UsageError(f"average is 'logs' or 'amplitudes', not '{average}'")
        refuse_beside(compat, "average", average, "logs")
        self.average = average
        self.reference = 0 if dc == "include" else 1
        self.conventions = {
            "definition": "Park et al. 2023, Fig. 9; cl-vs-mim, representation_analysis.ipynb",
            "prefix": "dropped",
            "log": f"natural, of {'each channel' if average == 'logs' else 'the mean'}'s amplitude",
            "averaging": f"{'logarithms' if average == 'logs' else 'amplitudes'} over channels, per image; "
            "then means",
            "eps": self.eps,
            "reference": "frequency 0" if dc == "include" else "lowest frequency above 0",
            "common": f"{self.common} pi, linear between its neighbours, or the grid's last below it",
            "frequencies": "(f, f), f = k / min(rows, cols), below Nyquist; no window, no normalisation",
            "interpolation": "of log amplitudes, along the longer axis where f is no frequency of it",
            "reading": (
                "The higher, the more the tokens differ between neighbours, relative to what they share."
            ),
            "does_not_show": (
                "A large mean over tokens lowers it as a lack of detail does: see log_amplitude, or "
                "dc=exclude. Grids of different size end at different frequencies."
            ),
        }

    def measure(self, layer: Layer) -> Mapping[str, Tensor]:
        """(B, F), (B, F), (B,) and (B,)."""
        rows, cols = layer.grid
        self._check(rows, cols)
        if max(rows, cols) % min(rows, cols) == 0:
            amplitude = diagonal_amplitudes(layer.tokens, rows, cols)
            log_amplitude = self._log(amplitude)
        else:
            amplitude, share = amplitudes_beside(layer.tokens, rows, cols)
            logs = self._log(amplitude)
            log_amplitude = torch.cat([logs[:, :1], torch.lerp(logs[:, 1::2], logs[:, 2::2], share)], 1)
        relative = log_amplitude - log_amplitude[:, self.reference, None]
        low, share = divmod(self._common_bin(rows, cols), 1)
        neighbours = relative[:, int(low)], relative[:, min(int(low) + 1, _count(rows, cols) - 1)]
        return {
            "fourier": relative,
            "log_amplitude": log_amplitude,
            "fourier_common": torch.lerp(*neighbours, share),
            "floor_channels": (amplitude[:, 1:].amax(1) < self.eps).float().mean(-1),
        }

    def _log(self, amplitude: Tensor) -> Tensor:
        """(B, F, C) -> (B, F)"""
        if self.average == "amplitudes":
            return (amplitude.mean(-1) + self.eps).log()
        return (amplitude + self.eps).log().mean(-1)

    def describe(self, layer: Layer) -> Mapping[str, np.ndarray]:
        """The axis `frequency` in units of pi, and `white_noise`, what `fourier` is for independent tokens.

        Not 0: the amplitude at frequency 0 is that of a real normal variable (mean sqrt(2/pi), E log
        -(gamma + log 2)/2), at others of a complex one (sqrt(pi)/2, -gamma/2).
        """
        rows, cols = layer.grid
        self._check(rows, cols)
        frequency = 2 * np.arange(_count(rows, cols)) / min(rows, cols)
        above = 0.5 * math.log(2) if self.average == "logs" else math.log(math.pi / math.sqrt(8))
        white_noise = np.where(frequency > 0, above, 0.0)
        return {"frequency": frequency, "white_noise": white_noise - white_noise[self.reference]}

    def summarize(self, traces: Traces) -> xr.Dataset:
        """As every metric; `fourier` is drawn over frequency too."""
        result = super().summarize(traces)
        relative = "frequency 0" if not self.reference else "the lowest frequency above 0"
        result[self.name].attrs |= {
            "picture": "profile",
            "long_name": f"log amplitude relative to {relative}",
        }
        result[f"{self.name}_curve"].attrs["long_name"] = "relative log amplitude"
        return result

    def _check(self, rows: int, cols: int) -> None:
        above = _count(rows, cols) - 1
        if above < 1:
            raise DoesNotApply(f"a grid of {rows} x {cols} tokens has no frequency between 0 and Nyquist")
        if self.reference and above == 1:
            raise DoesNotApply(f"a grid of {rows} x {cols} tokens has one frequency above 0: dc=exclude is 0")

    def _common_bin(self, rows: int, cols: int) -> float:
        """The common frequency in steps of this grid's axis."""
        return min(self.common * min(rows, cols) / 2, _count(rows, cols) - 1)


def diagonal_amplitudes(tokens: Tensor, rows: int, cols: int) -> Tensor:
    """|F| at the frequencies (f, f), (B, F, C), of maps (B, rows * cols, C) whose sides divide each other.

    F depends on row + col modulo min(rows, cols) alone, so tokens are added along those diagonals first and
    their sums transformed after their mean is taken off: a constant map then has nothing above frequency 0,
    to the last bit where its sums are exact.
    """
    batch = len(tokens)
    with exact_float32(tokens.device):
        diagonals, waves = _matrices(rows, cols, tokens.device)
        sums = product(diagonals.expand(batch, -1, -1), tokens.float())
        mean = sums.mean(1, keepdim=True)
        real, imaginary = product(waves.expand(batch, -1, -1), sums - mean).chunk(2, 1)
        above = real.square().addcmul_(imaginary, imaginary).sqrt_()
        return torch.cat([(mean * len(diagonals)).abs_(), above], 1)


def amplitudes_beside(tokens: Tensor, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """|F| at 0 and at the two frequencies of the discrete transform beside each (f, f), below and above it,
    (B, 1 + 2 (F - 1), C); and the upper one's share, (F - 1).

    The mean is taken off first, so that a constant map has nothing above frequency 0.
    """
    batch = len(tokens)
    with exact_float32(tokens.device):
        ones, waves, share = _waves_beside(rows, cols, tokens.device)
        tokens = tokens.float()
        total = product(ones.expand(batch, -1, -1), tokens)
        real, imaginary = product(waves.expand(batch, -1, -1), tokens - total / (rows * cols)).chunk(2, 1)
        above = real.square().addcmul_(imaginary, imaginary).sqrt_()
        return torch.cat([total.abs_(), above], 1), share


@lru_cache(maxsize=32)
def _waves_beside(rows: int, cols: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(1, N) ones; (4 (F - 1), N) cosines over sines, at each k = 1 .. F - 1 of the shorter axis with the
    integers below and above k * long / short of the longer; (F - 1) shares of the upper ones."""
    short, long = sorted((rows, cols))
    k = torch.arange(1, _count(rows, cols))
    low, rest = k * long // short, k * long % short
    beside = torch.stack([low, low + (rest > 0)], 1).flatten()
    k = k.repeat_interleave(2)
    r, c = (axis.flatten() for axis in torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij"))
    s, t = (r, c) if rows == short else (c, r)
    # k s / short + beside t / long periods, as integers over rows * cols: exact for large grids
    periods = (k[:, None] * s * long + beside[:, None] * t * short) % (rows * cols)
    angle = 2 * math.pi / (rows * cols) * periods.double()
    waves = torch.cat([angle.cos(), angle.sin()]).float()
    return torch.ones(1, rows * cols, device=device), waves.to(device), (rest / short).to(device)


@lru_cache(maxsize=32)
def _matrices(rows: int, cols: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(S, N) ones where row + col = s modulo S = min(rows, cols); (2 (F - 1), S) cosines over sines."""
    size = min(rows, cols)
    s = (torch.arange(rows)[:, None] + torch.arange(cols)).flatten() % size
    diagonals = torch.nn.functional.one_hot(s, size).T.float()
    k = torch.arange(1, _count(rows, cols))
    # The product modulo S keeps the angles, and so their cosines, exact for large grids.
    angle = 2 * math.pi / size * (k[:, None] * torch.arange(size) % size).double()
    return diagonals.to(device), torch.cat([angle.cos(), angle.sin()]).float().to(device)


def _count(rows: int, cols: int) -> int:
    """Frequencies from 0 to below Nyquist."""
    return -(-min(rows, cols) // 2)
