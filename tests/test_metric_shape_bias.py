"""Shape bias from a probe's decisions: counted by hand, laws, the trials as CSV."""

from __future__ import annotations

import csv
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

sys.path.insert(0, str(Path(__file__).parent))
from probe_traces import rows, shuffled, split, traces

from probekit.errors import DoesNotApply, UsageError
from probekit.metric import Traces
from probekit.metrics.shape_bias import Decisions, ShapeBias
from probekit.metrics.trials import COLUMNS, count, decisions_csv
from probekit.store.results import read_result, write_result


def conflict(follows, shape, texture, classes=4, known=None, apart=40.0):
    """Images that look like class `follows`, with these cues; far apart, so that every probe says it."""
    train = traces([i % classes for i in range(classes * 8)], 1, apart=apart)
    if known is not None:
        train = shuffled(train, [i for i, label in enumerate(train.labels) if label in known])
    names = [f"class {i}" for i in range(classes)]
    cues = {"shape": list(shape), "texture": list(texture)}
    return traces(follows, 2, apart=apart, train=train, classes=names, cues=cues)


def loop(decided, shape, texture, known):
    """The definition, trial by trial."""
    by_shape, by_texture, left_out, same = {}, {}, 0, 0
    for d, s, t in zip(decided, shape, texture, strict=True):
        if s == t:
            same += 1
        elif s not in known or t not in known:
            left_out += 1
        elif d == s:
            by_shape[s] = by_shape.get(s, 0) + 1
        elif d == t:
            by_texture[s] = by_texture.get(s, 0) + 1
    return by_shape, by_texture, left_out, same


def test_counted_by_hand():
    shape = [0, 0, 0, 1, 1, 2, 3, 0]
    texture = [1, 2, 3, 0, 2, 1, 3, 1]
    follows = [0, 0, 3, 1, 2, 3, 3, 1]  # shape shape texture | shape texture | neither | same | texture
    result = ShapeBias(l2=0.01).summarize(conflict(follows, shape, texture))
    assert (result["decisions"].values == follows).all()
    assert result["n_shape"].values.tolist() == [3] * 3 and result["n_texture"].values.tolist() == [3] * 3
    assert (result["shape_bias"].values == 50).all()
    expected = binomtest(3, 6).proportion_ci(0.95, "wilson")
    np.testing.assert_allclose(result["shape_bias_low"].values, 100 * expected.low)
    np.testing.assert_allclose(result["shape_bias_curve_high"].values, 100 * expected.high)
    assert list(result["category"].values) == ["class 0", "class 1", "class 2"]
    np.testing.assert_array_equal(result["shape_bias_category"].values[0], [50, 50, np.nan])
    assert np.isnan(result["shape_bias_category_low"].values[0, 2])
    assert (result["shape_bias_mean"].values == 50).all()
    np.testing.assert_allclose(result["shape_bias_either"].values, 100 * 6 / 7)
    assert (result["chance_either"].values == 50).all() and (result["chance"].values == 50).all()
    assert (result.attrs["trials"], result.attrs["same_cue"], result.attrs["undecidable"]) == (7, 1, 0)


def test_pooled_and_mean_differ_with_unequal_categories():
    result = ShapeBias(l2=0.01).summarize(conflict([0, 0, 0, 2], [0, 0, 0, 1], [1, 1, 1, 2]))
    assert (result["shape_bias"].values == 75).all()
    assert (result["shape_bias_mean"].values == 50).all()


def test_trials_of_classes_without_training_images_are_left_out_and_counted():
    shape, texture = [0, 1, 2, 3, 0], [1, 3, 3, 0, 2]
    result = ShapeBias(l2=0.01).summarize(conflict([0, 1, 2, 0, 0], shape, texture, known={0, 1, 2}))
    assert result["counted"].values.tolist() == [1, 0, 0, 0, 1]
    assert (result.attrs["trials"], result.attrs["undecidable"], result.attrs["decidable_classes"]) == (
        2,
        3,
        3,
    )
    assert (result["shape_bias"].values == 100).all()
    np.testing.assert_allclose(result["chance_either"].values, 200 / 3)
    assert not (result["decisions"].values == 3).any()


def test_nothing_decided_for_either_is_nan():
    result = ShapeBias(l2=0.01).summarize(conflict([3, 3], [0, 1], [1, 2]))
    for name in ("shape_bias", "shape_bias_mean", "shape_bias_low", "shape_bias_high"):
        assert np.isnan(result[name].values).all()
    assert (result["shape_bias_either"].values == 0).all()
    with pytest.raises(DoesNotApply, match="two different classes"):
        ShapeBias(l2=0.01).summarize(conflict([0, 1], [0, 1], [0, 1]))


trials = st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=40)


@given(trials, st.sets(st.integers(0, 4), min_size=2))
def test_counting_equals_the_loop(found, known):
    decided, shape, texture = np.array(found).T
    counts = count(decided[None], shape, texture, np.array(sorted(known)), 5)
    by_shape, by_texture, left_out, same = loop(decided, shape, texture, known)
    assert {i: n for i, n in enumerate(counts.by_shape[0]) if n} == by_shape
    assert {i: n for i, n in enumerate(counts.by_texture[0]) if n} == by_texture
    assert (counts.conflict & ~counts.counted).sum() == left_out and (~counts.conflict).sum() == same


