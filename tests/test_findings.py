"""Findings: the rules that make a verdict, their intervals, what is contained, what is printed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from scipy import stats

sys.path.insert(0, str(Path(__file__).parent))
from probekit.errors import UsageError
from probekit.findings import (
    ALL_LAYERS,
    BEST_LAYER,
    FIRST_LAYER,
    FIRST_THIRD,
    LAST_LAYER,
    LAST_THIRD,
    LATE_MINUS_EARLY,
    MIDDLE_THIRD,
    Above,
    Baseline,
    Contrast,
    Effect,
    Evidence,
    Finding,
    LastLess,
    NotMeasured,
    Quantity,
    Rank,
    Verdict,
    combined,
    evaluate,
    fingerprint,
    judge,
)
from probekit.metric import Metric, Row, Traces
from probekit.plugins.catalog import Catalog
from probekit.store.cells import FORMAT_VERSION, CellFolder, Outcome, TraceFolder, identity_hash
from probekit.store.results import write_result
from probekit.store.runfolder import Run, shard_size
from probekit.store.shards import write_shard
from probekit.store.writing import seal_json
from probekit.summaries import layer_coordinates, paired_difference, summarize

CL, MIM, RANDOM, HYBRID = "moco:a", "simmim:a", "moco:a@random", "hybrid:a"
OBJECTIVES = {"moco": "CL", "simmim": "MIM", "hybrid": "hybrid", "timm": "other"}
SETTINGS = {
    "limit": 40,
    "seed": 0,
    "dtype": "float32",
    "image_size": [32, 64],
    "on_bad_image": "skip",
    "allow_unwatched": False,
}
DATASET = "folder:photos"


class Nmi(Metric):
    name = "nmi"
    dims = {"nmi": ("head",)}
    units = {"nmi": "1"}


class Spread(Metric):
    name = "spread"
    dims = {"spread": ()}
    units = {"spread": "px"}


class Fourier(Metric):
    name = "fourier"
    dims = {"fourier": ("frequency",)}
    units = {"fourier": "nats"}
    curve = "last"


METRICS = {"nmi": Nmi, "spread": Spread, "fourier": Fourier}


def rows_of(layers: int, decoder: int = 0, grid: int = 8, site: str = "attention") -> list[Row]:
    return [
        Row(f"l{n}", float(n), site, "encoder" if n <= layers else "decoder", 0, 2, (grid, grid), (4.0, 4.0))
        for n in range(1, layers + decoder + 1)
    ]


def traces(values: np.ndarray, metric: str = "nmi", rows: Sequence[Row] | None = None, **more) -> Traces:
    """(images, rows, *inner) values of a metric."""
    ids = more.pop("ids", None) or [f"{i}.png" for i in range(len(values))]
    return Traces({metric: values.astype(np.float32)}, rows or rows_of(values.shape[1]), ids, **more)


def curves(mean: Sequence[float], images: int = 40, noise: float = 0.05, seed: int = 0) -> Traces:
    """NMI with two heads around a curve, with a difficulty that each image has in every model."""
    rng, shared = np.random.default_rng([seed, 7]), np.random.default_rng(3)
    hard = shared.normal(0, 0.3, (images, 1, 1))
    return traces(np.array(mean)[None, :, None] + hard + rng.normal(0, noise, (images, len(mean), 2)))


def make(
    path: Path,
    models: Mapping[str, Mapping[str, Traces | xr.Dataset | Outcome]],
    *,
    datasets: Sequence[str] = (DATASET,),
    metrics: Sequence[str] = (),
    about: Mapping[str, Mapping] | None = None,
) -> Run:
    """A run folder from traces, results and outcomes by model and metric."""
    names = list(dict.fromkeys([*metrics, *(m for found in models.values() for m in found)]))
    run = {
        "format_version": FORMAT_VERSION,
        "names": {"models": list(models), "metrics": names, "datasets": list(datasets)},
        "settings": SETTINGS,
        "versions": {},
    }
    seal_json(path / "run.json", run)
    for dataset in datasets:
        for model, found in models.items():
            folder = CellFolder(path, model, dataset)
            ids = next((list(t.images) for t in found.values() if isinstance(t, Traces)), [])
            identity = {"model": model, "images": "f" * 32, "count": len(ids)}
            cell = {
                "identity": identity,
                "weights": {"kind": "random" if model.endswith("@random") else "file"},
                "objective": OBJECTIVES.get(model.partition(":")[0], "other"),
                "ids": ids,
                "labels": None,
            }
            cell |= (about or {}).get(model, {})
            folder.write(cell)
            for name, content in found.items():
                _fill(folder, name, cell["identity"], content)
    return Run(path)


def _fill(folder: CellFolder, name: str, identity: Mapping, content: Traces | xr.Dataset | Outcome) -> None:
    if isinstance(content, Outcome):
        folder.end(name, content)
        return
    result = content
    if isinstance(content, Traces):
        metric = METRICS[name.partition(":")[0]]()
        count = len(content)
        tag = {"cell": identity_hash(identity), "metric": name, "version": 1, "options": {}}
        where = TraceFolder(folder.trace(name, 1), tag, count, shard_size(count))
        where.write_rows(content.rows, {n: np.asarray(v) for n, v in content.constants.items()}, {})
        for number, span in enumerate(where.ranges):
            arrays = {f"values/{n}": v[list(span)] for n, v in content.values.items()}
            write_shard(
                where.shard(number),
                {**arrays, "index": np.array(span, dtype=np.int64)},
                {**where.expected(number), "bad": []},
            )
        result = summarize(metric, content)
    write_result(folder.result(name), result)
    folder.end(name, Outcome("done", images=10))


def scored(name: str, mean: Sequence[float], **more) -> xr.Dataset:
    """A result without traces: a curve, with interval where `half` is given, with `correct` where given."""
    half, correct, units = more.get("half"), more.get("correct"), more.get("units", "%")
    mean = np.asarray(mean, dtype=np.float64)
    if correct is not None:
        mean = 100 * correct.mean(axis=1)
    spread = np.full(len(mean), np.nan) if half is None else np.broadcast_to(half, mean.shape)
    variables = {
        name: ("layer", mean, {"units": units, "role": "mean"}),
        f"{name}_curve": ("layer", mean),
        f"{name}_curve_low": ("layer", mean - spread),
        f"{name}_curve_high": ("layer", mean + spread),
    }
    coordinates = dict(layer_coordinates(rows_of(len(mean), site="out")))
    if correct is not None:
        variables["correct"] = (("layer", "image"), correct.astype(np.int8))
        coordinates["image"] = np.array([f"{i}.png" for i in range(correct.shape[1])])
    return xr.Dataset(variables, coordinates, {"metric": name, "version": 1})


def claim(**changes) -> Contrast:
    about = {"name": "higher", "claim": "CL is higher.", "sentence": "Sec. 1", "quantity": "nmi"}
    return Contrast(**{**about, "higher": "CL", "than": "MIM", **changes})


def verdict(run: Run, finding: Finding | None = None, groups: Sequence[Sequence[str]] = ()) -> Verdict:
    (tested,) = evaluate(run, [finding or claim()], groups=groups)
    assert not tested.failure, tested.details
    return tested.verdict


LOW, HIGH, MIDDLE = [0.2] * 6, [0.2, 0.2, 0.3, 0.4, 0.6, 0.6], [0.2, 0.2, 0.2, 0.3, 0.35, 0.35]


# ------------------------------------------------------------------ verdicts


def test_a_claim_holds_beyond_the_untrained_network(tmp_path):
    run = make(
        tmp_path,
        {
            CL: {"nmi": curves(HIGH, seed=1)},
            MIM: {"nmi": curves(LOW, seed=2)},
            RANDOM: {"nmi": curves(MIDDLE, seed=3)},
        },
    )
    found = verdict(run)
    assert found.status == "holds" and found.models == (CL, MIM)
    assert found.layers == "last third (layers 5-6)"
    assert found.effect.over == "images" and found.effect.count == 40
    # what makes an image hard cancels: its spread is 0.3, that of the interval far below
    assert found.effect.value == pytest.approx(0.4, abs=0.02)
    assert 0.35 < found.effect.low < 0.4 < found.effect.high < 0.45
    assert found.baseline.model == RANDOM and found.baseline.of == CL
    assert found.baseline.effect.value == pytest.approx(0.15, abs=0.02)
    assert found.baseline.beyond.value == pytest.approx(0.25, abs=0.02) and found.baseline.passed


def test_the_interval_is_that_of_compare(tmp_path):
    a, b = curves(HIGH, seed=1), curves(LOW, seed=2)
    run = make(tmp_path, {CL: {"nmi": a}, MIM: {"nmi": b}})
    found = verdict(run, claim(over=ALL_LAYERS)).effect
    table = paired_difference(a, b, "nmi")
    for ours, theirs in ((found.value, ""), (found.low, "_low"), (found.high, "_high")):
        assert ours == pytest.approx(float(table[f"nmi_overall{theirs}"]), rel=1e-9)


def test_a_claim_that_is_the_other_way_round_does_not_hold(tmp_path):
    run = make(tmp_path, {CL: {"nmi": curves(LOW, seed=1)}, MIM: {"nmi": curves(HIGH, seed=2)}})
    found = verdict(run)
    assert found.status == "does not hold" and found.effect.high < 0
    assert "other way round" in found.reason and found.baseline is None


@pytest.mark.parametrize("untrained", [HIGH, [v + 0.2 for v in HIGH]], ids=["like CL", "further than CL"])
def test_what_the_untrained_network_shows_too_does_not_hold(tmp_path, untrained):
    run = make(
        tmp_path,
        {
            CL: {"nmi": curves(HIGH, seed=1)},
            MIM: {"nmi": curves(LOW, seed=2)},
            RANDOM: {"nmi": curves(untrained, seed=1)},
        },
    )
    found = verdict(run)
    assert found.status == "does not hold" and found.effect.low > 0
    assert f"'{CL}' does not go beyond the untrained network '{RANDOM}'" in found.reason
    assert not found.baseline.passed


def test_the_property_of_the_lower_one_must_be_beyond_untrained_too(tmp_path):
    """CL low against MIM, and untrained as low as CL: nothing that training did."""
    models = {
        CL: {"nmi": curves(LOW, seed=1)},
        MIM: {"nmi": curves(HIGH, seed=2)},
        RANDOM: {"nmi": curves(LOW, seed=3)},
    }
    run = make(tmp_path, models)
    lower = claim(higher="MIM", than="CL")
    unsure = verdict(run, replace(lower, attributed="CL"))
    assert unsure.status == "can't tell"
    assert (
        unsure.reason
        == f"whether '{CL}' goes beyond the untrained network '{RANDOM}': the interval includes 0"
    )
    assert verdict(run, replace(lower, attributed="MIM")).status == "holds"
    both = verdict(run, replace(lower, attributed=("CL", "MIM")))
    assert both.status == "can't tell" and both.baseline.of == CL and len(both.baselines) == 2
    lowest = make(tmp_path / "b", {**models, RANDOM: {"nmi": curves(MIDDLE, seed=3)}})
    found = verdict(lowest, replace(lower, attributed="CL"))
    assert found.status == "holds" and found.baseline.beyond.value == pytest.approx(0.15, abs=0.02)


def test_no_difference_is_not_told(tmp_path):
    run = make(tmp_path, {CL: {"nmi": curves(LOW, seed=1)}, MIM: {"nmi": curves(LOW, seed=2)}})
    found = verdict(run)
    assert found.status == "can't tell" and found.effect.low < 0 < found.effect.high
    assert found.reason == "the interval includes 0"


def test_a_handful_of_images_gives_no_interval(tmp_path):
    run = make(tmp_path, {CL: {"nmi": curves(HIGH, 9)}, MIM: {"nmi": curves(LOW, 9)}})
    found = verdict(run)
    assert found.status == "can't tell" and not found.effect.known
    assert found.reason == "there is no interval: 9 images in common, at least 10 are needed"


def test_only_common_images_are_compared(tmp_path):
    a, b = curves(HIGH, 40, seed=1), curves(LOW, 40, seed=2)
    kept = list(range(39, 9, -1))  # 30 of them, in another order
    part = traces(b.values["nmi"][kept], ids=[b.images[i] for i in kept])
    found = verdict(make(tmp_path, {CL: {"nmi": a}, MIM: {"nmi": part}})).effect
    table = paired_difference(a, part, "nmi")
    assert found.count == 30
    expected = (a.values["nmi"][10:] - b.values["nmi"][10:])[:, 4:].mean()
    assert found.value == pytest.approx(float(expected), rel=1e-5) and float(table.attrs["images"]) == 30


# ------------------------------------------------------------------ not measured


def test_what_is_not_measured_is_named_with_its_command(tmp_path):
    nothing = Outcome("failed", reason="it broke", hint="mend it")
    done = {"nmi": curves(HIGH)}
    cases = {
        "metric": ({CL: done, MIM: done}, claim(quantity="spread"), "the run has no 'spread'"),
        "cell": ({CL: done, MIM: {}}, claim(), f"'nmi' of '{MIM}' is not measured yet"),
        "failed": ({CL: done, MIM: {"nmi": nothing}}, claim(), f"'nmi' of '{MIM}' failed: it broke"),
        "model": (
            {CL: done, "timm:x": done},
            claim(),
            "the run has no trained MIM model ('timm:x' may be one",
        ),
        "untrained": (
            {CL: done, MIM: {"nmi": curves(LOW)}, RANDOM: {}},
            claim(),
            f"'nmi' of '{RANDOM}' is not measured yet",
        ),
        "layers": (
            {CL: {"nmi": curves([1.0])}, MIM: {"nmi": curves([0.0])}},
            claim(),
            "lies in the last third",
        ),
    }
    for name, (models, finding, reason) in cases.items():
        found = verdict(make(tmp_path / name, models), finding)
        assert found.status == "not measured" and reason in found.reason, (name, found)
        if name in ("metric", "cell", "untrained"):
            assert found.missing == (finding.metrics[0],)
            command = f"--metrics {finding.metrics[0]} --dataset {DATASET}"
            assert command in found.hint and f"--model {CL}" in found.hint
            assert "--image-size 32x64" in found.hint and "--limit 40" in found.hint and "--out" in found.hint
            assert "--seed" not in found.hint and "unwatched" not in found.hint
    assert "list models" in verdict(make(tmp_path / "m2", {CL: done}), claim()).hint


def test_a_claim_that_fails_anyway_needs_no_baseline(tmp_path):
    run = make(tmp_path, {CL: {"nmi": curves(LOW)}, MIM: {"nmi": curves(HIGH)}, RANDOM: {}})
    assert verdict(run).status == "does not hold"


def test_results_that_do_not_belong_together_are_not_compared(tmp_path):
    models = {CL: {"nmi": curves(HIGH)}, MIM: {"nmi": curves(LOW)}}
    other = {MIM: {"identity": {"images": "0" * 32}}}
    found = verdict(make(tmp_path / "images", models, about=other))
    assert found.status == "not measured" and "measured on different images" in found.reason
    run = make(tmp_path / "version", {CL: {"spread": scored("spread", LOW)}, MIM: {}})
    newer = scored("spread", LOW).assign_attrs(version=2)
    _fill(run.folder(MIM, DATASET), "spread", {}, newer)
    found = verdict(run, claim(quantity="spread"))
    assert found.status == "not measured" and "different versions of the metric" in found.reason


def test_a_damaged_file_is_not_measured(tmp_path):
    run = make(tmp_path, {CL: {"nmi": curves(HIGH)}, MIM: {"nmi": curves(LOW)}})
    path = run.folder(MIM, DATASET).result("nmi")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    found = verdict(run)
    assert found.status == "not measured" and "damaged" in found.reason


def test_a_metric_with_options_stands_in_for_the_plain_one_alone(tmp_path):
    done = {"nmi:a=1": curves(HIGH, seed=1)}
    run = make(tmp_path / "one", {CL: done, MIM: {"nmi:a=1": curves(LOW, seed=2)}})
    assert verdict(run).status == "holds"
    two = make(tmp_path / "two", {CL: {**done, "nmi:b=1": curves(HIGH)}, MIM: {}})
    assert "several options" in verdict(two, claim(than=None)).reason


# ------------------------------------------------------------------ layers and quantities


def place(layers: int) -> np.ndarray:
    return (np.arange(1, layers + 1) - 0.5) / layers


@pytest.mark.parametrize(
    ("layers", "first", "middle", "last"),
    [
        (12, [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]),
        (6, [1, 2], [3, 4], [5, 6]),
        (4, [1], [2, 3], [4]),
        (3, [1], [2], [3]),
        (2, [1], [], [2]),
    ],
)
def test_thirds_of_any_depth(layers, first, middle, last):
    for span, expected in ((FIRST_THIRD, first), (MIDDLE_THIRD, middle), (LAST_THIRD, last)):
        if not expected:
            with pytest.raises(NotMeasured):
                span.weights(place(layers))
            continue
        weights = span.weights(place(layers))
        assert list(np.flatnonzero(weights) + 1) == expected and weights.sum() == pytest.approx(1)
    curve = np.random.default_rng(0).normal(size=(5, layers))
    late = curve[:, [n - 1 for n in last]].mean(1) - curve[:, [n - 1 for n in first]].mean(1)
    np.testing.assert_allclose(LATE_MINUS_EARLY.read(curve, place(layers)), late)
    np.testing.assert_allclose(LAST_LAYER.read(curve, place(layers)), curve[:, -1])
    np.testing.assert_allclose(FIRST_LAYER.read(curve, place(layers)), curve[:, 0])
    np.testing.assert_allclose(BEST_LAYER.read(curve, place(layers)), (curve.argmax(1) + 0.5) / layers)


def test_models_of_different_depth_are_compared_by_relative_depth(tmp_path):
    deep = [*[0.2] * 8, *[0.6] * 4]
    run = make(tmp_path, {CL: {"nmi": curves(deep, seed=1)}, MIM: {"nmi": curves(LOW, seed=2)}})
    found = verdict(run)
    assert found.status == "holds" and found.effect.value == pytest.approx(0.4, abs=0.02)
    assert found.layers == "last third (layers 9-12) and last third (layers 5-6)"


def test_decoders_and_sites_between_are_left_out(tmp_path):
    encoder = curves(HIGH, seed=1)
    wide = np.concatenate([encoder["nmi"], np.full((40, 3, 2), 99.0)], axis=1)
    rows = rows_of(6, decoder=3)
    between = [replace(rows[0], depth=d, site=s) for d, s in ((0.0, "embed"), (0.5, "mid"))]
    wide = np.concatenate([np.full((40, 2, 2), -99.0), wide], axis=1)
    full = traces(wide, rows=[*between, *rows])
    run = make(tmp_path, {CL: {"nmi": full}, MIM: {"nmi": curves(LOW, seed=2)}})
    expected = (encoder["nmi"] - curves(LOW, seed=2)["nmi"]).mean()
    assert verdict(run, claim(over=ALL_LAYERS)).effect.value == pytest.approx(float(expected), rel=1e-5)


def frequencies(drop: float, size: int, seed: int) -> Traces:
    """Log amplitudes that fall linearly, with a mean of its own at frequency 0."""
    rng = np.random.default_rng(seed)
    values = np.full((30, 6, 4), np.nan)
    axis = 2 * np.arange(size) / (2 * size)
    values[:, :, :size] = -drop - 2 * axis + rng.normal(0, 0.01, (30, 6, size))
    values[:, :, 0] = 0
    padded = np.concatenate([axis, np.full(4 - size, np.nan)])
    return traces(values, "fourier", constants={"frequency": np.tile(padded, (6, 1))})


def test_inner_axes_are_reduced_as_told(tmp_path):
    run = make(tmp_path, {CL: {"fourier": frequencies(3.0, 4, 1)}, MIM: {"fourier": frequencies(1.0, 4, 2)}})
    with_dc = verdict(run, claim(quantity="fourier", higher="MIM", than="CL")).effect
    assert with_dc.value == pytest.approx(2, abs=0.02) and with_dc.units == "nats"
    same = verdict(run, claim(quantity=Quantity("fourier", inner=LastLess(0)), higher="MIM", than="CL"))
    assert same.effect.value == pytest.approx(with_dc.value) and not same.effect.note
    without = verdict(run, claim(quantity=Quantity("fourier", inner=LastLess(1)), higher="MIM", than="CL"))
    assert without.status == "can't tell" and abs(without.effect.value) < 0.01
    band = verdict(run, claim(quantity=Quantity("fourier", inner=Above(0.5)), than=None)).effect
    assert band.value == pytest.approx(-3 - 2 * (0.5 + 0.75) / 2, abs=0.01)
    rank = verdict(run, claim(quantity=Quantity("fourier", inner=Rank(9, less=2)), than=None)).effect
    assert rank.value == pytest.approx(-2 * (0.75 - 0.25), abs=0.01)


def test_other_grids_are_taken_at_other_frequencies_and_it_is_said(tmp_path):
    run = make(tmp_path, {CL: {"fourier": frequencies(3.0, 4, 1)}, MIM: {"fourier": frequencies(1.0, 3, 2)}})
    found = verdict(run, claim(quantity=Quantity("fourier", inner=LastLess(0)), higher="MIM", than="CL"))
    assert found.status == "holds"
    assert found.reason.endswith("the models' values were taken at different places, 0.667 and 0.75")


def test_layers_that_end_at_other_ranks_are_said(tmp_path):
    """Stages of a Swin: a later one has fewer tokens, and so fewer eigenvalues than the rank asked for."""
    values = np.random.default_rng(0).normal(size=(30, 6, 4))
    values[:, 4:, 3] = np.nan
    run = make(tmp_path, {CL: {"fourier": traces(values, "fourier")}})
    quantity = Quantity("fourier", inner=Rank(4))
    found = verdict(run, claim(quantity=quantity, than=None, over=LATE_MINUS_EARLY)).effect
    assert found.note == "the layers' values were taken at different places, 3 to 4"
    beyond = verdict(run, claim(quantity=Quantity("fourier", inner=Rank(4, less=5)), than=None))
    assert beyond.status == "not measured" and "no value at any layer" in beyond.reason


def test_scores_of_each_image_are_paired(tmp_path):
    """Two probes that are wrong about the same images: only where they differ counts."""
    rng = np.random.default_rng(0)
    correct = rng.random((6, 200)) < 0.5
    better = correct.copy()
    better[-1, np.flatnonzero(~correct[-1])[:10]] = True
    for name, right in (("holds", better), ("can't tell", correct)):
        models = {
            CL: {"linear_probe": scored("linear_probe", [], correct=right)},
            MIM: {"linear_probe": scored("linear_probe", [], correct=correct)},
        }
        run = make(tmp_path / name[:3], models)
        found = verdict(run, claim(quantity="linear_probe", over=LAST_LAYER))
        assert found.status == name and found.effect.over == "images"
        assert found.effect.units == "percentage points"
    assert found.effect.value == 0


def test_correct_is_only_believed_where_it_is_what_the_value_is_the_mean_of(tmp_path):
    correct = np.random.default_rng(0).random((6, 50)) < 0.5
    result = scored("linear_probe", [], correct=correct)
    result["linear_probe"] = result["linear_probe"] + 5.0
    run = make(tmp_path, {CL: {"linear_probe": result}})
    found = Evidence(run, DATASET).curves("linear_probe", CL)
    assert found.values is None


def test_the_best_layer_needs_values_of_each_image(tmp_path):
    rng = np.random.default_rng(1)
    early, late = [0.2, 0.8, 0.5, 0.4, 0.3, 0.2], [0.2, 0.3, 0.4, 0.5, 0.6, 0.9]
    draw = lambda p: rng.random((6, 300)) < np.array(p)[:, None]  # noqa: E731
    run = make(
        tmp_path / "images",
        {
            CL: {"linear_probe": scored("linear_probe", [], correct=draw(late))},
            MIM: {"linear_probe": scored("linear_probe", [], correct=draw(early))},
        },
    )
    peak = claim(quantity="linear_probe", over=BEST_LAYER)
    found = verdict(run, peak)
    assert found.status == "holds" and found.effect.value == pytest.approx(4 / 6)
    assert found.effect.units == "of the depth" and found.layers == "best layer of 6"
    bare = make(
        tmp_path / "bare",
        {CL: {"linear_probe": scored("x", late)}, MIM: {"linear_probe": scored("x", early)}},
    )
    assert verdict(bare, peak).status == "not measured"  # its value has another name
    named = {m: {"linear_probe": scored("linear_probe", c)} for m, c in ((CL, late), (MIM, early))}
    found = verdict(make(tmp_path / "named", named), peak)
    assert found.status == "can't tell" and "no values of each image" in found.reason


def test_results_own_intervals_are_combined(tmp_path):
    models = {
        CL: {"shape_bias": scored("shape_bias", [50] * 6, half=3.0)},
        MIM: {"shape_bias": scored("shape_bias", [40] * 6, half=4.0)},
    }
    found = verdict(make(tmp_path / "a", models), claim(quantity="shape_bias", over=LAST_LAYER))
    assert found.status == "holds" and found.effect.over == "results"
    assert (found.effect.low, found.effect.high) == pytest.approx((5, 15))  # 10 -+ sqrt(3^2 + 4^2)
    change = verdict(make(tmp_path / "b", models), claim(quantity="shape_bias", over=LATE_MINUS_EARLY))
    assert change.effect.high == pytest.approx(10)  # sqrt(6^2 + 8^2): layers may err together
    models[MIM] = {"shape_bias": scored("shape_bias", [40] * 6)}
    none = verdict(make(tmp_path / "c", models), claim(quantity="shape_bias", over=LAST_LAYER))
    assert none.status == "can't tell" and "gives no interval" in none.reason


def test_bands_of_a_result_have_the_mean_of_their_intervals(tmp_path):
    bands = np.array([0.1, 0.3, 0.5, 0.7])

    def drops(level):
        values = np.tile(np.array([0, 0, level, level + 2.0]), (6, 1))
        variables = {
            "frequency_robustness": (("layer", "band"), values, {"units": "%", "role": "mean"}),
            "frequency_robustness_low": (("layer", "band"), values - 1.5),
            "frequency_robustness_high": (("layer", "band"), values + 1.5),
        }
        coordinates = {**layer_coordinates(rows_of(6, site="out")), "band": bands}
        return xr.Dataset(variables, coordinates, {"metric": "frequency_robustness", "version": 1})

    models = {CL: {"frequency_robustness": drops(1.0)}, MIM: {"frequency_robustness": drops(6.0)}}
    quantity = Quantity("frequency_robustness", inner=Above(0.5))
    run = make(tmp_path, models)
    found = verdict(run, claim(quantity=quantity, higher="MIM", than="CL", over=LAST_LAYER)).effect
    assert found.value == pytest.approx(5) and found.low == pytest.approx(5 - 1.5 * 2**0.5)
    ranks = verdict(run, claim(quantity=replace(quantity, inner=Rank(3, less=2)), than=None)).effect
    assert ranks.value == pytest.approx(1) and not ranks.known  # no mean: its interval isn't known


def test_what_noise_costs_each_image_is_paired(tmp_path):
    rng = np.random.default_rng(2)
    clean = rng.random((6, 120)) < 0.8
    bands = np.array([0.1, 0.5, 0.9])

    def result(lost):
        """`lost` of two draws of noise make an image wrong, in the bands from 0.5."""
        noisy = np.repeat(2 * clean[:, None], 3, axis=1)
        noisy[:, 1:] -= np.minimum(noisy[:, 1:], lost)
        drop = 100 * (clean[:, None] - noisy / 2).mean(-1)
        variables = {
            "frequency_robustness": (("layer", "band"), drop, {"units": "%", "role": "mean"}),
            "correct": (("layer", "image"), clean.astype(np.int8)),
            "correct_noisy": (("layer", "band", "image"), noisy.astype(np.int16)),
        }
        images = np.array([f"{i}.png" for i in range(120)])
        coordinates = {**layer_coordinates(rows_of(6, site="out")), "band": bands, "image": images}
        return xr.Dataset(
            variables, coordinates, {"metric": "frequency_robustness", "version": 1, "seeds": 2}
        )

    models = {CL: {"frequency_robustness": result(0)}, MIM: {"frequency_robustness": result(1)}}
    run = make(tmp_path, models)
    quantity = Quantity("frequency_robustness", inner=Above(0.5))
    found = verdict(run, claim(quantity=quantity, higher="MIM", than="CL", over=LAST_LAYER))
    assert found.status == "holds" and found.effect.over == "images" and found.effect.count == 120
    assert found.effect.value == pytest.approx(50 * clean[-1].mean())


# ------------------------------------------------------------------ several models


def test_every_pair_of_models_has_its_verdict(tmp_path):
    models = {
        CL: {"nmi": curves(HIGH, seed=1)},
        "moco:b": {"nmi": curves(LOW, seed=5)},
        MIM: {"nmi": curves(LOW, seed=2)},
        "simmim:b": {},
    }
    found = verdict(make(tmp_path, models))
    said = {part.models: part.status for part in found.parts}
    assert said == {
        (CL, MIM): "holds",
        (CL, "simmim:b"): "not measured",
        ("moco:b", MIM): "can't tell",
        ("moco:b", "simmim:b"): "not measured",
    }
    assert found.status == "can't tell" and found.effect is None
    assert found.reason == "so for 1 of 2 combinations of models, 2 not measured"
    assert found.missing == ("nmi",)


def test_several_untrained_networks(tmp_path):
    """A model is held against its own untrained self; one without, against all of them."""
    models = {
        CL: {"nmi": curves(HIGH, seed=1)},
        MIM: {"nmi": curves(LOW, seed=2)},
        RANDOM: {"nmi": curves(LOW, seed=3)},
        "vit:x@random": {"nmi": curves(HIGH, seed=2)},
    }
    found = verdict(make(tmp_path, models))
    assert [b.model for b in found.baselines] == [RANDOM] and found.status == "holds"
    lower = claim(higher="MIM", than="CL", attributed="MIM")
    upside = {**models, CL: {"nmi": curves(LOW, seed=1)}, MIM: {"nmi": curves(HIGH, seed=2)}}
    found = verdict(make(tmp_path / "b", upside), lower)
    assert [b.model for b in found.baselines] == [RANDOM, "vit:x@random"]
    assert found.status == "does not hold" and found.baseline.model == "vit:x@random"


SEEDS = ["moco:a@1.pth", "moco:a@2.pth", "moco:a@3.pth"]


def seeds(levels: Sequence[float], names: Sequence[str] = SEEDS) -> dict:
    return {
        name: {"nmi": curves([level] * 6, seed=n, noise=0.001)}
        for n, (name, level) in enumerate(zip(names, levels, strict=True))
    }


def test_grouped_trainings_have_the_spread_between_them(tmp_path):
    other = [n.replace("moco", "simmim") for n in SEEDS]
    models = {**seeds([0.5, 0.6, 0.7]), **seeds([0.2, 0.25, 0.3], other)}
    run = make(tmp_path, models)
    found = verdict(run, groups=[SEEDS, ["simmim:a"]])
    assert found.models == ("moco:a (3 trainings)", "simmim:a (3 trainings)") and not found.parts
    assert found.effect.over == "trainings" and found.effect.count == 6
    means = [
        [float(c.mean[4:].mean()) for c in (Evidence(run, DATASET).curves("nmi", m) for m in names)]
        for names in (SEEDS, other)
    ]
    welch = stats.ttest_ind(*means, equal_var=False).confidence_interval(0.95)
    assert (found.effect.low, found.effect.high) == pytest.approx((welch.low, welch.high))
    assert found.status == "holds"
    alone = verdict(run)  # the same images many times over seem to know much better
    assert len(alone.parts) == 9 and alone.parts[0].effect.high - alone.parts[0].effect.low < 0.01


def test_a_single_training_is_taken_to_spread_like_the_group(tmp_path):
    models = {**seeds([0.5, 0.6, 0.7]), MIM: {"nmi": curves(LOW, noise=0.001)}}
    models[RANDOM] = {"nmi": curves([0.1] * 6, noise=0.001)}
    found = verdict(make(tmp_path, models), groups=[SEEDS])
    half = stats.t.ppf(0.975, 2) * 0.1 * (1 + 1 / 3) ** 0.5
    assert found.effect.high - found.effect.value == pytest.approx(half, rel=0.01)
    assert found.status == "can't tell"  # 0.4 -+ 0.5, though each training is higher by far
    assert found.baseline.model == RANDOM and found.baseline.beyond.over == "trainings"


def test_trainings_that_are_copies_tell_nothing(tmp_path):
    same = curves(HIGH, seed=1)
    models = {**{name: {"nmi": same} for name in SEEDS}, MIM: {"nmi": curves(LOW)}}
    found = verdict(make(tmp_path, models), groups=[SEEDS])
    assert found.status == "can't tell" and "do not differ at all" in found.reason


def test_groups_that_cannot_be(tmp_path):
    run = make(tmp_path, {**seeds([0.5, 0.6, 0.7]), MIM: {}, RANDOM: {}})
    for group, said in (
        ([CL, MIM], "the run has no model"),
        ([SEEDS[0]], "one model of the run"),
        ([SEEDS[0], MIM], "different objectives"),
        ([SEEDS[0], RANDOM], "different weights"),
    ):
        if said == "the run has no model":
            group = ["nothing:x", MIM]
        with pytest.raises(UsageError, match=said):
            Evidence(run, DATASET, [group])
    with pytest.raises(UsageError, match="two groups"):
        Evidence(run, DATASET, [SEEDS[:2], SEEDS[1:]])
    assert Evidence(run, DATASET, [["moco:a"]]).subjects[0].models == tuple(SEEDS)  # not the untrained one


# ------------------------------------------------------------------ rules, for third parties


def test_judge_and_combined():
    up, down, both = (Effect(0.5, 0.1, 0.9), Effect(-0.5, -0.9, -0.1), Effect(0.1, -0.1, 0.3))
    assert [judge(e).status for e in (up, down, both, Effect(1.0))] == [
        "holds",
        "does not hold",
        "can't tell",
        "can't tell",
    ]
    assert "no untrained network" in judge(up).reason
    bases = {name: Baseline("r", "m", up, e) for name, e in (("up", up), ("both", both), ("down", down))}
    bases["none"] = Baseline("r", "m", up, Effect(1.0))
    assert judge(up, [bases["up"]]).status == "holds"
    assert judge(up, [bases["up"], bases["both"]]).status == "can't tell"
    assert judge(up, [bases["up"], bases["none"]]).status == "can't tell"
    assert judge(up, [bases["none"], bases["both"], bases["down"]]).status == "does not hold"
    assert judge(both, [bases["both"]]).status == "can't tell"
    assert judge(Effect(0.0, 0.0, 0.0)).status == "can't tell"
    one, two = Verdict("holds", ""), Verdict("does not hold", "")
    assert [combined(p).status for p in ([one], [one, one], [two, two], [one, two])] == [
        "holds",
        "holds",
        "does not hold",
        "can't tell",
    ]


def test_under_no_difference_hardly_anything_holds(tmp_path):
    """CL, MIM and untrained drawn from one distribution of images: at most 5 % hold, by chance."""
    from probekit.findings.curves import Curves
    from probekit.findings.effects import Term, effect

    held, known = 0, 400
    names = tuple(f"{i}" for i in range(40))
    for trial in range(known):
        rng = np.random.default_rng([11, trial])
        hard = rng.normal(0, 1, (40, 1))
        pair = []
        for model in (CL, MIM):
            values = hard + rng.gamma(2.0, 1.0, (40, 6))  # skewed
            columns = (values.mean(0), *[np.full(6, np.nan)] * 2, values, np.arange(1.0, 7), place(6))
            pair.append(Curves(model, "", 1, *columns, (), names))
        found = effect([Term(1.0, (pair[0],)), Term(-1.0, (pair[1],))], LAST_THIRD, trial)
        held += judge(found).status == "holds"
    # one side of a 95 % interval: 2.5 % expected, and 3 standard errors of 400 trials are 2.3 %
    assert held / known <= 0.05


class Broken(Finding):
    name, claim, sentence = "broken", "It works.", "nowhere"
    metrics = ("nmi",)

    def evaluate(self, evidence):
        raise ZeroDivisionError("of no use")


class Own(Finding):
    """A finding in ten lines that isn't a contrast: heads differ."""

    name, claim, sentence = "own", "CL is positive.", "nowhere"
    metrics, layers = ("nmi",), "all layers"

    def evaluate(self, evidence):
        return combined(
            [
                judge(evidence.effect([(cl, 1.0)], "nmi", ALL_LAYERS), models=cl.models)
                for cl in evidence.of("CL")
            ]
        )


