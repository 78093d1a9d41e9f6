"""Spectra over tokens and over images: against eigenvalues of numpy's covariance, closed forms, laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probekit.errors import DoesNotApply, UsageError
from probekit.metric import Row, Traces
from probekit.metrics import spectra
from probekit.metrics.spectrum_images import SpectrumImages
from probekit.metrics.spectrum_tokens import SpectrumTokens
from probekit.testing import check_metric, make_layer


def rows(count, site="out"):
    return [
        Row(f"blocks.{i}.{site}", float(i), "embed" if i == 0 else site, "encoder", 0, 2, (4, 4), (8.0, 8.0))
        for i in range(count)
    ]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def eigenvalues(x):
    """Of np.cov, largest first, without those that n - 1 or C rule out. x (n, C), float64 from the start."""
    x = np.asarray(x, dtype=np.float64)
    found = np.linalg.eigvalsh(np.atleast_2d(np.cov(x, rowvar=False, ddof=1)))[::-1]
    return found[: min(len(x) - 1, x.shape[1])]


def rank_of(values):
    """exp(entropy) of the normalised singular values, as a sum."""
    sigma = np.sqrt(values)
    p = sigma / sigma.sum()
    return math.exp(-sum(v * math.log(v) for v in p if v > 0))


def measure(tokens, grid=None):
    tokens = torch.as_tensor(np.asarray(tokens), dtype=torch.float32)
    found = SpectrumTokens().measure(make_layer(tokens=tokens, grid=grid or (1, tokens.shape[1])))
    assert all(v.dtype == torch.float32 for v in found.values())
    return {name: v.double().numpy() for name, v in found.items()}


# ------------------------------------------------------------------ tokens


@pytest.mark.parametrize(("n", "c"), [(16, 40), (40, 16), (16, 16), (17, 16), (2, 5), (50, 1)])
def test_tokens_agree_with_the_covariance(n, c):
    tokens = normal(3, n, c) * np.linspace(0.01, 3, c, dtype=np.float32) + 5
    got = measure(tokens)
    assert got["spectrum_tokens"].shape == (3, min(n - 1, c))
    for i in range(3):
        expected = eigenvalues(tokens[i])
        np.testing.assert_allclose(got["spectrum_tokens"][i], np.log(expected), rtol=1e-6, atol=1e-6)
        assert got["effective_rank"][i] == pytest.approx(rank_of(expected), rel=1e-6)
    assert (got["floored_ranks"] == 0).all()


def test_known_spectrum():
    """Tokens at +-a on each axis: the covariance is diagonal, 2 a^2 / (n - 1)."""
    lengths = np.array([8.0, 4.0, 2.0, 1.0])
    tokens = np.concatenate([np.diag(lengths), -np.diag(lengths)])
    got = measure(tokens[None])
    np.testing.assert_allclose(got["spectrum_tokens"][0], np.log(2 * lengths**2 / 7), rtol=1e-6, atol=1e-6)
    assert got["effective_rank"][0] == pytest.approx(rank_of(lengths**2), rel=1e-6)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_effective_rank_of_equal_directions_is_their_number(k):
    tokens = np.concatenate([np.eye(16)[:k], -np.eye(16)[:k]])
    got = measure(tokens[None])
    assert got["effective_rank"][0] == pytest.approx(k, rel=1e-6)
    assert got["floored_ranks"][0] == min(2 * k - 1, 16) - k


def test_tokens_on_a_line_are_floored_and_counted():
    """Rank 1: what rounding leaves of the other eigenvalues is at max(N, C) eps lambda_1, finite."""
    tokens = np.outer(np.arange(12), [1.0, 2.0, -1.0, 0.5, 4.0])
    got = measure(tokens[None])
    assert got["floored_ranks"][0] == 4
    first = math.log(eigenvalues(tokens)[0])
    np.testing.assert_allclose(got["spectrum_tokens"][0, 1:], first + math.log(12 * 2.0**-52), rtol=1e-6)
    assert got["effective_rank"][0] == pytest.approx(1, rel=1e-6)


def test_constant_tokens_stay_finite():
    got = measure(np.full((1, 9, 4), 3.0))
    assert got["effective_rank"][0] == 0 and got["floored_ranks"][0] == 4
    np.testing.assert_allclose(got["spectrum_tokens"], math.log(np.finfo(np.float64).tiny), rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 12), st.integers(2, 12), st.floats(1e-3, 1e3), st.integers(0, 2**20))
def test_scale_shift_and_rotation(n, c, factor, seed):
    tokens = normal(1, n, c, seed=seed).astype(np.float64)
    turn = np.linalg.qr(np.random.default_rng(seed).standard_normal((c, c)))[0]
    a = SpectrumTokens().measure(make_layer(tokens=torch.tensor(tokens), grid=(1, n)))
    moved = torch.tensor((tokens * factor + 0.25 * factor) @ turn).float()
    b = SpectrumTokens().measure(make_layer(tokens=moved, grid=(1, n)))
    # float32 inputs: eigenvalues move by about eps * norm; the tail by more, so where it is not tiny
    spectrum = a["spectrum_tokens"][0]
    large = spectrum > spectrum[0] - 6
    shift = b["spectrum_tokens"][0] - spectrum - 2 * math.log(factor)
    torch.testing.assert_close(shift[large], torch.zeros_like(shift)[large], rtol=0, atol=2e-3)
    torch.testing.assert_close(a["effective_rank"], b["effective_rank"], rtol=1e-3, atol=0)
    assert 1 <= float(a["effective_rank"]) <= min(n - 1, c) + 1e-4
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    mixed = SpectrumTokens().measure(make_layer(tokens=torch.tensor(tokens)[:, order], grid=(1, n)))
    torch.testing.assert_close(mixed["effective_rank"], a["effective_rank"], rtol=1e-5, atol=0)


def test_autocast_and_batches_change_nothing():
    tokens = torch.tensor(normal(4, 20, 30))
    whole = SpectrumTokens().measure(make_layer(tokens=tokens, grid=(4, 5)))
    with torch.autocast("cpu", torch.bfloat16):
        for i in range(4):
            alone = SpectrumTokens().measure(make_layer(tokens=tokens[i : i + 1], grid=(4, 5)))
            assert all(torch.equal(alone[name][0], whole[name][i]) for name in whole)


def test_single_token_does_not_apply():
    with pytest.raises(DoesNotApply, match="single token"):
        measure(normal(1, 1, 4))


def test_sample():
    assert SpectrumTokens().sample(64, None) is None
    assert list(SpectrumTokens().sample(65, None)) == list(range(0, 65, 8))
    assert SpectrumTokens(every=1).sample(5000, None) is None
    assert list(SpectrumTokens(every=100).sample(1000, None)) == list(range(0, 1000, 100))
    with pytest.raises(UsageError, match="every is 1 or more, not 0"):
        SpectrumTokens(every=0)


def token_traces(images=6, wide=150, narrow=40, seed=3):
    logs = np.full((images, 2, wide), np.nan, dtype=np.float32)
    logs[:, 0] = -np.sort(-normal(images, wide, seed=seed))
    logs[:, 1, :narrow] = -np.sort(-normal(images, narrow, seed=seed + 1))
    scalars = {name: normal(images, 2) for name in ("effective_rank", "floored_ranks")}
    values = {"spectrum_tokens": logs, **scalars}
    return Traces(values, rows(2), [f"{i}.png" for i in range(images)], of=8 * images)


def test_result_of_tokens():
    traces = token_traces()
    result = SpectrumTokens().summarize(traces)
    logs = traces["spectrum_tokens"].astype(np.float64)
    mean = logs.mean(0)
    assert result["spectrum_tokens"].dims == ("layer", "rank")
    assert result["rank"].values.tolist() == list(range(1, 151))
    np.testing.assert_allclose(result["spectrum_tokens"], mean, rtol=1e-6)
    np.testing.assert_allclose(result["relative_to_second"], mean - mean[:, 1:2], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(result["relative_to_first"], mean - mean[:, :1], rtol=1e-6, atol=1e-9)
    for rank in (64, 128):
        assert result[f"rank_{rank}"][0] == pytest.approx(mean[0, rank - 1] - mean[0, 1], rel=1e-6)
        assert np.isnan(result[f"rank_{rank}"][1]) and np.isnan(result[f"rank_{rank}_low"][1])
    assert result["rank_64_low"][0] < result["rank_64"][0] < result["rank_64_high"][0]
    expected = [mean[0, 63] - mean[0, 1], mean[1, 39] - mean[1, 1]]
    np.testing.assert_allclose(result["spectrum_tokens_curve"], expected, rtol=1e-6)
    assert (result["spectrum_tokens_curve_low"] < result["spectrum_tokens_curve"]).all()
    assert (result["spectrum_tokens_curve_high"] > result["spectrum_tokens_curve"]).all()
    # the interval is of per-image differences, not of the logs themselves
    differences = logs[:, 0, 63] - logs[:, 0, 1]
    assert result["rank_64_sd"][0] == pytest.approx(differences.std(ddof=1), rel=1e-6)
    assert (result.attrs["images"], result.attrs["of"]) == (6, 48)
    assert "effective_rank_curve" in result


def test_result_without_rank_64():
    result = SpectrumTokens().summarize(token_traces(wide=30, narrow=1))
    assert "rank_64" not in result and "rank_128" not in result
    assert np.isfinite(result["spectrum_tokens_curve"][0]) and np.isnan(result["spectrum_tokens_curve"][1])


def test_tokens_keep_the_contract():
    check_metric(SpectrumTokens)


# ------------------------------------------------------------------ images


def feature_traces(*features):
    """Traces of `features` of given (images, C) at sites of different width."""
    images = len(features[0])
    values = np.full((images, len(features), max(f.shape[1] for f in features)), np.nan, dtype=np.float32)
    for row, found in enumerate(features):
        values[:, row, : found.shape[1]] = found
    return Traces({"features": values}, rows(len(features)), [f"{i}.png" for i in range(images)])


@pytest.mark.parametrize("images", [300, 90, 20])
def test_images_agree_with_the_covariance(images):
    wide, narrow = normal(images, 130) * np.linspace(3, 0.01, 130) + 9, normal(images, 7, seed=1)
    result = SpectrumImages().summarize(feature_traces(wide, narrow))
    for row, features in enumerate((wide, narrow)):
        expected = eigenvalues(features.astype(np.float32))
        got = result["spectrum_images"].values[row]
        np.testing.assert_allclose(got[: len(expected)], np.log(expected), rtol=1e-6, atol=1e-6)
        assert np.isnan(got[len(expected) :]).all()
        assert result["effective_rank"][row] == pytest.approx(rank_of(expected), rel=1e-6)
        logs = np.log(expected)
        for name, place in (("relative_to_second", 1), ("relative_to_first", 0)):
            relative = result[name].values[row, : len(logs)]
            np.testing.assert_allclose(relative, logs - logs[place], rtol=1e-6, atol=1e-6)
        last = min(64, len(logs))
        assert result["spectrum_images_curve"][row] == pytest.approx(logs[last - 1] - logs[1], rel=1e-6)
    assert ("rank_64" in result) == (images > 64) and ("rank_128" in result) == (images > 128)
    assert ("warning" in result.attrs) == (images <= 131)
    assert np.isnan(result["spectrum_images_curve_low"]).all()
    assert result.attrs["interval"] == "none"


def test_blocks_of_images_add_up(monkeypatch):
    features = normal(101, 9)
    whole = spectra.covariance_eigenvalues_of_many(features)
    monkeypatch.setattr(spectra, "_ROWS", 7)
    torch.testing.assert_close(spectra.covariance_eigenvalues_of_many(features), whole, rtol=1e-12, atol=0)


def test_images_and_tokens_are_one_formula():
    """The same numbers as points of a cloud, through either path."""
    points = normal(50, 12)
    of_images = SpectrumImages().summarize(feature_traces(points))
    of_tokens = measure(points[None])
    np.testing.assert_allclose(of_images["spectrum_images"][0], of_tokens["spectrum_tokens"][0], rtol=1e-6)


def test_sites_without_features_are_left_out():
    traces = feature_traces(normal(9, 4), np.full((9, 4), np.nan), normal(9, 3, seed=2))
    result = SpectrumImages().summarize(traces)
    assert result["layer"].values.tolist() == ["blocks.0.out", "blocks.2.out"]


def test_options_of_images():
    assert (SpectrumImages().source, SpectrumImages(pool="cls").source) == ("features", "features:pool=cls")
    with pytest.raises(UsageError, match="'mean' or 'cls', not 'max'"):
        SpectrumImages(pool="max")
    with pytest.raises(DoesNotApply, match="single image"):
        SpectrumImages().summarize(feature_traces(normal(1, 4)))
