"""What a metric sees of a layer, the layers made for tests, and the conformance kit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

from probekit.errors import DoesNotApply, MetricError, UsageError
from probekit.layer import Layer
from probekit.metric import Metric, Traces, Variation
from probekit.metrics.attention_distance import AttentionDistance
from probekit.metrics.attention_maps import AttentionMaps
from probekit.metrics.fourier import Fourier
from probekit.metrics.nmi import NMI
from probekit.summaries import layer_coordinates
from probekit.testing import TinyViT, check_metric, make_layer


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------- layers from plain tensors


def test_geometry() -> None:
    layer = make_layer(grid=(2, 3), stride=8, prefix=1, name="blocks.7.attn")
    assert (layer.grid, layer.stride, layer.prefix, layer.tokens_count) == ((2, 3), (8, 8), 1, 6)
    assert (layer.batch, layer.heads, layer.row.label, layer.info.tokens) == (2, 3, "blocks.7.attn", 6)
    expected = [[4, 4], [4, 12], [4, 20], [12, 4], [12, 12], [12, 20]]
    np.testing.assert_array_equal(layer.positions, expected)
    assert layer.distances.shape == (1, 1, 6, 6)
    for i, a in enumerate(expected):
        for j, b in enumerate(expected):
            assert float(layer.distances[0, 0, i, j]) == pytest.approx(np.hypot(a[0] - b[0], a[1] - b[1]))


def test_attention_drops_prefix_tokens_and_renormalises() -> None:
    full = random(2, 3, 6, 6).softmax(-1)
    layer = make_layer(full, grid=(2, 2), prefix=2)
    assert torch.equal(layer.attention_full, full)
    cut = full[:, :, 2:, 2:]
    torch.testing.assert_close(layer.attention, cut / cut.sum(-1, keepdim=True))
    torch.testing.assert_close(layer.prefix_mass, full[:, :, 2:, :2].sum(-1).mean(-1))
    torch.testing.assert_close(layer.attention.sum(-1), torch.ones(2, 3, 4))


def test_attention_from_queries_and_keys() -> None:
    q, k, v = random(3, 2, 3, 5, 8).unbind()
    for scale, used in ((None, 8**-0.5), (2.0, 2.0)):
        layer = make_layer(q=q, k=k, v=v, scale=scale, grid=(2, 2), prefix=1)
        full = (used * q @ k.mT).softmax(-1)
        torch.testing.assert_close(layer.attention_full, full)
        torch.testing.assert_close(layer.head_outputs, (full @ v)[:, :, 1:])
        given = make_layer(full, grid=(2, 2), prefix=1)
        torch.testing.assert_close(layer.attention, given.attention)
        for name in ("distance", "conditional_entropy", "key_entropy"):
            ours, theirs = (getattr(each.attention_stats, name) for each in (layer, given))
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert torch.equal(layer.q, q[:, :, 1:])
    assert torch.equal(layer.k, k[:, :, 1:])
    assert torch.equal(layer.v, v[:, :, 1:])


def test_statistics_of_known_maps() -> None:
    n = 16
    uniform = make_layer(torch.full((2, 3, n, n), 1 / n), grid=(4, 4)).attention_stats
    own = make_layer(torch.eye(n).expand(2, 3, n, n), grid=(4, 4)).attention_stats
    torch.testing.assert_close(uniform.conditional_entropy, torch.full((2, 3), np.log(n)).double())
    torch.testing.assert_close(uniform.key_entropy, torch.full((2, 3), np.log(n)).double())
    torch.testing.assert_close(own.conditional_entropy, torch.zeros(2, 3).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(own.distance, torch.zeros(2, 3).double(), rtol=0, atol=1e-6)
    assert float(uniform.distance[0, 0]) == pytest.approx(float(make_layer(grid=(4, 4)).distances.mean()))


def test_tokens_come_with_or_without_prefix() -> None:
    tokens = random(2, 6, 5)
    layer = make_layer(tokens=tokens, grid=(2, 2), prefix=2)
    assert torch.equal(layer.tokens, tokens[:, 2:])
    assert torch.equal(layer.tokens_mid, tokens[:, 2:])
    assert torch.equal(layer.prefix_tokens(), tokens[:, :2])
    assert torch.equal(make_layer(tokens=tokens[:, 2:], grid=(2, 2), prefix=2).tokens, tokens[:, 2:])
    assert (layer.row.site, layer.info.width) == ("out", 5)


def test_windows_are_folded() -> None:
    maps = random(2 * 6, 3, 4, 4).softmax(-1)  # 4 x 6 tokens in windows of 2 x 2
    layer = make_layer(maps, grid=(4, 6), stride=10, window=2)
    assert layer.batch == 2
    (folded,) = layer.windows()
    assert (folded.batch, folded.window_count, folded.window_share, folded.tokens_count) == (12, 6, 1.0, 4)
    torch.testing.assert_close(folded.attention, maps)
    assert folded.positions.shape == (6, 4, 2)
    np.testing.assert_array_equal(folded.positions[1], [[5, 25], [5, 35], [15, 25], [15, 35]])
    np.testing.assert_array_equal(folded.positions[3], [[25, 5], [25, 15], [35, 5], [35, 15]])
    assert folded.distances.shape == (12, 1, 4, 4)
    assert float(folded.distances.max()) == pytest.approx(np.hypot(10, 10))
    assert folded.unfold(torch.arange(12)).tolist() == [list(range(6)), list(range(6, 12))]
    assert folded.windows() == [folded]
    assert layer.windows()[0] is folded, "metrics share what they compute"
    for field in ("attention", "attention_stats", "distances"):
        with pytest.raises(MetricError, match=r"windowed attention: use layer.windows\(\)"):
            getattr(layer, field)
    with pytest.raises(DoesNotApply, match="no single full map"):
        _ = layer.attention_full


def test_padded_keys_have_no_full_map() -> None:
    layer = make_layer(grid=(3, 3), prefix=1)
    assert layer.attention_full.shape == (2, 3, 10, 10)
    padded = replace(layer, info=replace(layer.info, padded=3))
    with pytest.raises(DoesNotApply, match="'layer' attends to padding"):
        _ = padded.attention_full
    for metric in (NMI(compat="cl-vs-mim"), AttentionDistance(renormalise=False)):
        with pytest.raises(DoesNotApply, match="padding"):
            metric.measure(padded)
    found = AttentionMaps().measure(padded)
    assert found["attention_mean"].shape == (2, 0, 0)  # no rollout
    assert found["attention_maps"].shape == (2, 3, 3, 3, 3)


def test_heads_of_windows_come_back_in_raster_order() -> None:
    values = random(2 * 4, 3, 4, 8)
    layer = make_layer(v=values, grid=(4, 4), window=2)
    order = [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    expected = torch.empty(2, 3, 16, 8)
    expected[:, :, order] = values.unflatten(0, (2, 4)).transpose(1, 2).flatten(2, 3)
    assert torch.equal(layer.v, expected)
    assert torch.equal(layer.windows()[0].v, values)


def test_what_was_not_asked_for_is_not_there() -> None:
    layer = make_layer(torch.eye(4).expand(1, 1, 4, 4), grid=(2, 2))
    with pytest.raises(MetricError, match="'tokens' was not captured at 'layer'") as error:
        _ = layer.tokens
    assert "needs" in error.value.hint
    with pytest.raises(MetricError, match="'q' was not captured"):
        _ = layer.q
    gone = replace(layer, captured={"scores": DoesNotApply("because")})
    with pytest.raises(DoesNotApply, match="because"):
        _ = gone.attention


def test_a_layer_without_a_grid() -> None:
    layer = make_layer(grid=(2, 2))
    bare = replace(layer, info=replace(layer.info, grid=None, stride=None))
    with pytest.raises(DoesNotApply, match="the tokens of 'layer' form no full grid"):
        _ = bare.grid
    with pytest.raises(DoesNotApply, match="no regular grid"):
        _ = bare.stride
    assert bare.attention.shape == (2, 3, 4, 4)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"attention": torch.ones(1, 1, 4, 4)}, "'attention' is (1, 1, 4, 4), but a grid of 3 x 3"),
        ({"attention": torch.ones(9, 9)}, "'attention' is (9, 9)"),
        ({"q": torch.ones(1, 1, 9, 2)}, "'q' and 'k' go together"),
        ({"tokens": torch.ones(2, 8, 4)}, "'tokens' is (2, 8, 4), not (B, 9, C) or (B, 9, C)"),
        ({"window": 2}, "windows of 2 x 2 don't divide a grid of 3 x 3"),
        (
            {"tokens": torch.ones(2, 9, 4), "attention": torch.ones(3, 1, 9, 9)},
            "attention is of 3 images, tokens are of 2",
        ),
    ],
)
def test_tensors_that_do_not_fit(given: dict, text: str) -> None:
    with pytest.raises(UsageError) as error:
        make_layer(**given, grid=(3, 3))
    assert text in error.value.message


def test_tiny_vit_is_the_same_every_time() -> None:
    state = torch.get_rng_state()
    images = random(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(TinyViT()(images), TinyViT()(images))
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------------- the conformance kit


class Peak(Metric):
    """A metric that keeps its contract; the broken ones below are made from it."""

    name = "peak"
    needs = frozenset({"attention"})
    dims: ClassVar[Mapping[str, tuple[str, ...]]] = {"peak": ("head",)}

    def measure(self, layer: Layer) -> Mapping[str, Tensor]:
        return {"peak": layer.attention.amax(-1).mean(-1)}


@pytest.mark.parametrize("metric", [Peak, Peak(), NMI, AttentionDistance, Fourier, NMI(compat="cl-vs-mim")])
def test_good_metrics_pass(metric: Metric | type[Metric]) -> None:
    check_metric(metric)


def broken(measure=None, **attributes: object) -> type[Metric]:
    body = dict(attributes)
    if measure is not None:
        body["measure"] = lambda self, layer: measure(layer)
    return type("Broken", (Peak,), body)


def varied(*names: str) -> type[Metric]:
    return broken(
        variations=lambda self: [Variation(name, pixels=lambda pixels, index: pixels) for name in names]
    )


def summarised(change: Callable[[xr.Dataset], xr.Dataset]) -> type[Metric]:
    """A metric with a value and nothing else in its result, which is then changed."""

    def summarize(self: Metric, traces: Traces) -> xr.Dataset:
        made = xr.Dataset({"peak": (("layer", "head"), traces["peak"].mean(0))})
        return change(made.assign_coords(layer_coordinates(traces.rows)))

    return broken(summarize=summarize)


def peaks(layer: Layer) -> Tensor:
    return layer.attention.amax(-1).mean(-1)


def in_place(layer: Layer) -> Mapping[str, Tensor]:
    layer.captured["scores"].q.mul_(1.5)
    return {"peak": peaks(layer)}


def fails(layer: Layer) -> Mapping[str, Tensor]:
    return {"peak": {}["nothing"]}


def refuses(layer: Layer) -> Mapping[str, Tensor]:
    raise DoesNotApply("it is Tuesday")


@pytest.mark.parametrize(
    ("metric", "text"),
    [
        (broken(name=""), "metric 'Broken': 'name' is '', not of letters"),
        (broken(version=0), "metric 'peak': 'version' is 0"),
        (broken(needs="attention"), "'needs' is 'attention', not a set of fields"),
        (broken(needs={"atention"}), "'needs' names 'atention', which a layer doesn't have"),
        (broken(needs={"tokens", "attention"}), "a token site has tokens alone"),
        (broken(dims={}), "'dims' is {}"),
        (broken(dims={"peak": "head"}), "'dims' gives 'peak' the axes 'head', not a tuple"),
        (broken(dims={"peak": ("layer",)}), "those axes are there anyway"),
        (broken(dims={"top": ("head",)}), "'dims' has no value 'peak', the one that is plotted"),
        (broken(units={"peek": "1"}), "'units' names 'peek'"),
        (broken(windows="all"), "'windows' is 'all', not one of each, own"),
        (broken(curve="first"), "'curve' is 'first'"),
        (broken(requires="labels"), "'requires' is 'labels', not a set"),
        (broken(requires={"lables"}), "'requires' names 'lables', not one of cues, labels"),
        (broken(units="px"), "'units' is 'px', not a mapping"),
        (broken(units={"peak": 3}), "'units' gives 'peak' 3, not text"),
        (broken(dims={"peak": (), "..": ()}), "'dims' names '..', which can't name a value"),
        (broken(dims={"peak": (), "a/b": ()}), "'dims' names 'a/b', which can't name a value"),
        (broken(dims={"peak": ("depth",)}), "'dims' names 'depth', which the result has for something else"),
        (broken(dims={"peak": (), "stride": ()}), "'dims' names 'stride', which the result has"),
        (broken(dims={"peak": (), "peak_sd": ()}), "'dims' names 'peak_sd', which the result has"),
        (broken(dims={"peak": ("peak",)}), "'dims' names 'peak', which the result has"),
        (varied("../../evil"), "'variations' names one '../../evil', not of letters"),
        (varied(".."), "'variations' names one '..', not of letters"),
        (varied("x", "X"), "'variations' names two of them 'x'"),
        (broken(variations=lambda self: ["a"]), "'variations' holds a str, not a probekit.metric.Variation"),
        (broken(variations=lambda self: None), "'variations' raised TypeError"),
        (broken(lambda layer: {"peak": peaks(layer).to_sparse()}), "'peak' is a sparse tensor"),
        (broken(lambda layer: {"peak": peaks(layer).to("meta")}), "'peak' is a meta tensor"),
        (broken(lambda layer: {"peak": peaks(layer) * 1j}), "'peak' is of torch.complex64, not real numbers"),
        (broken(lambda layer: {"peak": 1, 3: 4}), "'measure' returned ['3', 'peak'], but 'dims'"),
        (broken(describe=lambda self, layer: {"c": "abc"}), "'describe' gives 'c' as str, not a number"),
        (broken(describe=lambda self, layer: {3: 1.0}), "'describe' names a constant 3, which can't name"),
        (summarised(lambda made: made.drop_vars("peak")), "gives no 'peak', nor another variable with role"),
        (summarised(lambda made: made.transpose("head", "layer")), "a 'peak' that has not 'layer' as its first axis"),
        (summarised(lambda made: made.assign(peak=made.peak.astype(str))), "'summarize' gives a 'peak' of <U"),
        (summarised(lambda made: made.assign(peak_curve=made.peak)), "'peak_curve' that is not one number per layer"),
        (summarised(lambda made: made.drop_vars("depth")), "no coordinate 'depth' of the layers"),
        (summarised(lambda made: made.assign_attrs(x=object())), "attribute 'x': object can't be stored"),
        (broken(lambda layer: peaks(layer)), "'measure' returned Tensor, but 'dims' declares ['peak']"),
        (broken(lambda layer: {"peek": peaks(layer)}), "'measure' returned ['peek']"),
        (broken(lambda layer: {"peak": 1.0}), "'peak' is a float, not a tensor"),
        (broken(lambda layer: {"peak": peaks(layer).mean(0)}), "'dims' says (image, head)"),
        (broken(lambda layer: {"peak": peaks(layer)[:, :1]}), "but the layer has 3 heads"),
        (broken(lambda layer: {"peak": peaks(layer).long()}), "'peak' is of torch.int64, not floating point"),
        (broken(lambda layer: {"peak": peaks(layer).log().sqrt()}), "'peak' is not finite"),
        (broken(lambda layer: {"peak": peaks(layer) - peaks(layer).mean(0)}), "'peak' of an image changes in another"),
        (broken(lambda layer: {"peak": peaks(layer).cumsum(0)}), "'peak' of an image changes with the images in another"),
        (broken(in_place), "metric 'peak' changes 'q' in place"),
        (broken(fails), "metric 'peak' can't measure a layer: it raised KeyError: 'nothing'"),
        (broken(refuses), "metric 'peak' applies to no layer of a plain ViT: it is Tuesday"),
        (broken(describe=lambda self, layer: {"uniform": float("nan")}), "'describe' gives 'uniform' that is not finite"),
        (broken(describe=lambda self, layer: 1.0), "'describe' returned float"),
        (broken(summarize=lambda self, traces: {}), "'summarize' returned dict, not an xarray.Dataset"),
        (broken(__init__=lambda self, needed: None), "'Broken' can't be made without options: it raised TypeError"),
        (int, "'int' is not a subclass of probekit.Metric"),
        (3, "'int' is not a subclass of probekit.Metric"),
    ],
)  # fmt: skip
def test_broken_metrics_are_told_what_is_wrong(metric: object, text: str) -> None:
    with pytest.raises(MetricError) as error:
        check_metric(metric)
    assert text in error.value.message
    assert "\n" not in error.value.message


def test_a_metric_without_measure() -> None:
    class Idle(Metric):
        name = "idle"
        needs = frozenset({"attention"})
        dims: ClassVar[Mapping[str, tuple[str, ...]]] = {"idle": ()}

    with pytest.raises(MetricError, match="metric 'idle': it has no 'measure'"):
        check_metric(Idle)


def test_needs_no_test_framework() -> None:
    code = "import sys, probekit.testing, probekit.conformance; assert not {'pytest', 'hypothesis'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
