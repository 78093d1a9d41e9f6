"""Fourier amplitudes of the tokens: against a full FFT, interpolated on oblong grids, and known spectra."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probekit.errors import DoesNotApply, UsageError
from probekit.metrics.fourier import Fourier


def layer_of(maps):
    """Maps (B, rows, cols, C) as a layer has them."""
    maps = torch.tensor(np.ascontiguousarray(maps))
    return SimpleNamespace(tokens=maps.flatten(1, 2).float(), grid=tuple(maps.shape[1:3]), batch=len(maps))


def measure(maps, **options):
    values = Fourier(**options).measure(layer_of(maps))
    assert all(v.dtype == torch.float32 for v in values.values())
    return {name: v.numpy() for name, v in values.items()}


def noise(batch, rows, cols, channels, seed=0, offset=0.0):
    return np.random.default_rng(seed).standard_normal((batch, rows, cols, channels)) + offset


def notebook(maps):
    """The published cell for each image: fft2, log(|F| + 1e-6), rolled so that 0 is in the middle, mean over
    channels, the main diagonal from the middle on. Square grids, float64."""
    side = maps.shape[1]
    spectrum = np.fft.fft2(np.moveaxis(np.asarray(maps, dtype=np.float64), -1, 1))
    logs = np.log(np.abs(spectrum) + 1e-6)
    logs = np.roll(logs, (side // 2, side // 2), axis=(2, 3)).mean(1)
    return np.diagonal(logs, axis1=1, axis2=2)[:, side // 2 :]


def interpolated(maps):
    """fft2's log(|F| + 1e-6), along the longer axis by numpy's linear interpolation at f = k / min(rows, cols).
    float64."""
    maps = np.moveaxis(np.asarray(maps, dtype=np.float64), -1, 1)
    logs = np.log(np.abs(np.fft.fft2(maps)) + 1e-6).mean(1)
    if logs.shape[1] > logs.shape[2]:
        logs = logs.swapaxes(1, 2)
    _, short, long = logs.shape
    frequencies = np.arange(long) / long
    return np.array(
        [[np.interp(k / short, frequencies, image[k]) for k in range(math.ceil(short / 2))] for image in logs]
    )


@pytest.mark.parametrize("side", [3, 4, 7, 8, 14, 16, 27])
@pytest.mark.parametrize("compat", ["", "cl-vs-mim"])
def test_agrees_with_the_published_code(side, compat):
    maps = noise(3, side, side, 24, offset=0.7)
    got, expected = measure(maps, compat=compat), notebook(maps)
    np.testing.assert_allclose(got["log_amplitude"], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got["fourier"], expected - expected[:, :1], rtol=1e-5, atol=1e-5)
    assert (got["fourier"][:, 0] == 0).all()


OBLONG = [(4, 9), (9, 4), (14, 15), (14, 20), (27, 55), (6, 9), (5, 14), (3, 4), (3, 12), (6, 12), (7, 28)]


@pytest.mark.parametrize(("rows", "cols"), [(14, 14), (5, 5), *OBLONG])
def test_agrees_with_interpolated_log_amplitudes(rows, cols):
    maps = noise(2, rows, cols, 16, offset=0.7)
    np.testing.assert_allclose(measure(maps)["log_amplitude"], interpolated(maps), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "cols"), [(14, 14), *OBLONG])
@pytest.mark.parametrize("along", ["rows", "cols"])
def test_what_varies_along_one_axis_only_is_not_seen(rows, cols, along):
    """Whole numbers: their sums are exact, and what is left is the rounding of the cosines."""
    line = np.random.default_rng(1).integers(-9, 10, (2, rows if along == "rows" else cols, 8))
    maps = np.broadcast_to(line[:, :, None] if along == "rows" else line[:, None], (2, rows, cols, 8))
    got = measure(maps)["log_amplitude"]
    np.testing.assert_allclose(got[:, 0], interpolated(maps)[:, 0], rtol=1e-5)
    assert (got[:, 1:] < math.log(1e-3)).all()


@pytest.mark.parametrize("grid", [(14, 15), (4, 9), (27, 20)])
def test_constant_oblong_map_is_at_the_floor(grid):
    maps = np.full((2, *grid, 5), 0.1)
    maps[1, ..., 3] = noise(1, *grid, 1)[0, ..., 0]
    got = measure(maps)
    np.testing.assert_allclose(got["log_amplitude"][0, 1:], math.log(1e-6), atol=1e-3)
    assert got["floor_channels"].tolist() == [1, pytest.approx(4 / 5)]


@pytest.mark.parametrize(("side", "last"), [(7, 6 / 7), (14, 6 / 7), (16, 0.875), (27, 0.963), (31, 0.968)])
def test_frequency_axis(side, last):
    layer = layer_of(noise(1, side, side, 2))
    found = Fourier().describe(layer)
    assert (
        len(found["frequency"]) == len(measure(noise(1, side, side, 2))["fourier"][0]) == math.ceil(side / 2)
    )
    assert found["frequency"][0] == 0
    assert found["frequency"][-1] == pytest.approx(last, abs=6e-4)
    np.testing.assert_allclose(np.diff(found["frequency"]), 2 / side)


@pytest.mark.parametrize("side", [7, 14, 16])
def test_white_noise_is_half_log_two(side):
    maps = noise(16, side, side, 2000, seed=3)
    got = measure(maps)["fourier"].mean(0)
    expected = Fourier().describe(layer_of(maps[:1]))["white_noise"]
    assert expected[0] == 0 and expected[1:] == pytest.approx(0.5 * math.log(2))
    np.testing.assert_allclose(got, expected, atol=0.03)
    without = Fourier(dc="exclude")
    np.testing.assert_allclose(
        without.measure(layer_of(maps))["fourier"].mean(0), expected - expected[1], atol=0.03
    )
    np.testing.assert_allclose(without.describe(layer_of(maps[:1]))["white_noise"], expected - expected[1])


@pytest.mark.parametrize("grid", [(8, 16), (8, 20), (15, 14)])
def test_white_noise_on_an_oblong_grid(grid):
    maps = noise(16, *grid, 1000, seed=4)
    np.testing.assert_allclose(
        measure(maps)["fourier"].mean(0), Fourier().describe(layer_of(maps[:1]))["white_noise"], atol=0.03
    )


def test_the_mean_confounds_the_difference_but_not_the_spectrum():
    maps, moved = noise(4, 14, 14, 500), noise(4, 14, 14, 500, offset=10)
    a, b = measure(maps), measure(moved)
    assert b["fourier"][:, -1].mean() == pytest.approx(-5.23, abs=0.05)
    np.testing.assert_allclose(a["log_amplitude"][:, 1:], b["log_amplitude"][:, 1:], atol=1e-4)
    exclude = measure(moved, dc="exclude")["fourier"]
    np.testing.assert_allclose(exclude[:, 1:], measure(maps, dc="exclude")["fourier"][:, 1:], atol=1e-4)
    assert (exclude[:, 1] == 0).all()
    np.testing.assert_allclose(exclude, b["log_amplitude"] - b["log_amplitude"][:, 1:2], atol=1e-6)


@pytest.mark.parametrize("value", [1.0, -3.0, 0.1, 1.7e-3])
def test_constant_map_is_at_the_floor(value):
    maps = np.full((2, 14, 14, 5), value)
    got = measure(maps)
    np.testing.assert_allclose(got["log_amplitude"][:, 0], math.log(196 * abs(value) + 1e-6), rtol=1e-5)
    np.testing.assert_allclose(got["log_amplitude"][:, 1:], math.log(1e-6), atol=1e-3)
    if value == 1.0:
        np.testing.assert_allclose(got["fourier"][:, 1:], -19.09, atol=6e-3)
    assert (got["floor_channels"] == 1).all()


@pytest.mark.parametrize("size", [1e-9, 1e-7, 1e-5])
def test_amplitudes_near_the_floor(size):
    """The published epsilon is added, not a lower bound."""
    maps = noise(2, 14, 14, 24) * size
    np.testing.assert_allclose(measure(maps)["log_amplitude"], notebook(maps), rtol=1e-6, atol=1e-5)


def test_dead_and_constant_channels_are_counted():
    maps = noise(2, 14, 14, 8)
    maps[0, ..., :2] = 0  # dead
    maps[0, ..., 2] = 5  # constant
    assert measure(maps)["floor_channels"].tolist() == [3 / 8, 0]


@pytest.mark.parametrize("k", range(7))
def test_pure_frequencies(k):
    r, c = np.mgrid[:14, :14]
    wave = np.cos(2 * np.pi * k * (r + c) / 14 + 0.3)[None, ..., None]
    got = measure(wave)["log_amplitude"][0]
    peak = 196 * math.cos(0.3) if k == 0 else 98
    assert got[k] == pytest.approx(math.log(peak), abs=1e-5)
    assert (np.delete(got, k) < math.log(1e-4)).all()


def test_frequencies_off_the_diagonal_and_nyquist_are_not_seen():
    r, c = np.mgrid[:14, :14]
    for wave in (
        np.cos(2 * np.pi * 3 * r / 14),
        np.cos(np.pi * (r + c)),
        np.cos(2 * np.pi * 2 * (r - c) / 14),
    ):
        assert (measure(wave[None, ..., None])["log_amplitude"] < math.log(1e-4)).all()


@settings(max_examples=25, deadline=None)
@given(st.floats(1e-2, 1e4), st.integers(0, 2**20))
def test_scale_moves_the_spectrum_and_leaves_the_difference(factor, seed):
    maps = noise(2, 6, 6, 8, seed)
    a, b = measure(maps), measure(maps * factor)
    np.testing.assert_allclose(b["log_amplitude"], a["log_amplitude"] + math.log(factor), atol=2e-3)
    np.testing.assert_allclose(b["fourier"], a["fourier"], atol=2e-3)


@settings(max_examples=25, deadline=None)
@given(st.integers(3, 9), st.integers(3, 9), st.integers(0, 2**20))
def test_symmetries(rows, cols, seed):
    maps = noise(3, rows, cols, 6, seed)
    got = measure(maps)["log_amplitude"]
    np.testing.assert_allclose(measure(maps.swapaxes(1, 2))["log_amplitude"], got, atol=1e-4)
    np.testing.assert_allclose(measure(maps[:, ::-1, ::-1])["log_amplitude"], got, atol=1e-4)
    np.testing.assert_allclose(measure(maps[..., ::-1])["log_amplitude"], got, atol=1e-5)
    # a cyclic shift is a phase
    np.testing.assert_allclose(measure(np.roll(maps, (1, 2), (1, 2)))["log_amplitude"], got, atol=1e-4)


@pytest.mark.parametrize(
    ("grid", "channels"), [((14, 14), 96), ((32, 32), 48), ((7, 7), 33), ((14, 15), 96), ((27, 55), 33)]
)
def test_bits_depend_neither_on_the_batch_nor_on_threads(grid, channels):
    maps = noise(4, *grid, channels)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = measure(maps)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for i in range(4):
                alone = measure(maps[i : i + 1])
                assert all((alone[name] == whole[name][i : i + 1]).all() for name in whole)
    finally:
        torch.set_num_threads(before)


def test_autocast_changes_nothing():
    layer = layer_of(noise(2, 14, 14, 32))
    plain = Fourier().measure(layer)
    with torch.autocast("cpu", torch.bfloat16):
        for name, values in Fourier().measure(layer).items():
            assert torch.equal(values, plain[name])


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (2, 9), (9, 1)])
def test_grids_without_a_frequency_do_not_apply(grid):
    layer = layer_of(noise(1, *grid, 3))
    for use in (Fourier().measure, Fourier().describe):
        with pytest.raises(DoesNotApply, match="no frequency"):
            use(layer)


@pytest.mark.parametrize("grid", [(3, 3), (4, 4), (4, 9), (8, 3)])
def test_one_frequency_above_zero_is_no_reference(grid):
    layer = layer_of(noise(1, *grid, 3))
    assert Fourier().measure(layer)["fourier"].shape == (1, 2)
    for use in (Fourier(dc="exclude").measure, Fourier(dc="exclude").describe):
        with pytest.raises(DoesNotApply, match="one frequency above 0"):
            use(layer)


def test_options():
    assert Fourier().needs == {"tokens"} and Fourier().curve == "last"
    with pytest.raises(UsageError, match="'include' or 'exclude', not 'yes'"):
        Fourier(dc="yes")
    with pytest.raises(UsageError, match="not what 'cl-vs-mim' does"):
        Fourier(compat="cl-vs-mim", dc="exclude")
    with pytest.raises(UsageError, match="compat"):
        Fourier(compat="v1")


@pytest.mark.parametrize("side", [5, 7, 8, 14, 16, 27, 28, 56])
def test_grids_of_any_size_are_compared_at_one_frequency(side):
    """0.75 pi, by numpy's own linear interpolation of the notebook's curve."""
    maps = noise(2, side, side, 6, offset=0.3)
    curve = notebook(maps)
    frequency = 2 * np.arange(curve.shape[1]) / side
    expected = [np.interp(0.75, frequency, line - line[0]) for line in curve]
    np.testing.assert_allclose(measure(maps)["fourier_common"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", [3, 4, 6])
def test_small_grids_end_before_the_common_frequency(side):
    got = measure(noise(2, side, side, 6))
    np.testing.assert_array_equal(got["fourier_common"], got["fourier"][:, -1])
