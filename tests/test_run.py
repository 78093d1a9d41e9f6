"""Runs end to end: resume, kill -9, containment, identity. On a tiny model; real ones are in test_run_real."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import probekit
from probekit.errors import MetricError, PluginError, StoreError, UsageError

STREAMED = ("attention_distance", "nmi", "fourier")


def digests(run: Path) -> dict[str, str]:
    """Every trace and result of a run by its bytes."""
    files = [*run.rglob("*.h5"), *run.rglob("*.nc"), *run.rglob("rows.json")]
    return {str(f.relative_to(run)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def measure(photos, out, tiny, **more):
    return probekit.run([tiny], [f"folder:{photos}"], STREAMED, out=out, **more)


@pytest.fixture(scope="module")
def finished(photos, tiny, tmp_path_factory):
    return measure(photos, tmp_path_factory.mktemp("run") / "r", tiny)


def test_results_open_with_xarray_and_equal_probe(finished, photos, tiny):
    from probekit.datasets.dataset import select
    from probekit.datasets.folder import load
    from probekit.datasets.images import batches
    from probekit.models.model import load_model
    from probekit.plugins.catalog import Catalog

    model = load_model(tiny, Catalog.load())
    data = load(str(photos))
    found = list(batches(data, select(len(data), None), model.preprocessing, batch_size=40))
    direct = probekit.probe(model.module, found[0].pixels, metrics=["nmi", "attention_distance", "fourier"])
    for name in direct:
        saved = finished.result(name)
        np.testing.assert_allclose(saved[name], direct[name][name], rtol=1e-6, atol=1e-7)
        path = finished.folder(finished.models[0], finished.datasets[0]).result(name)
        with xr.open_dataset(path, engine="h5netcdf") as opened:
            assert opened[name].dims == saved[name].dims
    assert finished.result("nmi")["nmi"].dims == ("layer", "head")
    assert finished.result("nmi")["nmi"].shape == (3, 2)
    assert finished.result("fourier")["fourier"].dims == ("layer", "frequency")
    assert list(finished.result("fourier")["depth"].values) == [0, 0.5, 1, 1.5, 2, 2.5, 3]


def test_the_same_run_elsewhere_has_the_same_bits(finished, photos, tiny, tmp_path):
    again = measure(photos, tmp_path / "again", tiny)
    assert digests(again.path) == digests(finished.path)


def test_batch_size_and_workers_change_no_bit(finished, photos, tiny, tmp_path):
    again = measure(photos, tmp_path / "again", tiny, batch_size=7, workers=1)
    assert digests(again.path) == digests(finished.path)


def test_a_metric_added_later_computes_only_itself(photos, tiny, tmp_path):
    first = probekit.run([tiny], [f"folder:{photos}"], ["nmi"], out=tmp_path / "r")
    before = digests(first.path)
    seen = []
    second = probekit.run(
        [tiny], [f"folder:{photos}"], ["nmi", "fourier"], out=tmp_path / "r", on_event=seen.append
    )
    after = digests(second.path)
    assert {k: after[k] for k in before} == before
    assert [e.metric for e in seen if e.kind == "metric"] == ["fourier"]
    assert second.metrics == ["nmi", "fourier"]


def test_nothing_is_measured_twice(finished, photos, tiny):
    seen = []
    measure(photos, finished.path, tiny, on_event=seen.append)
    assert not [e for e in seen if e.kind in ("images", "metric")]


def test_a_damaged_shard_is_named_and_measured_again(photos, tiny, tmp_path):
    run = measure(photos, tmp_path / "r", tiny)
    before = digests(run.path)
    shard = sorted(run.path.rglob("nmi-v*/all/shard-*.h5"))[0]
    raw = bytearray(shard.read_bytes())
    raw[-8] ^= 1
    shard.write_bytes(raw)
    seen = []
    measure(photos, tmp_path / "r", tiny, on_event=seen.append)
    warnings = [e.text for e in seen if e.kind == "warning"]
    assert any("shard-00000.h5" in w and "damaged" in w for w in warnings)
    assert digests(run.path) == before


def test_other_images_weights_or_settings_are_refused(photos, tiny, tmp_path):
    measure(photos, tmp_path / "r", tiny, limit=8)
    with pytest.raises(StoreError, match="limit"):
        measure(photos, tmp_path / "r", tiny, limit=9)
    with pytest.raises(StoreError, match="seed"):
        measure(photos, tmp_path / "r", tiny, limit=8, seed=1)


def test_a_changed_image_is_noticed(tiny, tmp_path, photos):
    import shutil

    copy = tmp_path / "photos"
    shutil.copytree(photos, copy)
    measure(copy, tmp_path / "r", tiny)
    victim = sorted(copy.rglob("*.png"))[3]
    victim.write_bytes(sorted(copy.rglob("*.png"))[4].read_bytes())
    with pytest.raises(StoreError, match="images"):
        measure(copy, tmp_path / "r", tiny)


def test_unreadable_images_are_skipped_and_listed(photos, tiny, tmp_path):
    import shutil

    copy = tmp_path / "photos"
    shutil.copytree(photos, copy)
    victim = sorted(copy.rglob("*.png"))[5]
    victim.write_bytes(victim.read_bytes()[:60])
    run = measure(copy, tmp_path / "r", tiny)
    bad = run.bad_images(run.models[0], run.datasets[0])
    assert [b["id"] for b in bad] == [victim.relative_to(copy).as_posix()]
    assert run.result("nmi").attrs["images"] == 39
    with pytest.raises(probekit.ProbekitError, match=victim.name):
        measure(copy, tmp_path / "strict", tiny, on_bad_image="fail")


def test_two_processes_in_one_folder(photos, tiny, tmp_path):
    from probekit.store.writing import RunLock

    with RunLock(tmp_path / "r"), pytest.raises(StoreError, match="being written"):
        measure(photos, tmp_path / "r", tiny)


def test_a_newer_run_folder_is_refused(photos, tiny, tmp_path):
    run = measure(photos, tmp_path / "r", tiny, limit=2)
    file = run.path / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": 99}))
    with pytest.raises(StoreError, match="newer"):
        probekit.open(run.path)
    with pytest.raises(StoreError, match="newer"):
        measure(photos, tmp_path / "r", tiny, limit=2)


BROKEN = """
import torch
from probekit import DoesNotApply, Metric

