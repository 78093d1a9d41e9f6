"""What metrics of a whole dataset get: another's traces, a train split, variations, the run's other models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import probekit
from probekit.errors import DoesNotApply
from probekit.plugins.catalog import Catalog
from probekit.store.mapped import MappedArray
from probekit.store.runfolder import Run

PLUGIN = '''
import numpy as np, torch, xarray as xr
from PIL import Image
from probekit import Dataset, DatasetSpec, DoesNotApply, Metric, MetricSpec, hookimpl
from probekit.metric import Variation
from probekit.summaries import layer_coordinates, result_attributes

PROBEKIT_API = 1
HERE = __name__


class Greys(Dataset):
    def __init__(self, name, values, classes):
        self.name, self.values, self.classes = name, values, classes
        self.ids = [f"{name}-{i}" for i in range(len(values))]
        self.labels = [i % len(classes) for i in range(len(values))]

    def image(self, index):
        rng = np.random.default_rng(self.values[index])
        return Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))


def split(argument, **options):
    test = Greys("test", range(10), ["a", "b"])
    test.train = Greys("train", range(100, 130), ["a", "b"])
    return test


def plain(argument, **options):
    return Greys("plain", range(10), ["a", "b"])


def elsewhere(argument, **options):
    """Another dataset with classes in another order, and one more."""
    return Greys("elsewhere", range(200, 230), ["B", "none", "A"])


def darker(pixels, index):
    return pixels * 0.5 - index


class First:
    def __call__(self, module, fresh, anatomy):
        block = anatomy.layers[0].name.rpartition(".")[0]
        module.get_submodule(block).load_state_dict(fresh().get_submodule(block).state_dict())


class Beyond:
    def __call__(self, module, fresh, anatomy):
        raise DoesNotApply("the model has 3 layers, not 9")


class Tells(Metric):
    """Its result says what it was given."""

    name, source = "tells", "features"
    requires = frozenset({"labels", "train"})

    def variations(self):
        return [Variation("darker", pixels=darker), Variation("reborn", model=First(), train=True),
                Variation("beyond", model=Beyond(), train=True)]

    def summarize(self, traces):
        def mean(t):
            return ("layer", np.asarray(t["features"]).mean((0, 2)))

        v = traces.variations
        return xr.Dataset(
            {
                "tells": mean(traces), "train": mean(traces.train), "darker": mean(v["darker"]),
                "reborn": mean(v["reborn"]), "reborn_train": mean(v["reborn"].train),
                "labels": ("train_image", np.array(traces.train.labels)),
            },
            layer_coordinates(traces.rows),
            result_attributes(self, traces) | {
                "n": len(traces), "n_train": len(traces.train), "classes": list(traces.classes),
                "ids": list(traces.images), "train_ids": list(traces.train.images),
                "more": v["darker"].train is None, "variations": sorted(v),
            },
        )


class Peers(Metric):
    name, source, others = "peers", "features", True

    def summarize(self, traces):
        found = layer_coordinates(traces.rows)
        size = np.full(len(traces.rows), float(len(traces.others)))
        said = {m: float(np.asarray(t["features"]).mean()) for m, t in traces.others.items()}
        return xr.Dataset({"peers": ("layer", size)}, found, result_attributes(self, traces) | {"means": said})


class Few(Metric):
    """Measured on three images and the last layer."""

    name = "few"
    needs = frozenset({"tokens_out"})
    dims = {"few": ("token",)}

    def sample(self, count, labels):
        return [count - 1, 0, 4]

    def rows(self, rows):
        return rows[-1:]

    def measure(self, layer):
        return {"few": layer.tokens_out.mean(-1)}


class Holes(Metric):
    name = "holes"
    needs = frozenset({"tokens_out"})
    dims = {"holes": ("token",)}
    holes = True

    def measure(self, layer):
        found = layer.tokens_out.mean(-1).clone()
        found[:, 0] = float("nan")
        return {"holes": found}


class Masks(Metric):
    name, source, requires = "masks", "features", frozenset({"masks"})

    def summarize(self, traces):
        raise NotImplementedError


class NoSample(Metric):
    name, needs, dims = "nosample", frozenset({"tokens_out"}), {"nosample": ()}

    def sample(self, count, labels):
        raise DoesNotApply("three classes are needed, the dataset has 2")

    def measure(self, layer):
        raise NotImplementedError


def _spec(name, cls):
    return MetricSpec(name=name, summary=name, target=f"{HERE}:{cls}")


@hookimpl
def probekit_metrics():
    pairs = dict(tells="Tells", peers="Peers", few="Few", holes="Holes", masks="Masks", nosample="NoSample")
    return [_spec(name, cls) for name, cls in pairs.items()]


@hookimpl
def probekit_datasets():
    return [DatasetSpec(name=n, summary=n, target=f"{HERE}:{n}") for n in ("split", "plain", "elsewhere")]
'''


@pytest.fixture
def plugin(tmp_path):
    path = tmp_path / "passes.py"
    path.write_text(PLUGIN)
    return path


def run(tiny, plugin, metrics, dataset="split", out="r", **more) -> Run:
    models = [tiny] if isinstance(tiny, str) else tiny
    return probekit.run(models, [dataset], metrics, out=plugin.parent / out, plugins=[plugin], **more)


def outcomes(r: Run) -> dict[str, tuple[str, str]]:
    return {c.metric.rpartition("/")[2]: (c.outcome.status, c.outcome.reason) for c in r.cells()}


# ---------------------------------------------------------------------- train, variations


def test_train_split_and_variations_come_along(tiny, plugin):
    r = run(tiny, plugin, ["tells"])
    assert outcomes(r)["tells"] == ("done", "")
    found = r.result("tells")
    assert (found.attrs["n"], found.attrs["n_train"]) == (10, 30)
    assert found.attrs["ids"][0] == "test-0" and found.attrs["train_ids"][-1] == "train-29"
    assert found["labels"].values.tolist() == [i % 2 for i in range(30)]
    assert found.attrs["variations"] == ["darker", "reborn"]  # without the one that needs more layers
    assert found.attrs["more"]  # no train split under a variation that didn't ask for it
    # the variation of the model leaves what comes before the first block alone, and changes the rest
    assert found["reborn"].values[0] == found["tells"].values[0]
    assert (found["reborn"].values[1:] != found["tells"].values[1:]).all()
    assert (found["darker"].values != found["tells"].values).all()
    assert (found["reborn_train"].values[1:] != found["train"].values[1:]).all()
    # afterwards the model is as it was: measuring on gives the same numbers
    again = run(tiny, plugin, ["features"], out="again")
    mean = np.asarray(again.traces("features")["features"]).mean((0, 2))
    np.testing.assert_allclose(mean, found["tells"].values, rtol=1e-6)


def test_variation_of_the_pixels_is_what_the_model_sees(tiny, plugin, tmp_path):
    """Against the model called by hand."""
    from probekit.datasets.images import batches
    from probekit.models.model import load_model
    from probekit.specs import Preprocessing
    from probekit.watch import Visitor, Watcher

    r = run(tiny, plugin, ["tells"])
    catalog = Catalog.load([plugin])
    dataset = catalog.resolve_target(catalog.dataset("split"))(None)
    model = load_model(tiny, catalog)
    pixels = next(batches(dataset, range(10), model.preprocessing or Preprocessing(), batch_size=10)).pixels
    changed = torch.stack([x * 0.5 - i for i, x in enumerate(pixels)])
    means = {}

    def visit(layer):
        means[layer.row.label] = layer.tokens.mean().item()

    Watcher(model.module, pixels).run(changed, [Visitor(frozenset({"tokens"}), visit)])
    np.testing.assert_allclose(r.result("tells")["darker"].values, list(means.values()), rtol=1e-4, atol=1e-6)


def test_train_limit_defaults_to_four_times_the_limit(tiny, plugin):
    assert run(tiny, plugin, ["tells"], limit=3).result("tells").attrs["n_train"] == 12
    assert run(tiny, plugin, ["tells"], out="b", limit=3, train_limit=7).result("tells").attrs["n_train"] == 7


def test_train_images_from_another_dataset(tiny, plugin):
    """Labels in the measured dataset's numbering; classes it doesn't have are dropped."""
    r = run(tiny, plugin, ["tells"], "plain", train="elsewhere")
    found = r.result("tells")
    assert found.attrs["n_train"] == 20
    numbers = [int(name.rpartition("-")[2]) for name in found.attrs["train_ids"]]
    assert found["labels"].values.tolist() == [1 if i % 3 == 0 else 0 for i in numbers]
    assert all(i % 3 != 1 for i in numbers)


def test_what_a_dataset_lacks_is_said(tiny, plugin):
    r = run(tiny, plugin, ["tells", "masks", "nosample", "features"], "plain")
    said = outcomes(r)
    assert said["tells"] == ("does not apply", "the dataset has no train split (`--train DATASET` names one)")
    assert said["masks"] == ("does not apply", "the dataset has no masks")
    assert said["nosample"] == ("does not apply", "three classes are needed, the dataset has 2")
    assert said["features"][0] == "done"


# ---------------------------------------------------------------------- resume


def files(folder: Path) -> dict[str, int]:
    return {str(f.relative_to(folder)): f.stat().st_mtime_ns for f in folder.rglob("*") if f.is_file()}


def test_nothing_is_done_twice(tiny, plugin):
    r = run(tiny, plugin, ["tells", "few", "nosample"])
    before = files(r.path / "cells")
    run(tiny, plugin, ["tells", "few", "nosample"])
    after = files(r.path / "cells")
    kept = {f for f in before if f.endswith((".h5", ".nc", "rows.json"))}
    assert {f: after[f] for f in kept} == {f: before[f] for f in kept}


def test_a_metric_added_measures_only_itself(tiny, plugin):
    r = run(tiny, plugin, ["features"])
    before = files(r.path / "cells")
    r = run(tiny, plugin, ["tells"])
    after = files(r.path / "cells")
    own = {f for f in before if "/all/" in f}
    assert own and {f: after[f] for f in own} == {f: before[f] for f in own}
    folders = [f.split("/")[4].split("~") for f in after if f.endswith(".h5")]
    assert {"~".join([images, *change[1:]]) for images, *change in folders} == {
        "all", "train", "all~darker", "all~reborn", "train~reborn",
    }  # fmt: skip
    assert {owner.partition(".")[0] for _, owner, _ in (f for f in folders if len(f) == 3)} == {
        "passes-tells"
    }


def test_a_lost_shard_is_measured_again_and_the_result_remade(tiny, plugin):
    r = run(tiny, plugin, ["tells"])
    result = next((r.path / "cells").rglob("tells.nc"))
    first = result.read_bytes()
    shard = next(f for f in (r.path / "cells").rglob("*.h5") if "~darker" in str(f))
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    result.unlink()
    run(tiny, plugin, ["tells"])
    assert shard.read_bytes() == content
    assert result.read_bytes() == first


# ---------------------------------------------------------------------- samples


def test_sampled_metric_keeps_its_images_only(tiny, plugin, monkeypatch):
    monkeypatch.setattr("probekit.passes.shard_size", lambda total: 3)
    monkeypatch.setattr("probekit.store.runfolder.shard_size", lambda total: 3)
    r = run(tiny, plugin, ["few", "features"], batch_size=2)
    traces = r.traces("few")
    assert list(traces.images) == ["test-0", "test-4", "test-9"]
    assert traces.of == 10
    assert len(traces.rows) == 1
    assert (r.result("few").attrs["images"], r.result("few").attrs["of"]) == (3, 10)
    whole = r.traces("features")
    last = [row.label for row in whole.rows].index(f"{traces.rows[0].label}.out")
    np.testing.assert_allclose(
        traces["few"][:, 0].mean(1), np.asarray(whole["features"])[[0, 4, 9], last].mean(1), rtol=1e-5
    )
    shards = sorted(f.name for f in r.path.rglob("few*/all/*.h5"))
    assert shards == ["shard-00000.h5", "shard-00001.h5", "shard-00003.h5"]


def test_holes_are_allowed_where_declared(tiny, plugin):
    r = run(tiny, plugin, ["holes"])
    assert outcomes(r)["holes"] == ("done", "")
    assert np.isnan(r.traces("holes")["holes"][:, :, 0]).all()


# ---------------------------------------------------------------------- other models


def test_the_run_s_other_models_come_along(tiny, plugin):
    text = Path(tiny.partition(":")[0]).read_text()
    (plugin.parent / "other.py").write_text(
        text.replace("HEADS, DEPTH = 32, 8, 16, 2, 3", "HEADS, DEPTH = 32, 8, 16, 2, 2")
    )
    other = f"{plugin.parent}/other.py:build"
    r = run([tiny], plugin, ["peers"])
    assert r.result("peers")["peers"].values[0] == 0
    r = run([tiny, other], plugin, ["peers"])
    for model, rest in ((tiny, other), (other, tiny)):
        found = r.result("peers", model=model, dataset="split")
        assert found["peers"].values[0] == 1
        mean = np.asarray(
            run([rest], plugin, ["features"], out=f"of{len(rest)}").traces("features")["features"]
        )
        assert found.attrs["means"][rest] == pytest.approx(mean.mean(), rel=1e-5)


# ---------------------------------------------------------------------- images in memory


def test_probe_gives_sources_and_samples(tiny, plugin):
    images = torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    namespace: dict = {"__name__": "passes"}
    exec(PLUGIN, namespace)
    found = probekit.probe(tiny, images, metrics=[namespace["Few"], namespace["Peers"]], batch_size=4)
    assert found["few"].attrs["images"] == 3
    assert found["peers"]["peers"].values[0] == 0
    with pytest.raises(DoesNotApply, match="needs labels"):
        probekit.probe(tiny, images, metrics=[namespace["Tells"]])


# ---------------------------------------------------------------------- the array on disk


def test_mapped_array_is_indexed_like_an_array():
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=(n, 3, 2)).astype(np.float32) for n in (4, 1, 3)]
    whole, mapped = np.concatenate(parts), MappedArray(parts)
    assert mapped.shape == whole.shape and len(mapped) == 8 and mapped.dtype == whole.dtype
    np.testing.assert_array_equal(np.asarray(mapped), whole)
    keys = (
        slice(None), (slice(None), 1), (slice(None), slice(1, 3), 0), 5, (5, 2), -1, slice(2, 7, 2),
        np.array([7, 0, 4]), ([1, 1], 0), np.arange(8) % 2 == 0, slice(3, 3),
    )  # fmt: skip
    for key in keys:
        np.testing.assert_array_equal(mapped[key], whole[key])
    with pytest.raises(IndexError):
        mapped[8]


def test_command_line_names_the_train_dataset(command, tiny, plugin, tmp_path):
    words = ["run", "--model", tiny, "--metrics", "tells", "--dataset", "plain", "--plugin", str(plugin)]
    done = command(*words, "--train", "split", "--train-limit", "9", "--out", "r", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [c["status"] for c in json.loads(done.stdout)["cells"]] == ["done"]
    assert Run(tmp_path / "r").result("tells").attrs["train_ids"][-1].startswith("train-")


def test_the_probe_of_the_docs_works(tiny, tmp_path):
    """The example in docs/plugins.md, as it stands there."""
    text = (Path(__file__).parents[1] / "docs" / "plugins.md").read_text()
    code = text[text.index("class Centroids(Metric):") :].partition("```")[0]
    (tmp_path / "passes.py").write_text(
        PLUGIN.replace('tells="Tells"', 'tells="Tells", centroids="Centroids"') + f"\n\n{code}"
    )
    r = run(tiny, tmp_path / "passes.py", ["centroids"])
    found = r.result("centroids")
    train, test = (np.asarray(t["features"]) for t in (run_traces(r, "train"), run_traces(r, "all")))
    centres = [train[c::2, -1].mean(0) for c in (0, 1)]
    nearest = [int(np.argmin([((x - c) ** 2).sum() for c in centres])) for x in test[:, -1]]
    assert found["centroids"].values[-1] == 100 * np.mean([n == i % 2 for i, n in enumerate(nearest)])


def run_traces(r: Run, images: str):
    from probekit.store.cells import TraceFolder
    from probekit.store.runfolder import shard_size

    folder = r.folder(r.models[0], r.datasets[0]).trace("features", 1, images)
    count = {"train": 30, "all": 10}[images]
    return TraceFolder(folder, {}, count, shard_size(count)).read([str(i) for i in range(count)], None, 0)


def test_shards_hold_an_eighth_of_few_images_and_a_thirty_second_of_many():
    from probekit.store.runfolder import shard_size

    sizes = {1: 16, 128: 16, 256: 32, 512: 64, 2048: 64, 5000: 160, 50_000: 512}
    assert {count: shard_size(count) for count in sizes} == sizes


def test_on_a_cpu_small_images_go_through_more_at_a_time():
    from probekit.subject import default_batch

    cpu = torch.device("cpu")
    assert [default_batch(cpu, (side, side)) for side in (32, 64, 160, 224, 518)] == [64, 64, 31, 16, 16]
    assert default_batch(torch.device("cuda"), (224, 224)) == 64
