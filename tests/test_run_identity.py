"""What numbers belong to, and what of a run survives a failure: identities, containment, resume elsewhere."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import probekit
from probekit.engine import numerics
from probekit.errors import StoreError, WatchError
from probekit.events import Event
from probekit.metric import Metric
from probekit.plugins.catalog import Catalog, Entry, source_of
from probekit.specs import ModelSpec
from probekit.store.cells import TraceFolder


def go(models, photos, metrics, out, plugin=None, **more):
    models = [models] if isinstance(models, str) else models
    plugins = [] if plugin is None else [plugin]
    return probekit.run(models, [f"folder:{photos}"], metrics, out=out, plugins=plugins, limit=4, **more)


def outcomes(run):
    return {c.metric.rpartition("/")[2]: c.outcome for c in run.cells()}


# ---------------------------------------------------------------------- one folder, one metric

SAME_NAME = """
from probekit import Metric

class Own(Metric):
    name = "feature_variance"; needs = {"tokens"}; dims = {"feature_variance": ()}
    def measure(self, layer):
        return {"feature_variance": layer.tokens.mean((1, 2)) * 0 + 42}

class Place(Metric):
    name = "place"; needs = {"attention"}; dims = {"place": ()}
    def __init__(self, at="here"):
        super().__init__(at=at)
    def measure(self, layer):
        return {"place": layer.attention.mean((1, 2, 3)) * 0 + len(self.options["at"])}
"""


def test_metrics_of_one_name_and_options_with_a_slash_stay_apart(photos, tiny, tmp_path):
    plugin = tmp_path / "mine.py"
    plugin.write_text(SAME_NAME)
    metrics = ["feature_variance", "mine/feature_variance", "place:at=a/end", "place:at=abc/end"]
    run = go(tiny, photos, metrics, tmp_path / "r", plugin)
    assert {o.status for o in outcomes(run).values()} == {"done"}
    assert (run.result("mine/feature_variance")["feature_variance"].values == 42).all()
    assert (run.result("feature_variance")["feature_variance"].values != 42).all()
    assert (run.traces("mine/feature_variance")["feature_variance"] == 42).all()
    assert (run.traces("feature_variance")["feature_variance"] != 42).all()
    for metric, length in {"place:at=a/end": 5, "place:at=abc/end": 7}.items():
        assert (run.traces(metric)["place"] == length).all()
    plain = [p.name for p in (run.path / "cells").glob("*/*/traces/*")]
    assert "feature_variance-v1" in plain  # as ever


def test_shards_of_something_else_are_not_read(photos, tiny, tmp_path):
    run = go(tiny, photos, ["attention_distance", "attention_entropy"], tmp_path / "r")
    folder = run.folder(run.models[0], run.datasets[0])
    theirs, ours = (
        folder.trace(m, int(run.result(m).attrs["version"]))
        for m in ("attention_entropy", "attention_distance")
    )
    for shard in theirs.glob("shard-*.h5"):
        (ours / shard.name).write_bytes(shard.read_bytes())
    with pytest.raises(StoreError, match="another 'metric'"):
        run.traces("attention_distance")


# ---------------------------------------------------------------------- the code of a model


def own_model(tmp_path: Path, **changes: str) -> str:
    text = (Path(__file__).parent / "tiny.py").read_text()
    for before, after in changes.items():
        text = text.replace(before, after)
    (tmp_path / "own.py").write_text(text)
    return f"{tmp_path}/own.py:build"


HEADS = {"HEADS, DEPTH = 32, 8, 16, 2, 3": "HEADS, DEPTH = 32, 8, 16, 4, 3"}


def test_an_edited_model_file_is_another_model(photos, tmp_path):
    go(own_model(tmp_path), photos, ["nmi"], tmp_path / "r")
    with pytest.raises(StoreError, match="made with another 'source'"):
        go(own_model(tmp_path, **HEADS), photos, ["fourier"], tmp_path / "r")
    go(own_model(tmp_path), photos, ["fourier"], tmp_path / "r")


def test_a_cell_goes_on_with_the_layers_it_began_with(photos, tmp_path, monkeypatch):
    """Also where the code's identity says nothing: a pack's model, a module that the file imports."""
    monkeypatch.setattr("probekit.subject.source_of", lambda entry, target: {})
    go(own_model(tmp_path), photos, ["nmi"], tmp_path / "r")
    with pytest.raises(StoreError, match=r"another 'blocks.0.attn heads': 2, now 4"):
        go(own_model(tmp_path, **HEADS), photos, ["fourier"], tmp_path / "r")


def test_a_pack_is_known_by_its_version(tmp_path):
    spec = ModelSpec(name="net", target="net:build", summary="a test")
    assert source_of(Entry(spec, "net", "1.0"), own_model) == {}
    assert set(source_of(Entry(spec, "", ""), own_model)) == {"source"}


# ---------------------------------------------------------------------- variations

VARIED = """
import numpy as np, xarray as xr
from probekit import DoesNotApply, Metric
from probekit.metric import Variation
from probekit.summaries import layer_coordinates, result_attributes