class Raises(Metric):
    name = "raises"; needs = {"attention"}; dims = {"raises": ("head",)}
    def measure(self, layer):
        raise ZeroDivisionError("no such luck")

class Nan(Metric):
    name = "nan"; needs = {"attention"}; dims = {"nan": ("head",)}
    def measure(self, layer):
        return {"nan": layer.attention.sum((2, 3)) * float("nan")}

class Shape(Metric):
    name = "shape"; needs = {"attention"}; dims = {"shape": ("head",)}
    def measure(self, layer):
        return {"shape": layer.attention.mean((1, 2, 3))}

class Names(Metric):
    name = "names"; needs = {"attention"}; dims = {"names": ()}
    def measure(self, layer):
        return {"other": layer.attention.mean((1, 2, 3))}

class Undeclared(Metric):
    name = "undeclared"; needs = {"attention"}; dims = {"undeclared": ()}
    def measure(self, layer):
        return {"undeclared": layer.tokens_mid.mean((1, 2))}

class Field(Metric):
    name = "field"; needs = {"attentoin"}; dims = {"field": ()}
    def measure(self, layer):
        return {}

class Never(Metric):
    name = "never"; needs = {"attention"}; dims = {"never": ()}
    def measure(self, layer):
        raise DoesNotApply("there is nothing to see")

class Summary(Metric):
    name = "summary"; needs = {"attention"}; dims = {"summary": ()}
    def measure(self, layer):
        return {"summary": layer.attention.mean((1, 2, 3))}
    def summarize(self, traces):
        raise KeyError("summary")

class Leaves(Summary):
    name = "leaves"; dims = {"leaves": ()}
    def measure(self, layer):
        return {"leaves": layer.attention.mean((1, 2, 3))}
    def summarize(self, traces):
        raise SystemExit(0)

class Unmade(Metric):
    name = "unmade"; needs = {"attention"}; dims = {"unmade": ()}
    def __init__(self):
        raise OSError("no table")

class Fine(Metric):
    name = "fine"; needs = {"attention"}; dims = {"fine": ("head",)}
    def measure(self, layer):
        return {"fine": layer.attention.amax(-1).mean(-1)}
