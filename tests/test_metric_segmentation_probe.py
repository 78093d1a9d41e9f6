"""Segmentation from patch tokens: pixel counts by loops, IoU against scikit-learn, sampling, the bootstrap."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from probe_traces import rows

from probekit.errors import DoesNotApply, MetricError, UsageError
from probekit.metric import Traces
from probekit.metrics.patches import iou, mean_iou, patches, pixel_accuracy, sampled, tally
from probekit.metrics.segmentation_probe import VALUE, SegmentationProbe
from probekit.reports.curves import baselines_of, curve_of, main_value
from probekit.store.results import read_result, write_result
from probekit.testing import make_layer

GRID, SIDE, TOKENS = (4, 4), 32, 6


def blocky(images, seed, classes=3, noise=0.0, ignored=0.0):
    """Maps of one class a patch, each pixel another one with probability `noise`, or ignored."""
    random = np.random.default_rng(seed)
    found = np.kron(random.integers(0, classes, (images, *GRID)), np.ones((8, 8), int))
    found = np.where(random.random(found.shape) < noise, random.integers(0, classes, found.shape), found)
    return np.where(random.random(found.shape) < ignored, -1, found)


def measured(maps, seed, classes=3, apart=30.0, width=5, tokens=TOKENS):
    """Traces whose tokens show the patch's majority class, the clearer the larger `apart`; narrower at the end."""
    axis = [row for row in rows() if row.site != "mid"]
    places = sampled(GRID, tokens)
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((classes, width))
    values = np.full((len(maps), len(axis), len(places), width), np.nan, np.float32)
    for i, one in enumerate(maps):
        for p, place in enumerate(places):
            r, c = divmod(place, GRID[1])
            cut = one[8 * r : 8 * r + 8, 8 * c : 8 * c + 8].ravel()
            cut = cut[cut >= 0]
            label = np.bincount(cut).argmax() if cut.size else 0
            values[i, :, p] = apart * centres[label] + random.standard_normal((len(axis), width))
    values[:, -1, :, 3:] = np.nan
    return Traces({VALUE: values}, axis, [f"{seed}/{i}" for i in range(len(maps))], mask=lambda i: maps[i])


def both(noise=0.0, ignored=0.0, apart=30.0, train=24, test=10, **more):
    maps, known = (
        blocky(test, 2, noise=noise, ignored=ignored),
        blocky(train, 1, noise=noise, ignored=ignored),
    )
    one = measured(known, 1, apart=apart, **more)
    return replace(measured(maps, 2, apart=apart, **more), train=one), maps


@pytest.mark.parametrize("name", ["sampled", "all"])
def test_one_class_a_patch_and_clear_tokens_give_100(name):
    metric = SegmentationProbe(tokens=TOKENS if name == "sampled" else 99)
    result = metric.summarize(both(tokens=metric.tokens)[0])
    for value in ("segmentation_probe", "segmentation_probe_accuracy", "own_majority", "image_accuracy"):
        assert (result[value].values == 100).all()
    assert (result["segmentation_probe_low"].values == 100).all()


