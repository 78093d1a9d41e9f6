"""The examples do what they say: a metric in ten lines, a model pack for a ViT that timm doesn't have."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import probekit
from probekit.errors import WeightsError
from probekit.models.model import load_model
from probekit.plugins.catalog import Catalog
from probekit.testing import check_metric, make_layer

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def catalog():
    return Catalog.load([EXAMPLES / "entropy.py", EXAMPLES / "torchvision_vit.py"])


def test_entropy_of_uniform_and_identity_attention(catalog):
    metric = catalog.resolve_target(catalog.metric("entropy"))()
    for maps, expected in (
        (torch.full((1, 2, 16, 16), 1 / 16), 1.0),
        (torch.eye(16).expand(1, 2, 16, 16), 0.0),
    ):
        found = metric.measure(make_layer(attention=maps, grid=(4, 4)))["entropy"]
        np.testing.assert_allclose(found, expected, atol=1e-6)
    check_metric(type(metric))


def test_the_metrics_logic_is_at_most_ten_lines():
    text = (EXAMPLES / "entropy.py").read_text()
    body = text[text.index("class ") :].splitlines()
    assert len([line for line in body if line.strip() and '"""' not in line]) <= 10


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    vision_transformer = pytest.importorskip("torchvision.models").vision_transformer
    torch.manual_seed(0)
    module = vision_transformer.vit_b_16().eval()
    nn.init.normal_(module.heads.head.weight)  # zeros by default, and every output with them
    path = tmp_path_factory.mktemp("tv") / "vit_b_16.pth"
    torch.save(module.state_dict(), path)
    return module, path


def test_torchvisions_file_is_read_and_measured(catalog, file):
    module, path = file
    loaded = load_model(f"tv:b16@{path}", catalog)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), module(images), rtol=0, atol=0)
    maps = []
    watcher = probekit.Watcher(loaded.module, images)
    watcher.run(
        images,
        [probekit.Visitor(frozenset({"attention_full"}), lambda layer: maps.append(layer.attention_full))],
    )
    assert [layer.heads for layer in watcher.anatomy.layers] == [12] * 12
    assert {(layer.prefix, layer.grid) for layer in watcher.anatomy.layers} == {(1, (14, 14))}
    seen = []
    hook = module.encoder.layers[3].ln_1.register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.no_grad():
        module(images)
        expected = module.encoder.layers[3].self_attention(
            seen[0], seen[0], seen[0], average_attn_weights=False
        )[1]
    hook.remove()
    torch.testing.assert_close(maps[3], expected, rtol=0, atol=1e-5)
    distance = probekit.probe(loaded, images, metrics=["attention_distance"])["attention_distance"]
    assert math.isclose(float(distance["uniform"][0]), 116.492, abs_tol=1e-3)


def test_another_files_keys_are_refused(catalog, tmp_path):
    torch.save({"conv_proj.weight": torch.zeros(768, 3, 16, 16), "other": torch.zeros(3)}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"x\.pth"):
        load_model(f"tv:b16@{tmp_path / 'x.pth'}", catalog)