"""


def test_broken_metrics_fail_alone(photos, tiny, tmp_path):
    plugin = tmp_path / "broken.py"
    plugin.write_text(BROKEN)
    run = probekit.run([tiny], [f"folder:{photos}"], ["all"], out=tmp_path / "r", plugins=[plugin], limit=4)
    outcome = {c.metric.rpartition("/")[2]: c.outcome for c in run.cells()}
    for name, words in {
        "raises": "ZeroDivisionError at 'blocks.0.attn': no such luck",
        "nan": "'nan' is NaN at 'blocks.0.attn'",
        "shape": "'shape' has shape (4,) for 4 images; 'dims' says (image, head)",
        "names": "'measure' returned ['other'], but 'dims' declares ['names']",
        "undeclared": "'tokens_mid' was not captured",
        "field": "'needs' names 'attentoin', which a layer doesn't have",
        "summary": "'summarize' raised KeyError",
        "leaves": "'summarize' raised SystemExit: 0",
        "unmade": "metric 'broken/unmade' can't be made: OSError: no table",
    }.items():
        assert outcome[name].status == "failed"
        assert words in outcome[name].reason
        assert outcome[name].pack == "broken"
    assert "no such luck" in outcome["raises"].details  # the traceback, for its author
    assert outcome["never"].status == "does not apply"
    assert outcome["never"].reason == "there is nothing to see"
    assert "plugins check broken" in outcome["unmade"].hint
    assert {outcome[n].status for n in ("fine", "nmi", "fourier", "attention_distance")} == {"done"}


WRITES = """
from probekit import Metric

class Tokens(Metric):
    name = "a_tokens"; needs = {"tokens_out"}; dims = {"a_tokens": ()}
    def measure(self, layer):
        layer.tokens_out.zero_()
        return {"a_tokens": layer.tokens_out.mean((1, 2))}

class Maps(Metric):
    name = "a_maps"; needs = {"attention"}; dims = {"a_maps": ("head",)}
    def describe(self, layer):
        if layer.info.index == 1:
            layer.attention.mul_(0.5)
            raise KeyError("after the writing")
        return {}
    def measure(self, layer):
        return {"a_maps": layer.attention.amax((-1, -2))}

class Queries(Metric):
    name = "a_queries"; needs = {"q"}; dims = {"a_queries": ("head",)}
    def measure(self, layer):
        return {"a_queries": layer.q.abs_().mean((2, 3))}

class Reads(Metric):
    name = "reads"; needs = {"attention", "tokens_out"}; dims = {"reads": ("head",)}
    def measure(self, layer):
        return {"reads": layer.attention.amax((-1, -2)) + layer.tokens_out.mean((1, 2))[:, None]}
"""


def test_a_metric_that_writes_on_the_model_s_tensors_fails_and_changes_no_other(photos, tiny, tmp_path):
    plugin = tmp_path / "writes.py"
    plugin.write_text(WRITES)
    others = ["reads", "nmi", "fourier", "class_scores"]

    def of(metrics, out):
        more = {"limit": 4, "batch_size": 2, "plugins": [plugin]}
        return probekit.run([tiny], [f"folder:{photos}"], metrics, out=tmp_path / out, **more)

    alone, beside = of(others, "alone"), of(["a_tokens", "a_maps", "a_queries", *others], "beside")
    outcome = {c.metric.rpartition("/")[2]: c.outcome for c in beside.cells()}
    for name, field in {"a_tokens": "tokens_out", "a_maps": "attention", "a_queries": "q"}.items():
        assert outcome[name].status == "failed"
        assert f"it changed the layer's '{field}' in place at 'blocks" in outcome[name].reason
        assert ".clone()" in outcome[name].reason
    for name in others:
        assert outcome[name].status == "done"
        xr.testing.assert_identical(beside.result(name), alone.result(name))


HOSTILE = """
import numpy as np
import torch
import xarray as xr
from probekit import Metric
from probekit.metric import Variation
from probekit.summaries import layer_coordinates, result_attributes

class Silent(Exception):
    def __str__(self):
        raise ValueError("no words")

class Base(Metric):
    needs = {"tokens_out"}
    def __init_subclass__(cls):
        if "name" in vars(cls):
            cls.dims = {cls.name: (), **vars(cls).get("also", {})}
    def measure(self, layer):
        return {name: layer.tokens_out.mean((1, 2)) for name in self.dims}

