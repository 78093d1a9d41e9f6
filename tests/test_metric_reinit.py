"""Fresh blocks: which modules a block is, what is copied, and the drop from hand-made traces."""

from __future__ import annotations

import pickle
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import tiny
from probe_traces import rows, split, traces

import probekit
from probekit.errors import DoesNotApply, MetricError, UsageError
from probekit.metrics.linear_probe import LinearProbe
from probekit.metrics.reinit import FreshBlocks, Reinit, encoder_blocks
from probekit.reports.curves import curve_of, main_value
from probekit.store.results import read_result, write_result


def anatomy(*names, decoder=()):
    layers = [SimpleNamespace(name=name, part="encoder") for name in names]
    return SimpleNamespace(
        layers=[*layers, *(SimpleNamespace(name=name, part="decoder") for name in decoder)]
    )


@pytest.mark.parametrize(
    ("names", "decoder", "blocks"),
    [
        ([f"blocks.{i}.attn" for i in range(12)], (), [f"blocks.{i}" for i in range(12)]),
        (
            [f"encoder.layer.{i}.attention.attention" for i in range(2)],
            (),
            ["encoder.layer.0", "encoder.layer.1"],
        ),
        (
            [
                "layers.0.blocks.0.attn",
                "layers.0.blocks.1.attn",
                "layers.1.blocks.0.attn",
                "layers.1.blocks.1.attn",
            ],
            (),
            ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0", "layers.1.blocks.1"],
        ),
        (["blocks.0.attn"], ["decoder_blocks.0.attn"], ["blocks"]),
        (["blocks.0.attn", "blocks.1.attn"], ["decoder_blocks.0.attn"], ["blocks.0", "blocks.1"]),
        (["a.attn1", "a.attn2"], (), ["a.attn1", "a.attn2"]),  # two in one block
    ],
)
def test_a_block_is_the_shortest_path_of_its_own(names, decoder, blocks):
    assert encoder_blocks(anatomy(*names, decoder=decoder)) == blocks


@pytest.mark.parametrize(("last", "changed"), [(False, {0, 1}), (True, {1, 2})])
def test_only_the_chosen_blocks_change_and_become_the_fresh_ones(last, changed):
    def build():
        torch.manual_seed(7)
        return tiny.TinyViT()

    torch.manual_seed(0)
    module = tiny.TinyViT()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    fresh = build().state_dict()
    layers = anatomy(*(f"blocks.{i}.attn" for i in range(tiny.DEPTH)))
    pickle.loads(pickle.dumps(FreshBlocks(2, last)))(module, build, layers)
    for name, value in module.state_dict().items():
        new = name.startswith("blocks.") and int(name.split(".")[1]) in changed
        assert torch.equal(value, fresh[name] if new else before[name]), name
        assert new or not name.endswith("qkv.weight") or not torch.equal(value, fresh[name])
    with pytest.raises(DoesNotApply, match="has 3 blocks, not 4"):
        FreshBlocks(4, last)(module, build, layers)


def test_buffers_come_along():
    module, fresh = (
        nn.ModuleDict({"b": nn.ModuleList([nn.BatchNorm1d(2), nn.BatchNorm1d(2)])}) for _ in range(2)
    )
    module["b"][0].running_mean += 5
    FreshBlocks(1, False)(module, lambda: fresh, anatomy("b.0.attn", "b.1.attn"))
    assert (module["b"][0].running_mean == 0).all()


def measured(metric, lost, layers=3):
    """Traces of perfect features but, under `name`, those of another class for `lost[name]` images, last row."""
    axis = rows(layers)
    given = split(apart=30, axis=axis)
    found = {}
    for v in metric.variations():
        values = given["features"].copy()
        for image in range(lost.get(v.name, 0)):
            values[image, -1] = given["features"][(image + 1) % 60, -1]
        # the lead maps labels of the train split; those of the variation are the same images'
        found[v.name] = replace(given, values={"features": values}, train=replace(given.train, labels=None))
    return replace(given, variations=found)