@pytest.mark.parametrize("apart", [0.0, 1.0, 30.0])
def test_scores_are_scikit_learns_over_all_pixels(apart):
    """Every sampled patch's pixels answered with the class a scikit-learn classifier gives its token."""
    linear = pytest.importorskip("sklearn.linear_model")
    scores = pytest.importorskip("sklearn.metrics")
    given, maps = both(noise=0.3, ignored=0.1, apart=apart)
    result = SegmentationProbe(tokens=TOKENS, l2=0.01).summarize(given)
    places = sampled(GRID, TOKENS)

    def pixels(one, place):
        r, c = divmod(place, GRID[1])
        cut = one[8 * r : 8 * r + 8, 8 * c : 8 * c + 8].ravel()
        return cut[cut >= 0]

    for row, width in ((0, 5), (2, 3)):
        x, test = (t[VALUE][:, row, :, :width].reshape(-1, width).astype(float) for t in (given.train, given))
        y = [np.bincount(pixels(given.train.mask(i), p)).argmax() for i in range(24) for p in places]
        mean, scale = x.mean(0), np.sqrt(x.var(0) + 1e-6)
        other = linear.LogisticRegression(C=1 / (0.01 * len(x)), tol=1e-9, max_iter=9999)
        answers = other.fit((x - mean) / scale, y).predict((test - mean) / scale).reshape(10, -1)
        truth, said = [], []
        for i, one in enumerate(maps):
            for k, place in enumerate(places):
                truth.append(pixels(one, place))
                said.append(np.full(len(truth[-1]), answers[i, k]))
        truth, said = np.concatenate(truth), np.concatenate(said)
        each = scores.jaccard_score(truth, said, average=None)
        np.testing.assert_allclose(result["iou"].values[row], 100 * each)
        assert result["segmentation_probe"].values[row] == pytest.approx(100 * each.mean())
        assert result["segmentation_probe_accuracy"].values[row] == pytest.approx(
            100 * (truth == said).mean()
        )
        common = np.bincount(y).argmax()
        assert result["chance_accuracy"].values[row] == pytest.approx(100 * (truth == common).mean())
        low, high = (result[f"segmentation_probe_{end}"].values[row] for end in ("low", "high"))
        assert low <= result["segmentation_probe"].values[row] <= high


def test_no_answer_beats_the_patches_own_majority_in_pixels():
    given, _ = both(noise=0.5, apart=1.0)
    result = SegmentationProbe(tokens=TOKENS).summarize(given)
    assert (result["own_majority_accuracy"].values < 80).all()
    assert (result["segmentation_probe_accuracy"].values <= result["own_majority_accuracy"].values).all()


def test_tokens_that_say_nothing_score_as_chance():
    given, _ = both(apart=0.0, train=60, test=60)
    result = SegmentationProbe(tokens=TOKENS).summarize(given)
    # 360 patches of 3 classes, independent: 4 sd
    np.testing.assert_allclose(
        result["segmentation_probe_accuracy"].values, 100 / 3, atol=400 * np.sqrt(2 / 9 / 360)
    )


@settings(max_examples=30, deadline=None)
@given(
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.tuples(st.integers(5, 17), st.integers(5, 17)),
    st.integers(1, 12),
    st.integers(0, 999),
)
def test_cutting_equals_the_loop_over_pixels(grid, shape, tokens, seed):
    """Also where sides aren't multiples of the grid's: the pixel's centre decides."""
    maps = np.random.default_rng(seed).integers(-1, 4, (2, *shape))
    found = patches(lambda i: maps[i], 2, tokens, [grid])
    places = list(sampled(grid, tokens))
    expected = np.zeros((2, len(places), 4), int)
    for i, one in enumerate(maps):
        for (y, x), value in np.ndenumerate(one):
            patch = int((y + 0.5) * grid[0] / shape[0]) * grid[1] + int((x + 0.5) * grid[1] / shape[1])
            if patch in places and value >= 0:
                expected[i, places.index(patch), value] += 1
    np.testing.assert_array_equal(found.histogram(grid, 4), expected)
    majority = np.where(expected.sum(-1) > 0, expected.argmax(-1), -1)
    np.testing.assert_array_equal(found.majority(grid), majority)
    assert found.largest == max((c for c in range(4) if expected[..., c].any()), default=-1)


@given(st.integers(0, 999))
def test_counts_give_the_iou_of_the_confusion_matrix(seed):
    random = np.random.default_rng(seed)
    histogram, answers = random.integers(0, 3, (4, 5, 6)), random.integers(0, 6, (4, 5))
    confusion = np.zeros((6, 6))
    for i, p in np.ndindex(4, 5):
        confusion[:, answers[i, p]] += histogram[i, p]
    right = np.diag(confusion)
    with np.errstate(invalid="ignore"):
        expected = right / (confusion.sum(0) + confusion.sum(1) - right)
    totals = tally(histogram, answers).sum(0)
    np.testing.assert_allclose(iou(totals), expected)
    assert mean_iou(totals) == pytest.approx(100 * np.nanmean(expected))
    assert pixel_accuracy(totals) == pytest.approx(100 * right.sum() / confusion.sum())