class Sparse(Base):
    name = "sparse"
    def measure(self, layer):
        return {"sparse": layer.tokens_out.mean((1, 2)).to_sparse()}

class Meta(Base):
    name = "meta"
    def measure(self, layer):
        return {"meta": torch.empty(layer.batch, device="meta")}

class Wordless(Base):
    name = "wordless"
    def measure(self, layer):
        raise Silent

class Ends(Base):
    name = "ends"
    def measure(self, layer):
        raise GeneratorExit("in measure")

class Closes(Base):
    name = "closes"
    def summarize(self, traces):
        raise BaseException("in summarize")

class Grows(Metric):
    name = "grows"; needs = {"tokens_out"}; dims = {"grows": ("token",)}
    calls = 0
    def measure(self, layer):
        Grows.calls += 1
        return {"grows": layer.tokens_out.mean(2)[:, :Grows.calls]}

class Text(Base):
    name = "text"
    def describe(self, layer):
        return {"c": "abc"}

class Rank(Base):
    name = "rank"
    def describe(self, layer):
        return {"c": np.zeros((2,) * layer.info.index)}

class Numbered(Base):
    name = "numbered"
    def describe(self, layer):
        return {3: 1.0}

class Graph(Base):
    name = "graph"
    def describe(self, layer):
        return {"c": torch.tensor(3.0, requires_grad=True)}

class Numbers(Base):
    name = "numbers"
    def rows(self, rows):
        return [0, 1]

class Twice(Base):
    name = "twice"
    def rows(self, rows):
        return [rows[0], rows[0]]

class Dots(Base):
    name = "dots"; also = {"..": ()}

class Depth(Base):
    name = "deep"; also = {"depth": ()}

class Beyond(Base):
    name = "beyond"
    def sample(self, count, labels):
        return [count]

class Again(Base):
    name = "again"
    def sample(self, count, labels):
        return [0, 0]

class Half(Base):
    name = "half"
    def sample(self, count, labels):
        return [0.5]

class Nobody(Base):
    name = "nobody"
    def sample(self, count, labels):
        return []

class Climbs(Base):
    name = "climbs"
    def variations(self):
        return [Variation("../../evil", pixels=lambda pixels, index: pixels)]

class Objects(Base):
    name = "objects"
    def summarize(self, traces):
        made = super().summarize(traces)
        return made.assign(x=("layer", np.array([object()] * len(traces.rows))))

class Attribute(Base):
    name = "attribute"
    def summarize(self, traces):
        return super().summarize(traces).assign_attrs(x=object())

class Nothing(Base):
    name = "nothing"
    def summarize(self, traces):
        return None

class Words(Base):
    name = "words"
    def summarize(self, traces):
        made = super().summarize(traces)
        return made.assign(words=made["words"].astype(str))

class Wide(Base):
    name = "wide"
    def summarize(self, traces):
        made = super().summarize(traces)
        return made.assign(wide_curve=(("layer", "z"), np.ones((len(traces.rows), 2))))

class Bare(Base):
    name = "bare"
    def summarize(self, traces):
        return xr.Dataset({"bare": ("layer", np.ones(len(traces.rows)))})

class Lost(Metric):
    name, source = "lost", "other_pack_metric"
    def summarize(self, traces): return None

class Option(Metric):
    name, source = "option", "features:pool=nope"
    def summarize(self, traces): return None

class Chain(Metric):
    name, source = "chain", "linear_probe"
    def summarize(self, traces): return None

class Old(Base):
    name = "old"; version = "1.0"