class Wrong(Own):
    name = "wrong"

    def evaluate(self, evidence):
        return "holds"


def test_a_broken_finding_costs_only_itself(tmp_path):
    run = make(tmp_path, {CL: {"nmi": curves(HIGH)}, MIM: {"nmi": curves(LOW)}})
    broken, own, wrong, good = evaluate(run, [Broken(), Own(), Wrong(), claim()])
    assert broken.failure == "ZeroDivisionError: of no use" and "test_findings.py" in broken.details
    assert broken.verdict.status == "not measured" and broken.claim == "It works."
    assert own.verdict.status == "holds" and own.verdict.effect.value > 0
    assert "returned str" in wrong.failure
    assert good.verdict.status == "holds" and not good.failure


PLUGIN = """
from probekit import hookimpl
from probekit.specs import FindingSpec

PROBEKIT_API = 1

@hookimpl
def probekit_findings():
    return [
        FindingSpec(name="good", summary="a claim", target="claims_of_{tag}:GOOD"),
        FindingSpec(name="bad", summary="a broken one", target="claims_of_{tag}:Bad"),
        FindingSpec(name="gone", summary="not there", target="claims_of_{tag}:NOTHING"),
        FindingSpec(name="odd", summary="no finding", target="claims_of_{tag}:ODD"),
        FindingSpec(name="nmi-collapses", summary="a name of probekit's", target="claims_of_{tag}:GOOD"),
    ]
"""
CLAIMS = """
from probekit.findings import Contrast, Finding

GOOD = Contrast(
    name="good",
    claim="CL <script>alert(1)</script> | [link](http://x) is\\nhigher \\x1b[31m.",
    sentence="Me, Fig. 1",
    quantity="nmi",
    higher="CL",
    than="MIM",
)

class Bad(Finding):
    name = claim = sentence = "bad"

    def evaluate(self, evidence):
        return {}["nothing"]

ODD = 3
"""


