"""Captures: what is on disk is what the model computed, and what is replayed is what a live run measures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
import typer
from PIL import Image

from probekit.capturing import activations
from probekit.capturing import capture as capturing
from probekit.capturing.activations import CaptureFolder, choose_layers, groups, parse_layers, parse_sites
from probekit.capturing.capture import capture
from probekit.capturing.replay import Captured, replay
from probekit.errors import StoreError, UsageError, WatchError
from probekit.execution import execute
from probekit.grid import make_grid, resolve
from probekit.plugins.catalog import Catalog
from probekit.store.writing import RunLock, read_shard
from probekit.watch import Visitor

ROOT = Path(capturing.__file__).parents[1]
STREAMED = ("attention_distance", "nmi", "fourier")
EVERYTHING = "attention,tokens_in,tokens_mid,tokens_out"

MODELS = '''
import torch, timm
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from probekit import Model, Preprocessing

SMALL = dict(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=0)


def model(module):
    for name, parameter in module.named_parameters():  # at random, attention is nearly uniform
        if name.endswith("qkv.weight"):
            parameter.data[: 2 * len(parameter) // 3] *= 20
    return Model(module, preprocessing=Preprocessing(size=(32, 32), crop_pct=1.0))


def vit():
    return model(VisionTransformer(**SMALL))


def other_vit():
    return model(VisionTransformer(**SMALL, qkv_bias=False))


def beit():
    module = Beit(**SMALL, use_rel_pos_bias=True, init_values=0.1)
    for block in module.blocks:
        torch.nn.init.normal_(block.attn.relative_position_bias_table)
    return model(module)


def swin(fused=False):
    module = SwinTransformer(
        img_size=32, patch_size=2, embed_dim=12, depths=(2, 2), num_heads=(2, 3), window_size=4, num_classes=0
    )
    for part in module.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = fused
    return model(module)


def swin_fused():
    return swin(True)


class Biased(torch.nn.Module):
    """The additive bias is what `bias` says of an image's mean."""

    def __init__(self, bias):
        super().__init__()
        self.embed = torch.nn.Conv2d(3, 24, 8, 8)
        self.norm, self.qkv = torch.nn.LayerNorm(24), torch.nn.Linear(24, 72)
        self.proj, self.mlp = torch.nn.Linear(24, 24), torch.nn.Linear(24, 24)
        self.bias = bias

    def forward(self, images):
        x = self.embed(images).flatten(2).transpose(1, 2)
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, 2, 12).permute(2, 0, 3, 1, 4)
        bias = self.bias(images.mean((1, 2, 3)))[:, None, None, None] * torch.eye(n)
        x = x + self.proj(
            torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            .transpose(1, 2).reshape(b, n, c)
        )
        return x + self.mlp(x)


def content_bias():
    return model(Biased(lambda mean: mean))


def odd_bias():
    """The first images all have the same bias; bright ones another."""
    return model(Biased(lambda mean: 1.0 + (mean > 1.5).float()))


def overflowing():
    module = VisionTransformer(**SMALL)
    module.blocks[1].attn.qkv.weight.data[48:] *= 3e7  # of the values alone
    return model(module)


