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
from probekit.errors import StoreError, UsageError

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
        "field": "a layer has no field 'attentoin'",
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