@pytest.fixture
def pack(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "pack"
    folder.mkdir()
    (folder / "claims_of_a.py").write_text(CLAIMS)
    (folder / "mine.py").write_text(PLUGIN.replace("{tag}", "a"))
    monkeypatch.syspath_prepend(folder)
    return folder / "mine.py"


def test_a_pack_offers_findings_like_the_built_ins(tmp_path, pack):
    run = make(tmp_path / "run", {CL: {"nmi": curves(HIGH)}, MIM: {"nmi": curves(LOW)}})
    catalog = Catalog.load([pack], enabled=False)
    assert catalog.problems == []
    found = {t.name: t for t in evaluate(run, catalog=catalog)}
    assert found["good"].verdict.status == "holds" and found["good"].pack == "mine"
    assert found["bad"].failure == "KeyError: 'nothing'"
    assert "NOTHING" in found["gone"].failure and "int" in found["odd"].failure
    assert found["mine/nmi-collapses"].claim == found["good"].claim
    assert found["nmi-collapses"].verdict.status == "does not hold" and not found["nmi-collapses"].failure


# ------------------------------------------------------------------ the built-in ones


def test_every_built_in_finding_is_whole():
    catalog = Catalog.load(enabled=False)
    page = (Path(__file__).parent.parent / "docs" / "findings.md").read_text(encoding="utf-8")
    for entry in catalog.findings:
        finding = catalog.resolve_target(entry)
        assert isinstance(finding, Finding) and finding.name == entry.name
        assert finding.claim.endswith(".") and len(finding.claim) < 160
        assert re.search(r"Fig\. |`", finding.sentence), finding.name
        assert finding.metrics and finding.layers
        assert f"| `{finding.name}` |" in page, finding.name
        assert f"`{finding.metrics[0]}`" in page


def test_a_collapse_says_whether_it_is_uniform(tmp_path):
    from probekit.findings.park2023 import NMI_COLLAPSES

    models = {CL: {"nmi": curves(LOW)}, MIM: {"nmi": curves(HIGH)}}
    assert (
        "is not measured (attention_entropy)" in verdict(make(tmp_path / "a", models), NMI_COLLAPSES).reason
    )
    for share, said in ((0.99, "nearly uniform"), (0.7, "no uniform ones")):
        result = scored("attention_entropy_share", [share] * 6, units="1").assign_attrs(
            metric="attention_entropy"
        )
        for found in models.values():
            found["attention_entropy"] = result
        reason = verdict(make(tmp_path / said[:2], models), NMI_COLLAPSES).reason
        assert f"its maps are {said}: entropy {share:.3f}" in reason


@pytest.mark.parametrize("sign", [1, -1], ids=["MIM above CL", "MIM below CL"])
def test_the_hybrid_is_nearer_whichever_of_the_two_is_higher(tmp_path, sign):
    from probekit.findings.park2023 import HYBRID_NMI_EARLY, HYBRID_NMI_LATE

    cl, mim = [0.3, 0.3, 0.2, 0.2, 0.1, 0.1], [0.6] * 6
    mixed = [0.55, 0.5, 0.4, 0.3, 0.2, 0.15]  # as MIM, then as CL
    turned = [0.35, 0.35, 0.4, 0.5, 0.55, 0.5]  # as CL, then as MIM

    def of(values, seed):
        return {"nmi": curves([0.5 + sign * (v - 0.5) for v in values], seed=seed)}

    models = {CL: of(cl, 1), MIM: of(mim, 2), HYBRID: of(mixed, 3)}
    run = make(tmp_path / "a", models)
    early, late = verdict(run, HYBRID_NMI_EARLY), verdict(run, HYBRID_NMI_LATE)
    assert early.status == late.status == "holds"
    assert early.models == (HYBRID, MIM, CL) and late.models == (HYBRID, CL, MIM)
    # how far from the middle, towards the one it is to be like
    assert early.effect.value == pytest.approx(0.525 - 0.45, abs=0.02)
    assert late.effect.value == pytest.approx(0.35 - 0.175, abs=0.02)
    other = make(tmp_path / "b", {**models, HYBRID: of(turned, 3)})
    assert verdict(other, HYBRID_NMI_EARLY).status == "does not hold"
    assert verdict(other, HYBRID_NMI_LATE).status == "does not hold"
    random = make(tmp_path / "c", {**models, RANDOM: of(mixed, 3)})
    found = verdict(random, HYBRID_NMI_EARLY)
    assert found.status == "does not hold" and found.baseline.of == HYBRID


def test_nearer_is_not_told_where_the_two_are_alike(tmp_path, cli):
    from probekit.findings.park2023 import HYBRID_NMI_EARLY

    models = {CL: {"nmi": curves(LOW, seed=1)}, MIM: {"nmi": curves(LOW, seed=2)}}
    found = verdict(make(tmp_path / "a", {**models, HYBRID: {"nmi": curves(HIGH)}}), HYBRID_NMI_EARLY)
    assert found.status == "can't tell" and found.effect is None
    assert found.reason.startswith(f"'{MIM}' and '{CL}' are not told apart here: they differ by [-")
    _, out, _ = cli("--no-plugins", "findings", tmp_path / "a", "--format", "md")
    (row,) = (line for line in out.splitlines() if line.startswith("| **hybrid-nmi-early"))
    assert "can't tell | 'simmim:a' and 'moco:a' are not told apart here" in row
    few = {name: {"nmi": curves(LOW, 5, seed=7)} for name in (CL, MIM, HYBRID)}
    found = verdict(make(tmp_path / "b", few), HYBRID_NMI_EARLY)
    assert found.status == "can't tell" and "at least 10 are needed" in found.reason


# ------------------------------------------------------------------ fingerprint


def test_a_fingerprint_places_models_between_the_references(tmp_path):
    models = {
        CL: {"nmi": curves([0.2] * 6, seed=1)},
        MIM: {"nmi": curves([0.6] * 6, seed=2)},
        HYBRID: {"nmi": curves([0.3] * 6, seed=3)},
        RANDOM: {"nmi": curves([0.8] * 6, seed=4)},
    }
    run = make(tmp_path, models)
    placed = {p.model: p for p in fingerprint(Evidence(run, DATASET), [claim(), claim(name="same")])}
    at = {m: p.position for m, p in placed.items()}
    assert at[CL].value == 0 and (at[CL].low, at[CL].high) == (0, 0) and at[MIM].value == 1
    assert at[HYBRID].value == pytest.approx(0.25, abs=0.05) and at[HYBRID].low < 0.25 < at[HYBRID].high
    assert at[RANDOM].value == pytest.approx(1.5, abs=0.08) and at[RANDOM].low > 1.3
    assert placed[HYBRID].value.value == pytest.approx(0.3, abs=0.1) and placed[HYBRID].axis == "higher"


def test_what_cannot_be_placed_has_its_value_and_the_reason(tmp_path):
    run = make(tmp_path / "a", {CL: {"nmi": curves(LOW)}, RANDOM: {"nmi": curves(HIGH)}})
    for one in fingerprint(Evidence(run, DATASET), [claim()]):
        assert one.value.known and one.position is None
        assert one.reason == "not placed: the run has no trained MIM model"
    run = make(tmp_path / "b", {CL: {"nmi": curves(LOW)}, MIM: {"nmi": curves(LOW, seed=5)}, HYBRID: {}})
    cl, mim, hybrid = fingerprint(Evidence(run, DATASET), [claim()])
    assert "do not differ here" in cl.reason and cl.position is None and mim.position is None
    assert hybrid.value is None and "not measured yet" in hybrid.reason


# ------------------------------------------------------------------ what is printed


@pytest.fixture
def shown(tmp_path) -> Run:
    return make(
        tmp_path / "run",
        {
            CL: {"nmi": curves(LOW, seed=1)},
            MIM: {"nmi": curves(HIGH, seed=2)},
            RANDOM: {"nmi": curves(MIDDLE, seed=3)},
        },
    )


def test_the_command_prints_a_table_that_fits(shown, cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = cli("--no-plugins", "findings", shown.path)
    assert code == 0 and err == ""
    command = next(line for line in out.splitlines() if line.startswith("    probekit run"))
    assert all(len(line) <= 80 for line in out.splitlines() if line != command)
    assert "attention_distance,similarity_heads" in command and "nmi," not in command
    assert "nmi-collapses" in out and "holds" in out and "+0.15" in out.replace("\n", "")
    flat = " ".join(out.split())
    assert "do not cover other trainings" in flat and "40 in common" in flat
    assert "hybrid-probe-early" in flat and "no trained hybrid model" in flat
    assert "fingerprint: 0 is where the CL models are" in flat and "1.00" in flat


def test_json_and_markdown(shown, cli):
    code, out, _ = cli("--no-plugins", "findings", shown.path, "--json")
    (found,) = json.loads(out)["datasets"]
    by_name = {f["name"]: f for f in found["findings"]}
    collapse = by_name["nmi-collapses"]
    assert code == 0 and collapse["verdict"]["status"] == "holds"
    assert collapse["verdict"]["effect"]["over"] == "images"
    assert collapse["verdict"]["baselines"][0]["beyond"]["low"] > 0
    assert by_name["shape-biased"]["verdict"]["missing"] == ["shape_bias"]
    assert {p["model"] for p in found["fingerprint"]} == {CL, MIM, RANDOM}
    code, out, _ = cli("--no-plugins", "findings", shown.path, "--format", "md")
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert code == 0 and table[0] == "| claim | verdict | effect [95 %] | untrained |"
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 5 for line in table)
    assert cli("findings", shown.path, "--format", "xml")[0] == 2
    assert cli("findings", shown.path, "--group", "moco")[0] == 2
    assert cli("findings", shown.path, "--dataset", "other")[0] == 2


def test_bundled_miniatures_show_a_claim_or_not_and_no_more(tmp_path, cli):
    """What a miniature does is never printed as if it were the paper's result."""
    bundled = {"weights": {"kind": "bundled"}}
    run = make(
        tmp_path,
        {
            "moco:mini": {"nmi": curves(LOW)},
            MIM: {"nmi": curves(HIGH)},
            "untrained:mini": {"nmi": curves(HIGH, seed=1)},
        },
        about={"moco:mini": bundled, "untrained:mini": {**bundled, "objective": "untrained"}},
    )
    found = verdict(run, claim(higher="MIM", than="CL", attributed="CL"))
    assert found.status == "holds" and found.baselines[0].model == "untrained:mini"
    code, out, _ = cli("--no-plugins", "findings", run.path)
    flat = " ".join(out.split())
    assert (
        code == 0
        and "nothing for or against the paper's models" in flat
        and "moco:mini, untrained:mini" in flat
    )
    assert (
        re.search(r"^nmi-collapses +seen ", out, re.MULTILINE) and "holds " not in out.partition("note:")[0]
    )
    table = cli("--no-plugins", "findings", run.path, "--format", "md")[1]
    assert "| seen |" in table and "| holds |" not in table
    assert ">seen<" in page(run) and ">holds<" not in page(run)
    other = make(tmp_path / "other", {CL: {"nmi": curves(LOW)}, MIM: {"nmi": curves(HIGH)}})
    text = cli("--no-plugins", "findings", other.path)[1]
    assert "bundled miniatures" not in text and re.search(r"^nmi-collapses +holds ", text, re.MULTILINE)


def test_seeds_from_the_command_line(tmp_path, cli):
    run = make(tmp_path, {**seeds([0.1, 0.15, 0.2]), MIM: {"nmi": curves([0.9] * 6)}})
    command = ("--no-plugins", "findings", run.path, "--group", ",".join(SEEDS))
    code, out, _ = cli(*command)
    flat = " ".join(out.split())
    assert code == 0 and "intervals are over trainings" in flat and "do not cover other trainings" not in flat
    assert "(moco:a (3 trainings)" in cli(*command, "--format", "md")[1].replace("simmim:a, ", "")


def test_broken_and_hostile_findings_on_the_command_line(shown, pack, cli):
    code, out, _ = cli("--no-plugins", "--plugin", pack, "findings", shown.path)
    assert code == 1 and "KeyError: 'nothing'" in out and "\x1b" not in out
    code, out, _ = cli("--no-plugins", "--plugin", pack, "findings", shown.path, "--format", "md")
    row = next(line for line in out.splitlines() if line.startswith("| **good**"))
    assert "\\<script\\>" in row and "](" not in row and len(re.findall(r"(?<!\\)\|", row)) == 5


def test_findings_import_no_torch(shown):
    code = (
        "import sys; from probekit.cli.app import main; "
        f"assert main(['--no-plugins', 'findings', {str(shown.path)!r}]) == 0; "
        "bad = {'torch', 'timm', 'transformers'} & set(sys.modules); assert not bad, bad; "
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------ the page


def page(run: Run) -> str:
    from probekit.reports.html import render

    return render(run, run.path / "report.html").read_text(encoding="utf-8")


def test_the_page_has_a_section_where_models_can_be_compared(shown, tmp_path):
    text = page(shown)
    section = text[text.index('id="findings"') : text.index('id="metric-1"')]
    assert "nmi-collapses" in section and ">holds<" in section and "[+0.3" in section
    assert "do not cover other trainings" in section and "<script" not in text
    assert "shape-biased" in section and "the run has no" in section
    assert page(shown) == text
    single = make(tmp_path / "one", {CL: {"nmi": curves(LOW)}})
    assert 'id="findings"' not in page(single)


def test_hostile_names_are_escaped_on_the_page(tmp_path):
    bad = "moco:<script>alert(1)</script>"
    run = make(tmp_path, {bad: {"nmi": curves(LOW)}, "simmim:</td>{{7*7}}": {"nmi": curves(HIGH)}})
    text = page(run)
    assert "<script>" not in text and "</td>{{" not in text and "49" not in re.findall(r">(\d+)<", text)
    assert "&lt;script&gt;" in text[text.index('id="findings"') :]