def late_overflow():
    """Only bright images overflow."""
    class Bright(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = VisionTransformer(**SMALL)

        def forward(self, images):
            factor = torch.where(images.mean((1, 2, 3)) > 1.5, 1e6, 1.0)
            self.vit.patch_embed.register_forward_hook(lambda m, i, out: out * factor[:, None, None])
            out = self.vit(images)
            self.vit.patch_embed._forward_hooks.clear()
            return out

    return model(Bright())


def slow():
    module = vit().module
    import time
    module.register_forward_pre_hook(lambda m, i: time.sleep(0.05))
    return model(module)
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A file of models and a folder of ten images, the last two of them bright."""
    path = tmp_path_factory.mktemp("capture")
    (path / "models.py").write_text(MODELS)
    (path / "images").mkdir()
    numbers = np.random.default_rng(0)
    for i in range(10):
        pixels = (
            numbers.integers(0, 200, (40, 32, 3), dtype=np.uint8)
            if i < 8
            else np.full((40, 32, 3), 245 + i, np.uint8)
        )
        pixels[i : i + 9, :9] //= 2
        Image.fromarray(pixels).save(path / "images" / f"{i}.png")
    return path


@pytest.fixture(scope="module")
def catalog():
    return Catalog.load(enabled=False)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(capturing, "SHARD_BYTES", 1)


def grid(place, model="vit", **changes):
    name = model if ":" in model else f"{place / 'models.py'}:{model}"
    asked = {"models": [name], "datasets": [f"folder:{place / 'images'}"], "metrics": [], "batch_size": 4}
    return make_grid({**asked, "device": "cpu", **changes})


def captured(
    place,
    catalog,
    out,
    model="vit",
    heard=None,
    *,
    sites=EVERYTHING,
    layers="all",
    dtype="float32",
    **changes,
):
    resolved = resolve(grid(place, model, **changes), catalog)
    listen = (lambda event: None) if heard is None else heard.append
    return capture(resolved, catalog, out, sites=sites, layers=layers, dtype=dtype, listen=listen)


def live(place, catalog, out, model="vit", metrics=STREAMED, **changes):
    return execute(resolve(grid(place, model, metrics=list(metrics), **changes), catalog), catalog, out)


def tree(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob("*.*")
        if p.suffix in (".h5", ".json")
    }


def both(place, catalog, tmp_path, model, dtype="float32", **changes):
    """Traces of every metric, of a live run and of a replay."""
    captured(place, catalog, tmp_path / "c", model, dtype=dtype, **changes)
    replayed = replay(tmp_path / "c", STREAMED, catalog, tmp_path / "r")
    run = live(place, catalog, tmp_path / "l", model, **changes)
    assert {c.outcome.status for c in [*run.cells(), *replayed.cells()]} == {"done"}
    return {m: (run.traces(m), replayed.traces(m)) for m in run.metrics}


# --- what is chosen


def test_sites_are_put_in_order_and_unknown_ones_refused():
    assert parse_sites("tokens_out, attention") == ("attention", "tokens_out")
    assert parse_sites(["v", "q,k"]) == ("q", "k", "v")
    assert parse_sites("all") == tuple(activations.SITES)
    with pytest.raises(UsageError, match="unknown site 'token_out'") as error:
        parse_sites("attention,token_out")
    assert "tokens_out" in error.value.hint
    with pytest.raises(UsageError, match="no site"):
        parse_sites(" , ")


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("all", [0, 1, 2, 3, 4]),
        ("0,3,-1", [0, 3, 4]),
        ("-1,0,0", [0, 4]),
        ("0:4", [0, 1, 2, 3]),
        ("::2", [0, 2, 4]),
        ("-2:", [3, 4]),
        (2, [2]),
        ([0, -1], [0, 4]),
    ],
)
def test_layers_by_index_from_either_end_and_by_slice(text, chosen):
    assert choose_layers(parse_layers(text), 5) == chosen


@pytest.mark.parametrize("text", ["", "a", "0,", "1:2:3:4", "::0", "1.5"])
def test_what_names_no_layer_is_refused(text):
    with pytest.raises(UsageError, match="names no layer"):
        parse_layers(text)


@pytest.mark.parametrize(
    ("text", "message"), [("5", "no layer 5"), ("-6", "no layer -6"), ("7:9", "layers '7:9'")]
)
def test_a_layer_that_is_not_there_is_refused(text, message):
    with pytest.raises(UsageError, match=message):
        choose_layers(parse_layers(text), 5)


def test_layers_have_distinct_groups_that_hdf5_can_hold():
    assert groups(["a.b", "a.b", "", "x/y"]) == ["a.b", "a.b#2", "model", "x_y"]


# --- what is on disk


def test_a_shard_opened_by_hand_holds_what_the_model_computed(place, catalog, tmp_path):
    found = captured(place, catalog, tmp_path, sites="all")
    assert (found.images, found.shards, found.layers) == (
        10,
        1,
        ("blocks.0.attn", "blocks.1.attn", "blocks.2.attn"),
    )
    about = json.loads((tmp_path / "capture.json").read_text())
    recipe = about["layers"][1]["scores"]
    assert recipe == {"kind": "q and k", "scale": 8**-0.5, "bias": None}
    with h5py.File(tmp_path / "shards" / "shard-00000.h5") as file:
        layer = file["blocks.1.attn"]
        assert layer["q"].shape == (10, 1, 3, 17, 8) and layer["q"].chunks is None
        assert layer["tokens_mid"].shape == (10, 16, 24) and layer["tokens_mid_prefix"].shape == (10, 1, 24)
        q, k, v = (torch.from_numpy(layer[n][:]) for n in "qkv")
        maps = (recipe["scale"] * q @ k.mT).softmax(-1)
        torch.testing.assert_close(maps @ v, torch.from_numpy(layer["head_outputs"][:]), atol=1e-5, rtol=1e-5)
        np.testing.assert_array_equal(file["blocks.2.attn/tokens_in"][:], layer["tokens_out"][:])
        assert [t.decode() for t in file["ids"][:]] == about["ids"] == [f"{i}.png" for i in range(10)]
        assert file["index"][:].tolist() == list(range(10))
        stored = sum(
            d.nbytes
            for name in layer.parent
            if isinstance(file[name], h5py.Group)
            for d in file[name].values()
        )
    assert stored == found.bytes == found.per_image * 10
    assert about["identity"]["weights"] and about["anatomy"]["layers"][0]["prefix"] == 1


def test_only_the_chosen_layers_and_sites_are_stored(place, catalog, tmp_path):
    captured(place, catalog, tmp_path, sites="tokens_out,v", layers="0,-1")
    names = set(read_shard(tmp_path / "shards" / "shard-00000.h5").arrays)
    each = {"v", "tokens_out", "tokens_out_prefix"}
    assert names == {f"blocks.{i}.attn/{n}" for i in (0, 2) for n in each} | {"index", "ids"}
    with pytest.raises(UsageError, match="no layer 3"):
        captured(place, catalog, tmp_path / "other", layers="3")


def test_a_bias_is_stored_once_a_layer_unless_it_depends_on_the_image(place, catalog, tmp_path):
    captured(place, catalog, tmp_path / "beit", "beit", dtype="float16")
    constant = read_shard(tmp_path / "beit" / "constants.h5").arrays
    assert {a.shape for a in constant.values()} == {(1, 3, 17, 17)} and len(constant) == 3
    assert {a.dtype for a in constant.values()} == {np.dtype(np.float32)}
    assert not any("bias" in n for n in read_shard(CaptureFolder(tmp_path / "beit").shard(0)).arrays)

    captured(place, catalog, tmp_path / "content", "content_bias")
    assert not (tmp_path / "content" / "constants.h5").exists()
    arrays = read_shard(CaptureFolder(tmp_path / "content").shard(0)).arrays
    (bias,) = (a for n, a in arrays.items() if n.endswith("/bias"))
    assert bias.shape == (10, 1, 1, 16, 16) and len(np.unique(bias[:, 0, 0, 0, 0])) == 10


def test_where_the_softmax_is_by_hand_probabilities_are_stored_and_said_so(place, catalog, tmp_path):
    captured(place, catalog, tmp_path, "swin")
    about = json.loads((tmp_path / "capture.json").read_text())
    assert {layer["scores"]["kind"] for layer in about["layers"]} == {"probabilities"}
    shard = read_shard(CaptureFolder(tmp_path).shard(0)).arrays
    maps = shard[f"{about['layers'][0]['group']}/probabilities"]
    assert maps.shape == (10, 16, 2, 16, 16)
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-5)


def test_bfloat16_is_its_bits_and_is_marked(place, catalog, tmp_path):
    captured(place, catalog, tmp_path / "wide", sites="v")
    captured(place, catalog, tmp_path / "half", sites="v", dtype="bf16")
    wide, half = (read_shard(CaptureFolder(tmp_path / n).shard(0)) for n in ("wide", "half"))
    name = "blocks.0.attn/v"
    assert name in half.bfloat16 and half.arrays[name].dtype == np.uint16
    bits = torch.from_numpy(half.arrays[name]).view(torch.bfloat16)
    assert torch.equal(bits, torch.from_numpy(wide.arrays[name]).bfloat16())


def test_values_that_overflow_float16_are_promoted_and_it_is_said(place, catalog, tmp_path):
    heard = []
    found = captured(
        place, catalog, tmp_path / "half", "overflowing", heard, sites="attention,v", dtype="float16"
    )
    assert found.promoted == ("blocks.1.attn/v",)
    warned = [e.text for e in heard if e.kind == "warning"]
    assert warned == ["values of 'blocks.1.attn/v' overflow float16: stored as float32"]
    shard = read_shard(CaptureFolder(tmp_path / "half").shard(0))
    assert shard.attrs["promoted"] == ["blocks.1.attn/v"]
    assert shard.arrays["blocks.1.attn/v"].dtype == np.float32
    assert shard.arrays["blocks.0.attn/v"].dtype == shard.arrays["blocks.1.attn/q"].dtype == np.float16
    captured(place, catalog, tmp_path / "wide", "overflowing", sites="v")
    wide = read_shard(CaptureFolder(tmp_path / "wide").shard(0)).arrays
    np.testing.assert_array_equal(shard.arrays["blocks.1.attn/v"], wide["blocks.1.attn/v"])
    with h5py.File(CaptureFolder(tmp_path / "half").shard(0)) as file:
        assert np.isfinite(file["blocks.1.attn/v"][:]).all()


@pytest.mark.usefixtures("small_shards")
def test_only_the_shard_that_overflows_is_promoted_from_then_on(place, catalog, tmp_path):
    found = captured(
        place,
        catalog,
        tmp_path,
        "late_overflow",
        sites="tokens_in",
        layers="0",
        dtype="float16",
        batch_size=1,
    )
    assert found.shards == 10
    name = f"{found.layers[0]}/tokens_in"
    dtypes = [read_shard(CaptureFolder(tmp_path).shard(k)).arrays[name].dtype for k in range(10)]
    assert dtypes == [np.float16] * 8 + [np.float32] * 2
    captured(
        place,
        catalog,
        tmp_path / "one",
        "late_overflow",
        sites="tokens_in",
        layers="0",
        dtype="float16",
        batch_size=8,
    )
    whole = [read_shard(CaptureFolder(tmp_path / "one").shard(k)).arrays[name] for k in range(2)]
    assert [a.dtype for a in whole] == [np.float16, np.float32] and whole[1].max() > 65504


# --- replay


@pytest.mark.parametrize("model", ["vit", "beit", "swin", "swin_fused", "content_bias", "odd_bias"])
@pytest.mark.usefixtures("small_shards")
def test_replayed_float32_is_the_live_run_bit_for_bit(model, place, catalog, tmp_path):
    traces = both(place, catalog, tmp_path, model, batch_size=3)
    assert set(traces) == {"nmi", "attention_distance", "fourier"}
    for ours, again in traces.values():
        assert ours.rows == again.rows and ours.images == again.images
        for name in ours.values:
            assert np.isfinite(ours[name]).any()
            np.testing.assert_array_equal(again[name], ours[name])
        for name in ours.constants:
            np.testing.assert_array_equal(again.constants[name], ours.constants[name])


def test_replay_of_a_published_architecture_through_the_catalog(place, catalog, tmp_path):
    traces = both(place, catalog, tmp_path, "timm:vit_tiny_patch16_224@random", image_size=(64, 64), limit=5)
    for ours, again in traces.values():
        for name in ours.values:
            np.testing.assert_array_equal(again[name], ours[name])


@pytest.mark.parametrize("model", ["vit", "beit", "swin"])
def test_replayed_float16_is_close(model, place, catalog, tmp_path):
    traces = both(place, catalog, tmp_path, model, dtype="float16")
    for metric in ("nmi", "attention_distance"):
        ours, again = (t[metric] for t in traces[metric])
        np.testing.assert_allclose(again, ours, rtol=1e-3, atol=2e-4 * np.nanmax(ours))
        assert np.nanmedian(np.abs(again / ours - 1)) < 2e-4 and not np.array_equal(again, ours)
    ours, again = (t["fourier"] for t in traces["fourier"])
    assert np.nanmean(np.abs(again - ours)) < 2e-3  # a logarithm: single values near 0 may be far off


def test_a_bfloat16_forward_is_replayed_bit_for_bit_too(place, catalog, tmp_path):
    resolved = resolve(grid(place, dtype="bfloat16"), catalog)
    capture(resolved, catalog, tmp_path / "b", sites=EVERYTHING, dtype="float32")
    replayed = replay(tmp_path / "b", ["nmi"], catalog, tmp_path / "br")
    run = live(place, catalog, tmp_path / "bl", metrics=["nmi"], dtype="bfloat16")
    np.testing.assert_array_equal(replayed.traces("nmi")["nmi"], run.traces("nmi")["nmi"])


def test_a_bias_that_turns_out_to_vary_is_stored_where_it_does(place, catalog, tmp_path, small_shards):
    captured(place, catalog, tmp_path, "odd_bias", batch_size=2)
    shards = [read_shard(CaptureFolder(tmp_path).shard(k)) for k in range(5)]
    assert [bool(s.attrs["biases"]) for s in shards] == [False] * 4 + [True]
    (name,) = shards[4].attrs["biases"]
    assert shards[4].arrays[name][0, 0, 0, 0, 0] == 2
    batch = torch.tensor([9, 0, 8, 1])  # over shards with and without, out of order
    seen = []
    Captured(tmp_path).run(
        batch, [Visitor(frozenset({"attention"}), lambda layer: seen.append(layer.captured["scores"]))]
    )
    assert seen[0].bias[:, 0, 0, 0].tolist() == [2, 1, 2, 1]


def test_a_layer_is_read_back_as_the_watcher_gave_it(place, catalog, tmp_path):
    """Every field of a layer, of images in any order."""
    from probekit.datasets.images import batches
    from probekit.models.model import load_model
    from probekit.subject import open_dataset
    from probekit.watch import Watcher

    captured(place, catalog, tmp_path, sites="all", layers="1:")
    resolved = resolve(grid(place), catalog)
    model, dataset = load_model(resolved.models[0].ref, catalog), open_dataset(resolved.datasets[0], catalog)
    pixels = next(iter(batches(dataset, [7, 2, 5], model.preprocessing, batch_size=3))).pixels
    fields = (
        "attention",
        "attention_full",
        "q",
        "k",
        "v",
        "head_outputs",
        "tokens_in",
        "tokens_mid",
        "tokens_out",
    )
    seen = {"live": [], "again": []}

    def visitors(into):
        needs = frozenset({*fields, "prefix_mass"})
        return [
            Visitor(
                needs,
                lambda layer: into.append(
                    (layer.row, *(getattr(layer, f) for f in fields), layer.prefix_mass)
                ),
            ),
            Visitor(
                frozenset({"tokens"}),
                lambda layer: into.append((layer.row, layer.tokens, layer.prefix_tokens())),
            ),
        ]

    with torch.no_grad():
        watcher = Watcher(model.module, pixels)
        watcher.run(pixels, visitors(seen["live"]))
    source = Captured(tmp_path)
    assert source.anatomy.to_json() == watcher.anatomy.to_json()
    source.run(torch.tensor([7, 2, 5]), visitors(seen["again"]))
    found = {row.label: values for row, *values in seen["again"]}
    assert list(found) and {row.label for row in source.layer_rows() + source.site_rows()} == set(found)
    wanted = {row.label: values for row, *values in seen["live"]}
    for label, values in found.items():
        for ours, again in zip(wanted[label], values, strict=True):
            torch.testing.assert_close(again, ours, atol=1e-6, rtol=1e-5)
    assert [r.label for r in source.layer_rows()] == ["blocks.1.attn", "blocks.2.attn"]


def test_a_metric_that_needs_more_does_not_apply_until_a_capture_holds_it(place, catalog, tmp_path):
    captured(place, catalog, tmp_path / "c", sites="attention,tokens_out")
    run = replay(tmp_path / "c", STREAMED, catalog, tmp_path / "r")
    outcomes = {c.metric: c.outcome for c in run.cells()}
    assert outcomes["nmi"].status == outcomes["attention_distance"].status == "done"
    assert outcomes["fourier"].status == "does not apply"
    assert outcomes["fourier"].reason == "the capture holds no 'tokens_in'"
    captured(place, catalog, tmp_path / "more", sites="tokens_in,tokens_mid,tokens_out")
    run = replay(tmp_path / "more", STREAMED, catalog, tmp_path / "r")
    assert {c.metric: c.outcome.status for c in run.cells()} == dict.fromkeys(outcomes, "done")


def test_replay_needs_no_model_and_says_what_it_read(place, catalog, tmp_path):
    (tmp_path / "gone.py").write_text(MODELS)
    captured(place, catalog, tmp_path / "c", f"{tmp_path / 'gone.py'}:vit", dtype="float16")
    (tmp_path / "gone.py").unlink()
    run = replay(tmp_path / "c", ["nmi"], catalog, tmp_path / "r")
    assert run.models == [f"{tmp_path / 'gone.py'}:vit"]
    assert run.result("nmi").attrs["dtype"] == "float32, captured as float16"
    about = run.about(run.models[0], run.datasets[0])
    assert about["capture"]["stored"] == "float16" and about["identity"]["layers"] == [0, 1, 2]
    before = tree(tmp_path / "r")
    replay(tmp_path / "c", ["nmi"], catalog, tmp_path / "r")
    assert tree(tmp_path / "r") == before


def test_live_and_replayed_numbers_do_not_share_a_cell(place, catalog, tmp_path):
    captured(place, catalog, tmp_path / "c")
    live(place, catalog, tmp_path / "l", metrics=["nmi"])
    with pytest.raises(StoreError, match="another 'dtype'"):
        replay(tmp_path / "c", ["nmi"], catalog, tmp_path / "l")
    replay(tmp_path / "c", ["nmi"], catalog, tmp_path / "r")
    with pytest.raises(StoreError, match="another 'dtype'"):
        live(place, catalog, tmp_path / "r", metrics=["nmi"])


def test_layers_of_a_replay_are_those_captured(place, catalog, tmp_path):
    captured(place, catalog, tmp_path / "c", layers="-1")
    run = replay(tmp_path / "c", ["nmi", "fourier"], catalog, tmp_path / "r")
    assert run.result("nmi").layer.values.tolist() == ["blocks.2.attn"]
    assert run.result("fourier").layer.values.tolist() == ["blocks.2.attn.mid", "blocks.2.attn.out"]
    ours = live(place, catalog, tmp_path / "l", metrics=["nmi"]).result("nmi")
    np.testing.assert_array_equal(run.result("nmi").nmi.values[0], ours.nmi.values[2])


def test_images_that_cannot_be_read_are_left_out_everywhere(place, catalog, tmp_path, small_shards):
    folder = tmp_path / "images"
    folder.mkdir()
    for file in (place / "images").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    for name in ("1.png", "4.png", "5.png", "6.png", "7.png"):
        (folder / name).write_bytes(b"no image")
    changes = {"datasets": [f"folder:{folder}"], "batch_size": 4}
    found = captured(place, catalog, tmp_path / "c", **changes)
    assert (found.images, found.bad, found.shards) == (10, 5, 3)
    assert len(read_shard(CaptureFolder(tmp_path / "c").shard(1)).arrays["index"]) == 0
    run = replay(tmp_path / "c", ["nmi"], catalog, tmp_path / "r")
    ours = live(place, catalog, tmp_path / "l", metrics=["nmi"], **changes)
    assert run.bad_images(run.models[0], run.datasets[0]) == ours.bad_images(ours.models[0], ours.datasets[0])
    assert run.traces("nmi").images == ["0.png", "2.png", "3.png", "8.png", "9.png"]
    np.testing.assert_array_equal(run.traces("nmi")["nmi"], ours.traces("nmi")["nmi"])


# --- resume, damage, space


@pytest.mark.usefixtures("small_shards")
def test_the_same_call_again_writes_nothing_and_a_lost_shard_alone(place, catalog, tmp_path):
    assert captured(place, catalog, tmp_path).written == 3
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.h5")}
    whole = tree(tmp_path)
    assert captured(place, catalog, tmp_path).written == 0
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.h5")}
    CaptureFolder(tmp_path).shard(1).unlink()
    found = captured(place, catalog, tmp_path)
    assert (found.written, found.shards) == (1, 3) and tree(tmp_path) == whole


@pytest.mark.usefixtures("small_shards")
def test_a_damaged_shard_is_named_refused_by_replay_and_captured_again(place, catalog, tmp_path):
    captured(place, catalog, tmp_path / "c", "beit")
    whole = tree(tmp_path / "c")
    shard = CaptureFolder(tmp_path / "c").shard(2)
    data = bytearray(shard.read_bytes())
    with h5py.File(shard) as file:
        place_of_q = file["blocks.2.attn/q"].id.get_offset()
    data[place_of_q + 7] ^= 4
    shard.write_bytes(data)
    with pytest.raises(StoreError, match=r"shard-00002.h5' is damaged.*blocks\.2\.attn/q"):
        replay(tmp_path / "c", ["nmi"], catalog, tmp_path / "r")
    constants = tmp_path / "c" / "constants.h5"
    constants.write_bytes(constants.read_bytes()[:-100])
    heard = []
    assert captured(place, catalog, tmp_path / "c", "beit", heard).written == 1
    assert any("shard-00002.h5" in e.text and "captured again" in e.text for e in heard)
    assert tree(tmp_path / "c") == whole


def test_an_unfinished_capture_is_not_replayed(place, catalog, tmp_path):
    captured(place, catalog, tmp_path)
    CaptureFolder(tmp_path).shard(0).unlink()
    with pytest.raises(StoreError, match="unfinished") as error:
        Captured(tmp_path)
    assert "probekit capture" in error.value.hint
    with pytest.raises(StoreError, match="holds no capture"):
        Captured(tmp_path / "nowhere")


SCRIPT = """
    import sys
    from pathlib import Path
    from probekit.capturing import capture as capturing
    from probekit.plugins.catalog import Catalog
    from probekit.grid import make_grid, resolve
    capturing.SHARD_BYTES = 1
    model, images, out = sys.argv[1:]
    catalog = Catalog.load(enabled=False)
    asked = {"models": [model], "datasets": [images], "metrics": [], "batch_size": 1, "device": "cpu"}
    capturing.capture(resolve(make_grid(asked), catalog), catalog, Path(out), sites="attention,tokens_out")
"""


def test_killed_at_any_moment_and_resumed_it_is_byte_for_byte_the_same(place, catalog, tmp_path):
    code = textwrap.dedent(SCRIPT)
    arguments = [f"{place / 'models.py'}:slow", f"folder:{place / 'images'}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for shards in (1, 4):
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments, str(tmp_path / "killed")], env=environment
        )
        give_up = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < give_up:
            if (tmp_path / "killed" / "capture.json").exists() and len(
                list((tmp_path / "killed" / "shards").glob("*.h5"))
            ) >= shards:
                break
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    left = len(list((tmp_path / "killed").rglob("shard-*.h5")))
    assert 4 <= left < 10
    same = {"model": "slow", "sites": "attention,tokens_out", "dtype": "float16", "batch_size": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capturing, "SHARD_BYTES", 1)
        assert captured(place, catalog, tmp_path / "killed", **same).written == 10 - left
        captured(place, catalog, tmp_path / "calm", **same)
    assert tree(tmp_path / "killed") == tree(tmp_path / "calm")
    assert not list((tmp_path / "killed").rglob("*.tmp"))


def test_a_full_disk_is_one_sentence_before_anything_is_written(place, catalog, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=50, f_frsize=4096))
    with pytest.raises(StoreError, match=r"the capture needs \d+ kB, the disk of '.*' has 205 kB") as error:
        captured(place, catalog, tmp_path / "c")
    assert "--limit 7," in error.value.hint
    assert not (tmp_path / "c" / "capture.json").exists() and not list((tmp_path / "c").rglob("*.h5"))


def test_a_dry_run_says_the_bytes_and_writes_nothing(place, catalog, tmp_path):
    resolved = resolve(grid(place), catalog)
    said = capture(resolved, catalog, tmp_path / "c", sites=EVERYTHING, dry_run=True)
    assert not (tmp_path / "c").exists() and said.missing == said.bytes > 0 and said.written == 0
    done = captured(place, catalog, tmp_path / "c", dtype="float16")
    assert replace(done, free=0, missing=0, written=0) == replace(said, free=0, missing=0)


def test_a_folder_of_another_capture_a_newer_one_or_of_something_else(place, catalog, tmp_path):
    captured(place, catalog, tmp_path / "c", sites="v")
    whole = tree(tmp_path / "c")
    for changes, what in (
        ({"sites": "q"}, "sites"),
        ({"layers": "0"}, "layers"),
        ({"dtype": "float16"}, "stored"),
        ({"limit": 3}, "images"),
        ({"model": "other_vit"}, "model"),
        ({"seed": 1}, "weights"),
    ):
        with pytest.raises(StoreError, match=f"another '{what}'"):
            captured(place, catalog, tmp_path / "c", **{"sites": "v", **changes})
    assert tree(tmp_path / "c") == whole

    file = tmp_path / "c" / "capture.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": 99}))
    for use in (
        lambda: captured(place, catalog, tmp_path / "c", sites="v"),
        lambda: Captured(tmp_path / "c"),
    ):
        with pytest.raises(StoreError, match="newer probekit"):
            use()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(StoreError, match="other files"):
        captured(place, catalog, tmp_path / "other")
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["thesis.tex"]
    with RunLock(tmp_path / "locked"), pytest.raises(StoreError, match="being written"):
        captured(place, catalog, tmp_path / "locked")


def test_two_models_are_refused(place, catalog, tmp_path):
    models = [f"{place / 'models.py'}:{n}" for n in ("vit", "beit")]
    with pytest.raises(UsageError, match="one model on one dataset"):
        capture(resolve(grid(place, models=models), catalog), catalog, tmp_path / "c")


def test_a_site_that_no_layer_has_is_refused(place, catalog, tmp_path, monkeypatch):
    from probekit.capturing.arrays import Probe

    given = Probe.layers

    def without_values(self, chosen, sites):
        return [replace(one, absent=(*one.absent, "v")) for one in given(self, chosen, sites)]

    monkeypatch.setattr(Probe, "layers", without_values)
    with pytest.raises(UsageError, match="none of the layers has 'v'"):
        captured(place, catalog, tmp_path / "c", sites="v,q")


def test_a_model_that_changes_after_the_plan_is_named(place, catalog, tmp_path, monkeypatch):
    from probekit.capturing.arrays import ShardArrays

    given = ShardArrays._put
    monkeypatch.setattr(
        ShardArrays, "_put", lambda self, site, layer, name, t: given(self, site, layer, name, t[..., :-1])
    )
    with pytest.raises(WatchError, match=r"'blocks\.0\.attn/v' has another shape or scale"):
        captured(place, catalog, tmp_path / "c", sites="v")


# --- command line


def command(*arguments):
    from probekit.cli import capturing as group
    from probekit.cli import state

    app = typer.Typer()
    group.register(app)
    state.configure()
    return typer.main.get_command(app).main([str(a) for a in arguments], standalone_mode=False)


def test_the_command_says_bytes_then_writes_them(place, tmp_path, capsys):
    given = [f"{place / 'models.py'}:vit", "--dataset", f"folder:{place / 'images'}", "--out", tmp_path / "c"]
    given += ["--sites", "attention,tokens_out", "--layers", "0,-1", "--limit", 6, "--device", "cpu"]
    assert command(*given, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "6 images, 2 layers, attention, tokens_out" in said and " bytes (" in said and "as float16" in said
    assert not (tmp_path / "c").exists()
    assert command(*given, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["shards"] == found["written"] == 1 and found["layers"] == ["blocks.0.attn", "blocks.2.attn"]
    assert f"{found['bytes']} bytes (" in said
    assert command(*given) == 0
    assert "0 shards written now" in capsys.readouterr().out


def test_the_command_refuses_a_wrong_site_before_loading_anything(place, tmp_path):
    with pytest.raises(UsageError, match="unknown site 'attn'"):
        command("timm:no_such_model", "-d", "folder:nowhere", "-o", tmp_path / "c", "--sites", "attn")


def test_every_metric_replays_to_the_same_numbers(place, catalog, tmp_path):
    """Bit for bit from float32; what needs more than the measured images says so."""
    captured(place, catalog, tmp_path / "c", sites="all")
    replayed = replay(tmp_path / "c", ["all"], catalog, tmp_path / "r")
    run = live(place, catalog, tmp_path / "live", metrics=("all",))
    outcomes = {c.metric: c.outcome for c in replayed.cells()}
    done = {metric for metric, outcome in outcomes.items() if outcome.status == "done"}
    assert {
        "similarity_heads",
        "prefix_mass",
        "spectrum_tokens",
        "spectrum_images",
        "attention_maps",
        "cka",
    } <= done
    assert {outcomes[m].status for m in set(outcomes) - done} <= {"does not apply"}
    for metric in done:
        assert replayed.result(metric).equals(run.result(metric)), metric