def darker(pixels, index):
    return pixels * FACTOR

def lighter(pixels, index):
    return pixels * 2

def beyond(module, fresh, anatomy):
    BEYOND

class One(Metric):
    name, source, change = "one", "features", staticmethod(darker)
    def variations(self):
        return [Variation("changed", pixels=self.change), Variation("beyond", model=beyond)]
    def summarize(self, traces):
        found = {n: float(np.asarray(t["features"]).mean()) for n, t in traces.variations.items()}
        empty = ("layer", np.zeros(len(traces.rows)))
        return xr.Dataset({self.name: empty}, layer_coordinates(traces.rows), result_attributes(self, traces) | found)

class Two(One):
    name, change = "two", staticmethod(lighter)
"""


def varied(photos, tiny, tmp_path, out, factor, beyond, metrics=("one",)):
    plugin = tmp_path / "varied.py"
    plugin.write_text(VARIED.replace("FACTOR", str(factor)).replace("BEYOND", beyond))
    return go(tiny, photos, metrics, tmp_path / out, plugin)


def test_a_changed_variation_is_measured_again(photos, tiny, tmp_path):
    raising = "raise DoesNotApply('no such layer')"
    first = varied(photos, tiny, tmp_path, "r", 0.5, raising).result("one").attrs
    assert "changed" in first and "beyond" not in first
    second = varied(photos, tiny, tmp_path, "r", 0.25, "pass").result("one").attrs
    fresh = varied(photos, tiny, tmp_path, "fresh", 0.25, "pass").result("one").attrs
    assert second["changed"] == fresh["changed"] != first["changed"]
    assert second["beyond"] == fresh["beyond"]


def test_variations_of_two_metrics_may_have_one_name(photos, tiny, tmp_path):
    both = varied(photos, tiny, tmp_path, "r", 0.5, "pass", ["one", "two"])
    alone = varied(photos, tiny, tmp_path, "alone", 0.5, "pass", ["two"])
    one, two = (both.result(m).attrs["changed"] for m in ("one", "two"))
    assert two == alone.result("two").attrs["changed"] != one


# ---------------------------------------------------------------------- precision


class Attends(nn.Module):
    """Torch's own attention, whose heads' outputs probekit computes; its residual stream has no float32."""

    def __init__(self):
        super().__init__()
        self.embed, self.attn = nn.Conv2d(3, 16, 8, 8), nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, images):
        x = self.embed(images).flatten(2).transpose(1, 2)
        return (x + self.attn(x, x, x, need_weights=False)[0]).mean(1)


def test_metrics_see_float32_whatever_the_forward_is_in():
    seen = {}

    class Sees(Metric):
        name, dims = "sees", {"sees": ()}
        needs = {"q", "k", "v", "attention", "head_outputs", "tokens_in"}

        def measure(self, layer):
            seen["product"] = (layer.q @ layer.k.mT).dtype
            seen["tokens"] = (layer.tokens_in @ layer.tokens_in.mT).dtype
            seen["error"] = float((layer.head_outputs - layer.attention @ layer.v).abs().max())
            return {"sees": layer.q.mean((1, 2, 3))}

    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    probekit.probe(Attends(), images, [Sees], dtype="bfloat16")
    assert seen["product"] == seen["tokens"] == torch.float32
    assert seen["error"] < 1e-6


def test_convolutions_of_float32_runs_are_float32():
    convolutions = torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    with numerics(torch.device("cpu"), "bfloat16"):
        assert convolutions.fp32_precision == before
    with pytest.raises(ZeroDivisionError), numerics(torch.device("cpu"), "float32"):
        assert convolutions.fp32_precision == "ieee" != before
        raise ZeroDivisionError
    assert convolutions.fp32_precision == before


def test_building_a_model_leaves_the_generators_of_gpus_alone(tiny, monkeypatch):
    from probekit.models.model import load_model
    from probekit.testing import TinyViT

    def reseeded(seed):
        raise AssertionError("the GPU's generator was reseeded")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", reseeded)
    before = torch.get_rng_state()
    load_model(f"{tiny}@random", Catalog.load(enabled=False), seed=3)
    TinyViT()
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------- failures

FAILING = """
import torch
from torch import nn
from probekit import Metric, Model, Preprocessing