"""


def test_whatever_a_metric_does_it_fails_alone(photos, tiny, tmp_path):
    plugin = tmp_path / "hostile.py"
    plugin.write_text(HOSTILE)
    words = {
        "sparse": "'sparse' is a sparse tensor, not a dense one of numbers",
        "meta": "'meta' is a meta tensor",
        "wordless": "it raised Silent at 'blocks.0.attn': <Silent>",
        "ends": "it raised GeneratorExit at 'blocks.0.attn': in measure",
        "closes": "'summarize' raised BaseException: in summarize",
        "grows": "'grows' has (3, 3) values (layers, *axes) in one batch and (3, 6) in another",
        "text": "'describe' gives 'c' as str, not a number",
        "rank": "'describe' gives 'c' with 1 axes, at another layer with 0",
        "numbered": "'describe' names a constant 3",
        "numbers": "'rows' returned a int, not some of the rows",
        "twice": "'rows' returned 'blocks.0.attn' twice",
        "dots": "'dims' names '..', which can't name a value or an axis",
        "deep": "'dims' names 'depth', which the result has for something else",
        "beyond": "'sample' chose image 4 of 4, counted from 0",
        "again": "'sample' chose image 0 twice",
        "half": "'sample' returned [0.5], not the positions of images",
        "nobody": "'sample' chose no image",
        "climbs": "'variations' names one '../../evil', not of letters",
        "objects": "variable 'x' has dtype object",
        "attribute": "attribute 'x': object can't be stored",
        "nothing": "'summarize' returned NoneType, not an xarray.Dataset",
        "words": "'summarize' gives a 'words' of <U",
        "wide": "'summarize' gives a 'wide_curve' that is not one number per layer",
        "bare": "'summarize' gives no coordinate 'layer' of the layers",
        "lost": "metric 'lost' of 'hostile' draws on 'other_pack_metric', which can't be used: ",
        "option": "metric 'option' of 'hostile' draws on 'features:pool=nope', which can't be used: ",
        "chain": "metric 'chain' of 'hostile' draws on 'linear_probe', which measures nothing itself",
        "old": "'version' is '1.0', not a whole number from 1",
    }
    metrics, more = [*words, "graph", "nmi"], {"plugins": [plugin], "limit": 4, "batch_size": 2}
    run = probekit.run([tiny], [f"folder:{photos}"], metrics, out=tmp_path / "r", **more)
    outcome = {c.metric.rpartition("/")[2]: c.outcome for c in run.cells()}
    for name, said in words.items():
        assert (name, outcome[name].status) == (name, "failed")
        assert said in outcome[name].reason
    assert {outcome[name].status for name in ("graph", "nmi")} == {"done"}


def test_tokens_measured_by_the_window_are_told_to_have_their_own():
    from probekit.contract import wrong_values
    from probekit.metric import Metric
    from probekit.testing import make_layer

    class Mean(Metric):
        name, needs, dims = "mean", frozenset({"tokens_out"}), {"mean": ()}

    q = torch.randn(2 * 4, 3, 9, 8)
    layer = make_layer(q=q, k=q, v=q, tokens=torch.randn(2, 36, 24), grid=(6, 6), window=3).windows()[0]
    said = wrong_values(Mean(), {"mean": torch.zeros(2)}, layer)
    assert 'say windows = "own"' in said
    assert "windows" not in wrong_values(Mean(), {"mean": torch.zeros(3)}, layer)


def test_a_model_without_attention_fails_alone(photos, tiny, tmp_path):
    bare = tiny.replace(":build", ":without_attention")
    run = probekit.run([bare, tiny], [f"folder:{photos}"], ["nmi"], out=tmp_path / "r", limit=4)
    by_model = {c.model: c.outcome for c in run.cells()}
    assert by_model[bare].status == "failed"
    assert "no attention between tokens" in by_model[bare].reason
    assert by_model[tiny].status == "done"


def test_grid_mistakes(photos, tiny, tmp_path):
    for settings, words in {
        ("limit", 0): "'limit' can't be 0",
        ("dtype", "int8"): "'dtype'",
        ("image_size", "big"): "image size 'big'",
        ("colour", 1): "no setting 'colour'",
    }.items():
        with pytest.raises(UsageError, match=words):
            measure(photos, tmp_path / "r", tiny, **dict([settings]))
    with pytest.raises(UsageError, match="device 'cuda:99'"):
        measure(photos, tmp_path / "r", tiny, device="cuda:99")
    assert not (tmp_path / "r").exists()


def test_a_foreign_folder_is_left_alone(photos, tiny, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(StoreError, match="thesis"):
        measure(photos, tmp_path, tiny)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_bfloat16_is_close_and_said(finished, photos, tiny, tmp_path):
    run = measure(photos, tmp_path / "r", tiny, dtype="bfloat16")
    a, b = run.result("nmi"), finished.result("nmi")
    assert a.attrs["dtype"] == "bfloat16"
    assert 0 < float(np.abs(a["nmi"] - b["nmi"]).max()) < 0.05


def test_probe_leaves_the_module_as_it_was(tiny):
    from probekit.plugins.files import import_file

    TinyViT = import_file(Path(tiny.rpartition(":")[0])).TinyViT

    module = TinyViT().train()
    images = torch.randn(3, 3, 32, 32)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    found = probekit.probe(module, images, metrics=["nmi"])
    assert module.training and all(m.training for m in module.modules())
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert found["nmi"]["nmi"].shape == (3, 2)
    one = probekit.probe(module, images[:1], metrics=["nmi"])
    assert np.isfinite(one["nmi"]["nmi"]).all()


@pytest.mark.parametrize(
    "images", [torch.zeros(3, 32, 32), torch.zeros(0, 3, 32, 32), torch.zeros(2, 1, 32, 32), None]
)
def test_probe_says_what_images_are(images):
    with pytest.raises(UsageError, match="images must be a tensor"):
        probekit.probe(torch.nn.Identity(), images)


class Peak(probekit.Metric):
    name, needs, dims = "peak", frozenset({"attention"}), {"peak": ("head",)}

    def measure(self, layer):
        return {"peak": layer.attention.amax(-1).mean(-1)}


class Twin(Peak):
    def __init__(self, power):
        super().__init__(power=power)


class Late(probekit.Metric):
    """Takes the traces of `Peak`."""

    name, source = "late", "peak"

    def summarize(self, traces):
        raise KeyError("q")


class Blank(Peak):
    def summarize(self, traces):
        return None


class Nameless(probekit.Metric):
    needs, dims, measure = Peak.needs, Peak.dims, Peak.measure


class Chooses(Peak):
    def sample(self, count, labels):
        return [count]


@pytest.mark.parametrize(
    ("metrics", "kind", "said"),
    [
        ([Twin(1), Twin(2)], UsageError, "two metrics are called 'peak'"),
        ([Peak, Blank], UsageError, "two metrics are called 'peak'"),
        ([3], UsageError, "a metric is a name, .* not a 'int'"),
        (3, UsageError, "a metric is a name, .* not a 'int'"),
        ([int], UsageError, "not the class 'int'"),
        ([Nameless], MetricError, "metric class 'Nameless': 'name' is None"),
        ([Twin], MetricError, "metric class 'Twin' can't be made without options: TypeError"),
        ([Blank], MetricError, "metric 'peak': 'summarize' returned NoneType"),
        ([Late, Peak], MetricError, "metric 'late': 'summarize' raised KeyError: 'q'"),
        ([Chooses], MetricError, "metric 'peak': 'sample' chose image 2 of 2"),
    ],
)
def test_probe_says_what_is_wrong_with_a_metric(tiny, metrics, kind, said):
    with pytest.raises(kind, match=said):
        probekit.probe(tiny, torch.randn(2, 3, 32, 32), metrics=metrics)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch_size": 0}, "'batch_size' can't be 0"),
        ({"dtype": "float8"}, "'dtype' can't be 'float8'"),
        ({"images": torch.zeros(2, 3, 32, 32, dtype=torch.uint8)}, "images are uint8, not floats"),
        (
            {"images": torch.zeros(2, 3, 32, 32).double()},
            "images are float64, the model's weights are float32",
        ),
        ({"images": torch.full((2, 3, 32, 32), torch.nan)}, "images hold NaN"),
    ],
)
def test_probe_says_what_is_wrong_with_its_arguments(tiny, change, said):
    with pytest.raises(UsageError, match=said):
        probekit.probe(tiny, **{"images": torch.randn(2, 3, 32, 32), "metrics": [Peak], **change})


def test_probe_names_a_model_that_fails():
    class Fails(torch.nn.Module):
        def forward(self, images):
            return 1 / 0

    images = torch.randn(2, 3, 32, 32)
    with pytest.raises(PluginError, match="the forward pass of 'Fails' raised ZeroDivisionError"):
        probekit.probe(Fails(), images, metrics=[Peak])
    with pytest.raises(PluginError, match="model 'Fails' has a 'str' as its 'forward'"):
        probekit.probe(probekit.Model(Fails(), forward="f"), images, metrics=[Peak])


def test_names_of_a_cell_may_be_shortened(finished):
    model, dataset = finished.models[0], finished.datasets[0]
    assert finished.about(model.partition(":")[0], "folder") == finished.about(model, dataset) != {}
    assert finished.bad_images(model.partition(":")[0], "folder") == []
    for ask in (finished.about, finished.bad_images):
        with pytest.raises(UsageError, match="the run has no model 'nobody'"):
            ask("nobody", "folder")


def test_kill_9_at_random_moments(finished, photos, tiny, tmp_path):
    """Killed again and again and resumed, a run has the bits of an undisturbed one."""
    out = tmp_path / "r"
    words = [
        "run",
        "--model",
        tiny,
        "--metrics",
        ",".join(STREAMED),
        "--dataset",
        f"folder:{photos}",
        "--out",
        str(out),
        "--json",
    ]
    words += ["--batch-size", "1", "--plugin", str(tmp_path / "slow.py")]
    (tmp_path / "slow.py").write_text(SLOW)
    clock = random.Random(0)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed_midway = 0
    for attempt in range(12):
        process = subprocess.Popen(
            [sys.executable, "-m", "probekit", *words],
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        begun = len(list(out.rglob("shard-*.h5")))
        while process.poll() is None and not _moved(out, begun, attempt):
            time.sleep(0.01)
        time.sleep(clock.uniform(0.0, 0.4))
        if process.poll() is None and attempt < 6:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            killed_midway += 1
            continue
        errors = process.communicate()[1].decode()
        assert process.returncode == 0, errors
        break
    assert killed_midway >= 3
    ours = {k: v for k, v in digests(out).items() if "slow" not in k}
    assert ours == digests(finished.path)
    assert not list(out.rglob("*.tmp"))


def _moved(out: Path, begun: int, attempt: int) -> bool:
    """A new shard (every other time: the cell itself) is there."""
    if attempt % 2:
        return len(list(out.rglob("shard-*.h5"))) > begun
    return bool(list(out.rglob("cell.json")))


SLOW = '''
import time
from probekit import Metric

class Slow(Metric):
    """Gives a kill something to hit."""
    name = "slow"; needs = {"tokens_out"}; dims = {"slow": ()}
    def measure(self, layer):
        time.sleep(0.04)
        return {"slow": layer.tokens_out.mean((1, 2))}
'''


def test_heads_and_layers_a_pack_declares_are_checked(photos, tmp_path):
    plugin = tmp_path / "packed.py"
    plugin.write_text(PACKED.format(tiny=str(Path(__file__).parent / "tiny.py")))
    words = dict(datasets=[f"folder:{photos}"], metrics=["nmi"], plugins=[plugin], limit=2)
    run = probekit.run(
        ["packed:right@random", "packed:heads@random", "packed:layers@random"], out=tmp_path / "r", **words
    )
    outcome = {c.model: c.outcome for c in run.cells()}
    assert outcome["packed:right@random"].status == "done"
    assert "has 2 heads, but its pack declares 6" in outcome["packed:heads@random"].reason
    assert "has 3 layers, but its pack declares 12" in outcome["packed:layers@random"].reason


PACKED = """
from probekit import ModelSpec, hookimpl
from probekit.plugins.files import import_file
from pathlib import Path

