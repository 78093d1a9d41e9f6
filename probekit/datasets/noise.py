"""Noise in one band of spatial frequencies, added to normalised pixels: a variant of any dataset.

After FreqAttack with Random in the code of Park & Kim 2022 (How Do Vision Transformers Work?, ICLR 2022; file
ops/adversarial.py), the noise of Park et al. 2023, Fig. 8b.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch

from probekit.errors import UsageError

EQUAL_RMS = 0.3
"""RMS of ``energy="equal"`` noise in units of eps: about the published ring's at the middle frequency."""


@dataclass(frozen=True)
class BandNoise:
    """Adds noise to a normalised (3, rows, cols) image: white +-eps, of which only one band is kept.

    frequency:  the band's middle, in units of pi: 0 is constant, 1 alternates from pixel to pixel
    half_width: half the band's width, in units of pi
    eps:        what the white noise is before filtering, in the network's normalised units
    energy:     "ring", as published: higher bands hold more frequencies, so up to ten times the noise;
                "equal": each image's noise rescaled to an RMS of ``eps * EQUAL_RMS``
    symmetric:  the band is ``frequency - half_width <= max(|fy|, |fx|) < frequency + half_width`` on the
                frequencies of the discrete transform. Otherwise, as published: centred squares of an even
                width, which leave f in and -f out at their edges; what isn't real after that is dropped.
                Published for square images of an even size only
    seed:       of the noise: with the image's index it decides it, whatever the band

    Nothing is clipped. A band too narrow to hold a frequency of so small an image adds nothing ("ring") or
    can't be used ("equal"). Raises `UsageError` for settings and image sizes that make no sense.
    """

    frequency: float
    half_width: float = 0.05
    eps: float = 0.7
    energy: Literal["ring", "equal"] = "ring"
    symmetric: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.frequency <= 1:
            raise UsageError(
                f"noise can't have frequency {self.frequency:g}", hint="it is 0 to 1, in units of pi"
            )
        for name in ("half_width", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"noise can't have {name} {getattr(self, name):g}", hint="it is above 0")
        if self.energy not in ("ring", "equal"):
            raise UsageError(f"noise can't have energy {self.energy!r}", hint="it is 'ring' or 'equal'")
        if not 0 <= self.seed < 1 << 64:
            raise UsageError(f"noise can't have seed {self.seed}", hint="it is 0 or more, and below 2 ** 64")

    def __call__(self, pixels: torch.Tensor, index: int) -> torch.Tensor:
        """The image at dataset index `index`, (3, rows, cols), with its noise."""
        shape = tuple(pixels.shape)
        weights = torch.from_numpy(self._weights(shape))
        rows, cols = shape[-2:]
        white = torch.from_numpy(_rademacher(self.seed, index, shape))
        # a real image's spectrum times weights that are the same at f and -f: the half of it says all
        noise = torch.fft.irfft2(torch.fft.rfft2(white) * weights[:, : cols // 2 + 1], s=(rows, cols))
        scale = self.eps
        if self.energy == "equal":
            scale *= EQUAL_RMS / noise.double().square().mean().sqrt().item()
        return pixels + (scale * noise).to(pixels.dtype)

    def rms(self, shape: tuple[int, ...]) -> float:
        """Root of the expected square of the noise added to a pixel of a (..., rows, cols) image."""
        weights = self._weights(shape)
        share = (
            EQUAL_RMS if self.energy == "equal" else math.sqrt(np.mean(np.square(weights, dtype=np.float64)))
        )
        return self.eps * share

    def _weights(self, shape: tuple[int, ...]) -> np.ndarray:
        rows, cols = shape[-2:]
        if self.symmetric:
            weights = _symmetric_band(self.frequency, self.half_width, rows, cols)
        elif rows != cols or rows % 2:
            raise UsageError(
                f"the published noise band is not defined on {rows} x {cols} pixels, only on even squares",
                hint="choose the symmetric one: symmetric=true",
            )
        else:
            weights = _published_band(self.frequency, self.half_width, rows)
        if self.energy == "equal" and not weights.any():
            raise UsageError(
                f"an image of {rows} x {cols} pixels has no frequency in the band at {self.frequency:g} pi",
                hint="give a greater half_width, or energy=ring, which then adds nothing",
            )
        return weights


def _rademacher(seed: int, index: int, shape: tuple[int, ...]) -> np.ndarray:
    """+1 or -1, float32: signs of white Gaussian noise, from raw bits, the same with every numpy."""
    count = math.prod(shape)
    raw = np.random.Philox(key=np.array([seed, index], np.uint64)).random_raw(-(-count // 64))
    bits = np.unpackbits(raw.astype("<u8").view(np.uint8), count=count)
    return (bits.astype(np.float32) * 2 - 1).reshape(shape)


@lru_cache(maxsize=64)
def _published_band(frequency: float, half_width: float, size: int) -> np.ndarray:
    """(size, size) float32 weights in the order of `fftfreq`: 1 in the band, 1/2 at edges of one side only.

    Dropping the imaginary part of the filtered noise averages the mask with its mirror image under f -> -f.
    """
    number = np.rint(np.fft.fftfreq(size) * size)
    mask = np.zeros((size, size))
    for edge, value in ((frequency + half_width, 1.0), (frequency - half_width, 0.0)):
        # int((f + s) h / 2 pi) of the published code; a product like 27.999... that should be 28 counts as 28
        half = min(math.floor(edge * size / 2 + 1e-9), size // 2)
        inside = (number >= -half) & (number < half)
        mask[np.ix_(inside, inside)] = value
    mirrored = np.roll(mask[::-1, ::-1], 1, axis=(0, 1))
    return ((mask + mirrored) / 2).astype(np.float32)


@lru_cache(maxsize=64)
def _symmetric_band(frequency: float, half_width: float, rows: int, cols: int) -> np.ndarray:
    high, wide = (np.abs(np.fft.fftfreq(size)) * 2 for size in (rows, cols))  # in units of pi
    f = np.maximum(high[:, None], wide[None, :])
    low, top = frequency - half_width - 1e-9, frequency + half_width - 1e-9
    return ((f >= low) & (f < top)).astype(np.float32)
