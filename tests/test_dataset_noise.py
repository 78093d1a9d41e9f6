"""Band noise: the published filter written from its definition, its RMS, and what any noise must be."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probekit.datasets.noise import EQUAL_RMS, BandNoise
from probekit.errors import UsageError

# METRICS.md 10, one draw each on 224 x 224 pixels at eps 1: for half widths of .05 pi, .1 pi and 0.2 rad
TABLE = {
    0.05: [0.042, 0.133, 0.201, 0.237, 0.273, 0.305, 0.333, 0.378, 0.387, 0.410, 0.316],
    0.1: [0.096, 0.194, 0.275, 0.337, 0.400, 0.446, 0.479, 0.517, 0.552, 0.604, 0.446],
    0.2 / math.pi: [0.060, 0.154, 0.218, 0.267, 0.308, 0.359, 0.380, 0.410, 0.437, 0.464, 0.365],
}


def published(white: np.ndarray, f: float, s: float) -> np.ndarray:
    """The filtered noise, complex, float64, step by step: f and s in radians, even squares."""
    h = white.shape[-1]
    spectrum = np.roll(np.fft.fft2(white), (h // 2, h // 2), (-2, -1))
    mask = np.zeros((h, h))
    for edge, sign in ((f + s, 1), (f - s, -1)):
        width = max(0, min(h, 2 * int(edge * h / (2 * math.pi))))
        start = (h - width) // 2
        mask[start : start + width, start : start + width] += sign
    kept = mask * np.abs(spectrum) * np.exp(1j * np.angle(spectrum))
    return np.fft.ifft2(np.roll(kept, (h // 2, h // 2), (-2, -1)))


def added(noise: BandNoise, shape: tuple[int, int, int], index: int = 0) -> np.ndarray:
    return noise(torch.zeros(shape, dtype=torch.float64), index).numpy()


def white(seed: int, index: int, shape: tuple[int, int, int]) -> np.ndarray:
    """All of the noise before filtering: a band that holds every frequency."""
    return added(BandNoise(0.5, half_width=0.6, eps=1.0, symmetric=True, seed=seed), shape, index)


@pytest.mark.parametrize("size", [224, 64, 32])
@pytest.mark.parametrize("half_width", [0.05, 0.1, 0.2 / math.pi])
def test_the_band_is_the_published_one(size: int, half_width: float) -> None:
    shape = (3, size, size)
    signs = np.rint(white(5, 7, shape))
    for step in range(11):
        noise = BandNoise(step / 10, half_width, eps=0.7, seed=5)
        expected = 0.7 * published(signs, step / 10 * math.pi, half_width * math.pi).real
        # float32 transforms of +-1: errors of about 1e-7 of the noise's own size, 1
        assert np.abs(added(noise, shape, 7) - expected).max() < 1e-6


@pytest.mark.parametrize("half_width", TABLE)
def test_the_rms_is_that_of_the_table(half_width: float) -> None:
    for step, expected in enumerate(TABLE[half_width]):
        noise = BandNoise(step / 10, half_width, eps=0.5, seed=1)
        # the table's are single draws: the square of about 300 frequencies scatters by 8 %, its root by 4
        loose = 0.08 if step == 0 else 0.025
        assert noise.rms((224, 224)) == pytest.approx(0.5 * expected, rel=loose)
        draws = [np.mean(added(noise, (3, 224, 224), k) ** 2) for k in range(8)]
        assert math.sqrt(np.mean(draws)) == pytest.approx(noise.rms((3, 224, 224)), rel=loose / 2)


def test_a_fifth_of_the_published_filters_noise_is_imaginary() -> None:
    ratios = []
    for step in range(1, 10):
        z = published(white(0, 0, (3, 224, 224)), step / 10 * math.pi, 0.05 * math.pi)
        ratios.append(np.sqrt(np.mean(z.imag**2) / np.mean(z.real**2)))
    assert 0.15 < np.mean(ratios) < 0.3


def test_white_noise_is_plus_or_minus_one_evenly() -> None:
    signs = white(0, 0, (3, 224, 224))
    assert np.abs(np.abs(signs) - 1).max() < 1e-5
    assert abs(signs.mean()) < 4 / math.sqrt(signs.size)
    assert abs((signs[:, 1:] * signs[:, :-1]).mean()) < 4 / math.sqrt(signs.size)
    assert abs((signs[0] * signs[1]).mean()) < 4 / 224


@given(
    rows=st.integers(4, 40),
    cols=st.integers(4, 40),
    band=st.floats(0, 1),
    half_width=st.floats(0.02, 0.5),
    seed=st.integers(0, 2**64 - 1),
)
def test_a_symmetric_band_holds_its_frequencies_and_no_other(
    rows: int, cols: int, band: float, half_width: float, seed: int
) -> None:
    """On any size, odd or not: filtering is a projection, so band and rest are orthogonal and add up."""
    shape = (3, rows, cols)
    found = added(BandNoise(band, half_width, 1.0, symmetric=True, seed=seed), shape, 3)
    spectrum = np.abs(np.fft.fft2(found))
    f = np.maximum(
        2 * np.abs(np.fft.fftfreq(rows))[:, None], 2 * np.abs(np.fft.fftfreq(cols))[None, :]
    ) * np.ones(shape)
    outside = (f < band - half_width - 1e-6) | (f > band + half_width + 1e-6)
    assert spectrum[outside].max(initial=0) < 1e-3
    rest = np.rint(white(seed, 3, shape)) - found
    assert abs((rest * found).mean()) < 1e-6
    clearly = (f > band - half_width + 1e-6) & (f < band + half_width - 1e-6)
    expected = np.abs(np.fft.fft2(np.rint(white(seed, 3, shape))))
    assert np.abs(spectrum - expected)[clearly].max(initial=0) < 1e-3


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("step", range(11))
def test_equal_energy_is_equal(step: int, symmetric: bool) -> None:
    noise = BandNoise(step / 10, eps=0.7, energy="equal", symmetric=symmetric)
    found = added(noise, (3, 64, 64), step)
    assert math.sqrt(np.mean(found**2)) == pytest.approx(0.7 * EQUAL_RMS, rel=1e-6)
    assert noise.rms((64, 64)) == 0.7 * EQUAL_RMS
    ring = added(BandNoise(step / 10, eps=0.7, symmetric=symmetric), (3, 64, 64), step)
    ratio = np.sqrt(np.mean(found**2) / np.mean(ring**2))
    assert np.abs(found - ratio * ring).max() < 1e-6  # the same noise, rescaled


def test_noise_is_the_indexs_own_and_repeatable() -> None:
    noise = BandNoise(0.3, seed=4)
    again = pickle.loads(pickle.dumps(noise))
    pixels = torch.linspace(-2, 2, 3 * 32 * 32).reshape(3, 32, 32)
    before = torch.get_rng_state()
    found = noise(pixels, 12)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(found, again(pixels, 12))
    assert found.dtype == torch.float32
    assert torch.allclose(found - pixels, noise(0 * pixels, 12), atol=1e-6)  # added; nothing clipped
    assert not torch.equal(found, noise(pixels, 13))
    assert not torch.equal(found, BandNoise(0.3, seed=5)(pixels, 12))


def test_a_band_without_a_frequency() -> None:
    assert not added(BandNoise(0.0, 0.05), (3, 32, 32)).any()  # int(.05 * 16) is 0
    assert BandNoise(0.0, 0.05).rms((32, 32)) == 0
    with pytest.raises(UsageError, match="32 x 32 pixels has no frequency in the band at 0 pi") as caught:
        added(BandNoise(0.0, 0.05, energy="equal"), (3, 32, 32))
    assert "half_width" in caught.value.hint


@pytest.mark.parametrize("size", [(32, 64), (33, 33)])
def test_sizes_the_published_band_is_not_defined_on(size: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match=f"not defined on {size[0]} x {size[1]} pixels") as caught:
        BandNoise(0.5)(torch.zeros(3, *size), 0)
    assert "symmetric=true" in caught.value.hint
    assert BandNoise(0.5, symmetric=True).rms(size) > 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"frequency": 1.2},
        {"frequency": math.nan},
        {"half_width": 0},
        {"eps": -1},
        {"energy": "x"},
        {"seed": -1},
    ],
)
def test_settings_that_make_no_sense(wrong: dict) -> None:
    with pytest.raises(UsageError, match="noise can't have"):
        BandNoise(**{"frequency": 0.5, **wrong})