def test_the_drop_is_placed_at_the_block_it_is_about():
    metric = Reinit(blocks="1-2-6")
    lost = {"reinit-first-1": 6, "reinit-first-2": 30, "reinit-last-1": 12, "reinit-last-2": 15}
    result = metric.summarize(measured(metric, lost))
    assert [v.name for v in metric.variations()] == [
        f"reinit-{d}-{k}" for d in ("first", "last") for k in (1, 2, 6)
    ]
    assert all(v.train and v.pixels is None for v in metric.variations())
    nan = np.nan
    assert result["depth"].values.tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(result["reinit"].values, [nan, 10, 50, nan])
    np.testing.assert_allclose(result["reinit_last"].values, [nan, nan, 25, 20])
    assert result["blocks"].values.tolist() == [1, 2]  # the encoder has three
    np.testing.assert_allclose(result["drop"].values, [[10, 50], [20, 25]])
    np.testing.assert_allclose(result["best_drop"].values, 0)  # earlier rows lost nothing
    np.testing.assert_allclose(result["accuracy_after"].values[-1], [[90, 50], [80, 75]])
    assert (result["accuracy_before"].values == 100).all()
    draws = np.random.Generator(np.random.PCG64(0)).integers(0, 60, size=(1000, 60))
    low, high = np.quantile((100.0 * (np.arange(60) < 30))[draws].mean(1), [0.025, 0.975])
    assert (result["reinit_low"].values[2], result["reinit_high"].values[2]) == pytest.approx((low, high))


def test_a_probe_is_trained_anew_on_the_changed_models_features():
    """Features moved and mixed alike in both splits lose nothing; in the test split alone they would."""
    metric = Reinit(blocks="1", l2=0.01)
    given = split(apart=30)
    mixing = np.linalg.qr(np.random.default_rng(5).standard_normal((6, 6)))[0]

    def moved(t):
        values = t["features"].copy()
        values[:, :-1] = values[:, :-1] @ mixing + 3
        values[:, -1, :4] = values[:, -1, 3::-1]
        return replace(t, values={"features": values}, train=None)

    changed = replace(moved(given), train=moved(given.train))
    result = metric.summarize(replace(given, variations={v.name: changed for v in metric.variations()}))
    assert (result["drop"].values == 0).all()


def test_before_is_linear_probe_of_the_encoder_only():
    metric = Reinit(blocks="1")
    axis = [*rows(2), *rows(2, part="decoder", first=2)]
    given = split(apart=0.8, axis=axis)
    given = replace(given, variations={v.name: given for v in metric.variations()})
    result = metric.summarize(given)
    assert set(result["part"].values) == {"encoder"}
    np.testing.assert_allclose(
        result["accuracy_before"].values, LinearProbe().summarize(given)["linear_probe"].values[:3]
    )


def test_the_result_is_one_that_reports_read_and_the_store_keeps(tmp_path):
    metric = Reinit(blocks="1-2")
    write_result(tmp_path / "r.nc", metric.summarize(measured(metric, {"reinit-first-2": 30})))
    back = read_result(tmp_path / "r.nc")
    assert main_value(back) == "reinit"
    points = curve_of(back, "reinit", "m").points
    assert [(p.depth, p.mean) for p in points if not np.isnan(p.mean)] == [(1, 0), (2, 50)]


def test_what_it_cannot_do_it_says():
    metric = Reinit(blocks="7")
    with pytest.raises(DoesNotApply, match="fewer than 7"):
        metric.summarize(measured(metric, {}))
    with pytest.raises(MetricError, match="reinit-first-1"):
        Reinit(blocks="1").summarize(split())
    with pytest.raises(DoesNotApply, match="two images"):
        given = split()
        Reinit(blocks="1").summarize(replace(given, train=traces([0, 1, 2])))
    for wrong in ("", "0", "1,2", "a", "1--2", "-1"):
        with pytest.raises(UsageError):
            Reinit(blocks=wrong)
    assert Reinit(blocks="3-1-3").counts == [1, 3]


BUILDERS = """
import torch
from timm.models.vision_transformer import VisionTransformer

def drawn():
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=0)

def kept():
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # as one that loads a checkpoint
        return drawn()
"""


@pytest.mark.parametrize(("builder", "status"), [("drawn", "done"), ("kept", "does not apply")])
def test_a_builder_with_weights_of_its_own_has_no_fresh_blocks(tmp_path, builder, status):
    (tmp_path / "own.py").write_text(BUILDERS)
    run = probekit.run(
        [f"{tmp_path / 'own.py'}:{builder}"], ["shapetex?size=32"], ["reinit"],
        limit=16, train_limit=32, image_size=32, out=tmp_path / "run",
    )  # fmt: skip
    (cell,) = run.cells()
    assert cell.outcome.status == status, cell.outcome
    assert ("same weights whatever the seed" in cell.outcome.reason) == (builder == "kept")