def test_the_interval_resamples_images():
    """Each resample's score of the summed counts, here one by one."""
    given, _ = both(noise=0.4, apart=1.0)
    metric = SegmentationProbe(tokens=TOKENS, l2=0.01)
    result = metric.summarize(given)
    draws = np.random.Generator(np.random.PCG64(0)).integers(0, 10, size=(1000, 10))
    # per-image accuracies have equal numbers of pixels here, so the ratio of sums is their mean
    each = result["image_accuracy"].values[1].astype(float)
    low, high = np.quantile(each[draws].mean(1), [0.025, 0.975])
    assert result["segmentation_probe_accuracy_low"].values[1] == pytest.approx(low, rel=1e-6)
    assert result["segmentation_probe_accuracy_high"].values[1] == pytest.approx(high, rel=1e-6)


def test_the_order_of_test_images_does_not_matter():
    given, maps = both(noise=0.3, apart=1.0)
    order = np.random.default_rng(0).permutation(10)
    moved = replace(
        given,
        values={VALUE: given[VALUE][order]},
        images=[given.images[i] for i in order],
        mask=lambda i: maps[order[i]],
    )
    a, b = (SegmentationProbe(tokens=TOKENS).summarize(t) for t in (given, moved))
    for name in ("segmentation_probe", "segmentation_probe_accuracy", "iou"):
        np.testing.assert_array_equal(a[name].values, b[name].values)
    np.testing.assert_array_equal(a["image_accuracy"].values[:, order], b["image_accuracy"].values)


def test_measure_keeps_the_same_places_of_every_image():
    tokens = torch.randn(3, 30, 7)
    layer = make_layer(tokens=tokens, grid=(5, 6))
    found = SegmentationProbe(tokens=8).measure(layer)[VALUE]
    assert found.dtype == torch.float32 and found.shape == (3, 8, 7)
    places = sampled((5, 6), 8)
    assert torch.equal(found, tokens[:, places])
    assert len(set(places)) == 8 and (np.diff(places) > 0).all() and places.max() < 30
    assert SegmentationProbe(tokens=99).measure(layer)[VALUE].shape == (3, 30, 7)
    assert [row.site for row in SegmentationProbe().rows(rows())] == ["embed", "out", "out"]


def test_the_result_is_one_that_reports_read_and_the_store_keeps(tmp_path):
    write_result(tmp_path / "r.nc", SegmentationProbe(tokens=TOKENS).summarize(both(noise=0.3)[0]))
    back = read_result(tmp_path / "r.nc")
    assert main_value(back) == "segmentation_probe"
    assert len(curve_of(back, "segmentation_probe", "m").points) == 3
    names = {
        value: [name for name, _ in baselines_of(back, value)]
        for value in ("segmentation_probe", "segmentation_probe_accuracy")
    }
    assert all(found == ["chance", "own majority"] for found in names.values())
    assert (back.attrs["n_train"], back.attrs["n_test"], back.attrs["patches"]) == (24, 10, TOKENS)


def test_what_it_cannot_do_it_says():
    given, _ = both()
    metric = SegmentationProbe(tokens=TOKENS)
    with pytest.raises(DoesNotApply, match="no train split"):
        metric.summarize(replace(given, train=None))
    with pytest.raises(DoesNotApply, match="no train split with masks"):
        metric.summarize(replace(given, mask=None))
    with pytest.raises(DoesNotApply, match="no sampled patch"):
        metric.summarize(replace(given, mask=lambda i: np.full((32, 32), -1)))
    given[VALUE][3, 1, 2, 1] = np.nan
    with pytest.raises(MetricError, match="encoder"):
        metric.summarize(given)
    with pytest.raises(UsageError):
        SegmentationProbe(tokens=0)