class Raises(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error
    def forward(self, images):
        raise self.error

def build(error):
    return Model(Raises(error), preprocessing=Preprocessing(size=(32, 32), crop_pct=1.0))

def broken():
    return build(RuntimeError("shapes don't match"))

def large():
    return build(torch.OutOfMemoryError("CUDA out of memory"))
"""

METRICS = """
from probekit import DoesNotApply, Metric
from probekit.metric import Variation

class Base(Metric):
    needs = {"attention"}
    def __init_subclass__(cls):
        cls.name = cls.__name__.lower()
        cls.dims = {cls.name: ()}
    def measure(self, layer):
        return {self.name: layer.attention.mean((1, 2, 3))}

class Rows(Base):
    def rows(self, rows):
        return rows[99]

class NoRows(Base):
    def rows(self, rows):
        raise DoesNotApply("it has no decoder")

class Samples(Base):
    def sample(self, count, labels):
        return [1 / 0]

class Varies(Base):
    def variations(self):
        raise KeyError("seed")

def pixels(images, index):
    raise ValueError("too dark")

class Pixels(Base):
    def variations(self):
        return [Variation("dark", pixels=pixels)]

def model(module, fresh, anatomy):
    raise ValueError("no such block")

class Modules(Base):
    def variations(self):
        return [Variation("cut", model=model)]

class Fine(Base):
    pass
"""


def test_a_model_that_raises_fails_alone(photos, tiny, tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    broken, large = (f"{tmp_path}/failing.py:{name}" for name in ("broken", "large"))
    run = go([broken, large, tiny], photos, ["nmi"], tmp_path / "r")
    found = {c.model: c.outcome for c in run.cells()}
    assert found[broken].status == found[large].status == "failed"
    assert f"the forward pass of '{broken}' raised RuntimeError: shapes don't match" in found[broken].reason
    assert "Traceback" in found[broken].details
    assert found[large].reason == "the model and two images don't fit into the memory of 'cpu'"
    assert found[tiny].status == "done"


def test_metrics_that_raise_outside_measure_fail_alone(photos, tiny, tmp_path):
    (tmp_path / "mine.py").write_text(METRICS)
    names = ["rows", "norows", "samples", "varies", "pixels", "modules", "fine", "nmi"]
    found = outcomes(go(tiny, photos, names, tmp_path / "r", tmp_path / "mine.py"))
    assert (found["fine"].status, found["nmi"].status) == ("done", "done"), found
    assert (found["norows"].status, found["norows"].reason) == ("does not apply", "it has no decoder")
    for name, text in {
        "rows": "'rows' raised IndexError: tuple index out of range",
        "samples": "it raised ZeroDivisionError: division by zero",
        "varies": "metric 'mine/varies': 'variations' raised KeyError: 'seed' (mine.py, line 27)",
        "modules": "variation 'cut' raised ValueError: no such block",
    }.items():
        assert found[name].status == "failed"
        assert found[name].reason.replace("list index", "tuple index") == text
        assert "Traceback" in found[name].details or "line 27" in found[name].reason
    assert found["pixels"].status == "failed" and "ValueError: too dark" in found["pixels"].reason


def test_an_error_that_is_shown_later_keeps_no_model(monkeypatch):
    from probekit.cli import state
    from probekit.cli.running import Shown

    def failed():
        model = nn.Linear(2, 2)
        try:
            raise WatchError("it has no attention", hint="look")
        except WatchError as error:
            return weakref.ref(model), error

    for debug in (False, True):
        monkeypatch.setattr(state, "debug", lambda debug=debug: debug)
        shown = Shown(None)
        model, error = failed()
        shown(Event("cell-failed", error=error))
        del error
        gc.collect()
        assert (model() is not None) == debug
        assert (type(shown.errors[0]), str(shown.errors[0])) == (
            WatchError,
            "it has no attention\n  hint: look",
        )


# ---------------------------------------------------------------------- folders


def test_what_a_dry_run_and_a_kill_leave_is_no_foreign_file(cli, photos, tiny, tmp_path):
    words = ["run", "--model", tiny, "--metrics", "shape_bias,nmi", "-d", f"folder:{photos}", "--limit", "4"]
    code, *_ = cli(*words, "--out", tmp_path / "r", "--dry-run")
    assert code == 0 and not (tmp_path / "r").exists()
    for folder, file in (("r", "run.json"), ("c", "capture.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{file}.4711-0a1b2c3d.tmp").write_text("{")
    code, out, err = cli(*words, "--out", tmp_path / "r")
    assert code == 0, err
    assert "not applicable" in out
    code, _, err = cli("capture", tiny, "-d", f"folder:{photos}", "--limit", "4", "--out", tmp_path / "c")
    assert code == 0, err


def test_another_device_is_said_and_recorded(photos, tiny, tmp_path, monkeypatch):
    go(tiny, photos, ["nmi"], tmp_path / "r")
    first = go(tiny, photos, ["nmi"], tmp_path / "r")  # nothing to do
    assert first.result("nmi").attrs["device"] == "cpu"
    for where in ("subject", "cell"):
        monkeypatch.setattr(f"probekit.{where}.device_name", lambda device: "H100")
    said = []

    def warnings(metrics):
        events = []
        run = go(tiny, photos, metrics, tmp_path / "r", on_event=events.append)
        said.append([e.text for e in events if e.kind == "warning"])
        return run

    warnings(["nmi"])
    warnings(["nmi", "fourier"])
    run = warnings(["nmi", "fourier", "attention_distance"])
    assert said == [[], ["device was cpu, is H100: numbers may differ in their last digits"], []]
    assert run.about(run.models[0], run.datasets[0])["device"] == "cpu, H100"
    devices = {m: run.result(m).attrs["device"] for m in run.metrics}
    assert devices == {"nmi": "cpu", "fourier": "cpu, H100", "attention_distance": "cpu, H100"}
    file = run.folder(run.models[0], run.datasets[0]).path / "cell.json"
    about = json.loads(file.read_text())
    file.write_text(json.dumps({**about, "versions": {**about["versions"], "torch": "1.0"}}))
    run = warnings(["feature_variance"])
    assert said[-1] == [
        f"torch was 1.0, is {about['versions']['torch']}: numbers may differ in their last digits"
    ]
    versions = run.about(run.models[0], run.datasets[0])["versions"]
    assert versions["torch"] == f"1.0, {about['versions']['torch']}"


def test_absent_traces_belong_to_what_found_them_absent(tmp_path):
    old, new = (TraceFolder(tmp_path, {"version": v}, 4, 2) for v in (1, 2))
    old.write_absent("no such layer")
    assert (old.absent, new.absent) == ("no such layer", "")
    assert old.missing()[0] == [] and new.missing()[0] == [0, 1]


def test_probes_are_trained_on_the_cpu_where_a_gpu_has_no_float64():
    from probekit.metrics.probing import fit_many

    x = np.random.default_rng(0).normal(size=(20, 4)) + np.repeat([[0], [3]], 10, 0)
    labels = [0] * 10 + [1] * 10
    there, here = (fit_many([x], labels, 2, device=device)[0] for device in ("mps", "cpu"))
    np.testing.assert_array_equal(there.weights, here.weights)


LEAVES = """
import sys
from probekit import Metric

class Leaves(Metric):
    name = "leaves"; needs = {"tokens"}; dims = {"leaves": ()}
    def measure(self, layer):
        sys.exit(7)
"""


def test_a_metric_that_calls_sys_exit_fails_alone(photos, tiny, tmp_path):
    plugin = tmp_path / "mine.py"
    plugin.write_text(LEAVES)
    found = outcomes(go(tiny, photos, ["leaves", "feature_variance"], tmp_path / "r", plugin))
    assert found["leaves"].status == "failed" and "SystemExit" in found["leaves"].reason
    assert found["feature_variance"].status == "done"