PROBEKIT_API = 1

def build(variant, image_size=None):
    return import_file(Path({tiny!r})).build()

@hookimpl
def probekit_models():
    common = dict(name="packed", summary="a test", target="packed:build")
    return [
        ModelSpec(variant="right", heads=2, layers=3, **common),
        ModelSpec(variant="heads", heads=6, layers=3, **common),
        ModelSpec(variant="layers", heads=2, layers=12, **common),
    ]
"""


def test_an_edited_metric_file_is_measured_again(photos, tiny, tmp_path):
    """The same name and version, another content: the old numbers would be wrong without a word."""
    plugin = tmp_path / "mine.py"
    body = "from probekit import Metric\nclass Mine(Metric):\n    name='mine'; needs={'attention'}; dims={'mine': ()}\n"
    body += "    def measure(self, layer):\n        return {'mine': layer.attention.mean((1, 2, 3)) * 0 + FACTOR}\n"
    found = []
    for factor in (1, 1, 2):
        plugin.write_text(body.replace("FACTOR", str(factor)))
        seen = []
        words = dict(out=tmp_path / "r", plugins=[plugin], limit=4, on_event=seen.append)
        run = probekit.run([tiny], [f"folder:{photos}"], ["mine"], **words)
        found.append((float(run.result("mine")["mine"][0]), any(e.kind == "images" for e in seen)))
    assert found == [(1.0, True), (1.0, False), (2.0, True)]