class Told(ShapeBias):
    """Decisions that were made elsewhere, as a classifier of the model's own would give them."""

    def decide(self, traces):
        kept = [row for row in traces.rows if row.site == "out"]
        return Decisions(kept, np.tile(traces["told"], (len(kept), 1)), np.arange(5), {})


@settings(deadline=None)
@given(trials)
def test_swapping_the_cues_mirrors_the_bias(found):
    told, shape, texture = np.array(found).T
    if (shape == texture).all():
        return
    base = split(classes=5, train=10, test=len(told))
    values = {"told": told}
    one = replace(base, values=values, cues={"shape": shape, "texture": texture})
    two = replace(base, values=values, cues={"shape": texture, "texture": shape})
    a, b = (Told().summarize(t)["shape_bias"].values for t in (one, two))
    np.testing.assert_allclose(a + b, np.where(np.isnan(a), np.nan, 100))


def test_trials_end_as_csv(tmp_path):
    shape, texture, follows = [0, 1, 2, 1], [1, 2, 0, 1], [0, 2, 1, 1]
    result = ShapeBias(l2=0.01).summarize(conflict(follows, shape, texture))
    write_result(tmp_path / "r.nc", result)
    path = decisions_csv(read_result(tmp_path / "r.nc"), tmp_path / "trials.csv")
    with path.open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert tuple(table[0]) == COLUMNS and len(table) == 3 * 4
    assert [row["cue"] for row in table[:4]] == ["shape", "texture", "neither", ""]
    assert [row["decision"] for row in table[:4]] == ["class 0", "class 2", "class 1", "class 1"]
    assert table[0]["layer"] == "encoder.0.embed" and table[-1]["layer"] == "encoder.1.attn.out"
    assert [row["counted"] for row in table[:4]] == ["1", "1", "1", "0"]
    shapes = sum(row["cue"] == "shape" for row in table)
    assert shapes == result["n_shape"].values.sum()


def test_needs_no_labels_and_refuses_other_classifiers():
    assert "labels" not in ShapeBias.requires
    given = replace(conflict([0, 1], [0, 1], [1, 2]), labels=None)
    assert (ShapeBias(l2=0.01).summarize(given)["shape_bias"].values == 100).all()
    with pytest.raises(UsageError):
        ShapeBias(classifier="mine")
    assert [row.site for row in ShapeBias().rows(rows())] == ["embed", "out", "out"]


# ---------------------------------------------------------------------- the model's own classifier


def own(scores, shape, texture, classes, class_of=None):
    """Traces of class_scores: (images, outputs) logits."""
    scores = np.asarray(scores, dtype=np.float64)
    logs = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    cues = {"shape": list(shape), "texture": list(texture)}
    row = replace(rows()[-1], label="output", site="output")
    ids = [f"i{n}" for n in range(len(scores))]
    values = {"class_scores": logs[:, None].astype(np.float32)}
    return Traces(values, [row], ids, cues=cues, classes=classes, class_of=class_of)


def test_the_models_own_classifier():
    scores = np.eye(3)[[0, 2, 1, 1]] * 9
    found = ShapeBias(classifier="own").summarize(own(scores, [0, 0, 1, 0], [1, 2, 2, 2], ["a", "b", "c"]))
    assert found["decisions"].values.tolist() == [[0, 2, 1, 1]]
    assert found["shape_bias"].values == pytest.approx([100 * 2 / 3])
    assert found["layer"].values.tolist() == ["output"]
    assert ShapeBias(classifier="own").requires == {"cues"}


def test_imagenet_outputs_become_categories_by_mean_probability():
    """The mean, not the sum or the largest: 207 of 1,000 classes, of which 110 are dogs and one is a knife."""
    from timm.data import ImageNetInfo

    from probekit.datasets.cue_conflict import CATEGORIES, category

    numbers = [category(wnid) for wnid in ImageNetInfo("imagenet-1k").label_names()]
    assert sum(n is not None for n in numbers) == 207
    dog, knife, oven = (CATEGORIES.index(name) for name in ("dog", "knife", "oven"))
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(40, 1000))
    scores[0] = -9.0
    scores[0, [i for i, n in enumerate(numbers) if n == dog]] = 1.0  # a little for every dog
    scores[0, numbers.index(knife)] = 2.0  # more for the one knife
    traced = own(scores, [knife] * 40, [dog] * 40, list(CATEGORIES), category)
    found = ShapeBias(classifier="own").summarize(traced)
    share = np.exp(np.asarray(traced["class_scores"], dtype=np.float64))[:, 0]
    expected = [
        int(np.argmax([np.mean([p[i] for i, n in enumerate(numbers) if n == k]) for k in range(16)]))
        for p in share
    ]
    assert found["decisions"].values[0].tolist() == expected
    assert expected[0] == knife != oven


def test_outputs_that_are_no_classes_are_refused():
    with pytest.raises(DoesNotApply, match="returns 768 numbers"):
        ShapeBias(classifier="own").summarize(own(np.zeros((2, 768)), [0, 1], [1, 0], ["a", "b"]))
