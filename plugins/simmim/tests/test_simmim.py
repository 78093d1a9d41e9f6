"""The published layout of SimMIM rebuilt with random weights, against a reference forward in plain torch."""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from probekit_simmim.models import fit
from probekit_simmim.plugin import probekit_models
from safetensors.torch import save_file

from probekit.errors import UsageError, WeightsError
from probekit.models.model import load_model
from probekit.names import parse_model
from probekit.watch import Visitor, Watcher

WIDTH, HEADS, SIZE = 768, 12, 64


class Catalog:
    """The two calls `load_model` makes, over this pack's specs alone."""

    def model(self, ref):
        ref = parse_model(ref)
        spec = next(s for s in probekit_models() if s.variant == (ref.variant or "vit-b16"))
        return SimpleNamespace(
            spec=spec, pack="simmim", version="0", ref=ref, options={}, variant=spec.variant
        )

    def resolve_target(self, entry):
        module, _, attribute = entry.spec.target.partition(":")
        return getattr(importlib.import_module(module), attribute)


def encoder_shapes(variant: str = "vit-b16") -> dict[str, tuple[int, ...]]:
    """METRICS.md part II, "Key shapes", SimMIM ViT-B, without the "encoder." prefix; and fine-tuned."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, 768),
        "patch_embed.proj.weight": (768, 3, 16, 16),
        "patch_embed.proj.bias": (768,),
    }
    if variant == "vit-b16":
        shapes |= {"rel_pos_bias.relative_position_bias_table": (732, 12)}
        shapes |= {"norm.weight": (768,), "norm.bias": (768,)}
    else:
        shapes |= {"fc_norm.weight": (768,), "fc_norm.bias": (768,)}
        shapes |= {"head.weight": (1000, 768), "head.bias": (1000,)}
    for block in range(12):
        if variant == "vit-b16-ft":
            shapes[f"blocks.{block}.attn.relative_position_bias_table"] = (732, 12)
        shapes |= {
            f"blocks.{block}.gamma_1": (768,),
            f"blocks.{block}.gamma_2": (768,),
            f"blocks.{block}.norm1.weight": (768,),
            f"blocks.{block}.norm1.bias": (768,),
            f"blocks.{block}.attn.q_bias": (768,),
            f"blocks.{block}.attn.v_bias": (768,),
            f"blocks.{block}.attn.qkv.weight": (2304, 768),
            f"blocks.{block}.attn.proj.weight": (768, 768),
            f"blocks.{block}.attn.proj.bias": (768,),
            f"blocks.{block}.norm2.weight": (768,),
            f"blocks.{block}.norm2.bias": (768,),
            f"blocks.{block}.mlp.fc1.weight": (3072, 768),
            f"blocks.{block}.mlp.fc1.bias": (3072,),
            f"blocks.{block}.mlp.fc2.weight": (768, 3072),
            f"blocks.{block}.mlp.fc2.bias": (768,),
        }
    return shapes


def relative_index() -> torch.Tensor:
    """Rows of the table for each pair of tokens: offsets row by row, CLS->token, token->CLS, CLS->CLS."""
    index = torch.empty(197, 197, dtype=torch.long)
    index[0, 1:], index[1:, 0], index[0, 0] = 27 * 27, 27 * 27 + 1, 27 * 27 + 2
    for query in range(196):
        for key in range(196):
            down, right = query // 14 - key // 14, query % 14 - key % 14
            index[1 + query, 1 + key] = (down + 13) * 27 + (right + 13)
    return index


INDEX = relative_index()


def encoder(seed: int, variant: str = "vit-b16") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in encoder_shapes(variant).items():
        scale = 0.04 if ".qkv.weight" in key else 1.0 if "bias_table" in key else 0.02
        centre = 1.0 if "norm" in key and "weight" in key else 0.1 if "gamma" in key else 0.0
        state[key] = torch.randn(shape, generator=generator) * scale + centre
    return state


class CfgNode(dict):
    """What a yacs CfgNode is to pickle: a dict subclass with attributes."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.__dict__["__immutable__"] = True

    def __setattr__(self, name, value):
        raise AttributeError("frozen: setting an attribute shows that this class was used in loading")


CfgNode.__module__ = "yacs.config"


def checkpoint(weights: dict, monkeypatch) -> dict:
    """As SimMIM's save_checkpoint writes it, the frozen yacs config included."""
    yacs = ModuleType("yacs.config")
    yacs.CfgNode = CfgNode
    monkeypatch.setitem(sys.modules, "yacs", ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", yacs)
    state = {f"encoder.{key}": value for key, value in weights.items()}
    state |= {
        "encoder.mask_token": torch.zeros(1, 1, 768),
        "encoder.rel_pos_bias.relative_position_index": INDEX,
        "decoder.0.weight": torch.zeros(768, 768, 1, 1),
        "decoder.0.bias": torch.zeros(768),
    }
    return {
        "model": state,
        "optimizer": {"state": {0: {"step": 9, "exp_avg": torch.zeros(4)}}, "param_groups": [{"lr": 1e-4}]},
        "lr_scheduler": {"base_values": [1e-4], "t_in_epochs": False},
        "max_accuracy": 0.0,
        "epoch": 799,
        "config": CfgNode(MODEL=CfgNode(TYPE="vit", VIT=CfgNode(USE_MEAN_POOLING=False))),
        "args": argparse.Namespace(amp="O1"),
    }


def reference(state: dict[str, torch.Tensor], images: torch.Tensor):
    """(layers, output) in float64 from the file's tensors; per layer tokens between, tokens after, map."""
    w = {key: value.double() for key, value in state.items()}
    count = images.shape[0]

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scale = torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)
        return centred / scale * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    patches = (
        images.double().reshape(count, 3, 14, 16, 14, 16).permute(0, 2, 4, 1, 3, 5).reshape(count, 196, 768)
    )
    x = patches @ w["patch_embed.proj.weight"].reshape(WIDTH, 768).T + w["patch_embed.proj.bias"]
    x = torch.cat([w["cls_token"].expand(count, 1, WIDTH), x], dim=1)
    layers = []
    for block in range(12):
        name = f"blocks.{block}"
        table = w.get("rel_pos_bias.relative_position_bias_table")
        if table is None:
            table = w[f"{name}.attn.relative_position_bias_table"]
        qkv = norm(x, f"{name}.norm1") @ w[f"{name}.attn.qkv.weight"].T
        q, k, v = qkv.split(WIDTH, dim=-1)
        q, v = q + w[f"{name}.attn.q_bias"], v + w[f"{name}.attn.v_bias"]
        q, k, v = (part.reshape(count, 197, HEADS, SIZE).transpose(1, 2) for part in (q, k, v))
        logits = q @ k.transpose(-1, -2) / math.sqrt(SIZE) + table[INDEX].permute(2, 0, 1)
        logits = torch.exp(logits - logits.amax(-1, keepdim=True))
        probabilities = logits / logits.sum(-1, keepdim=True)
        mixed = (probabilities @ v).transpose(1, 2).reshape(count, 197, WIDTH)
        mid = x + w[f"{name}.gamma_1"] * linear(mixed, f"{name}.attn.proj")
        hidden = linear(norm(mid, f"{name}.norm2"), f"{name}.mlp.fc1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = mid + w[f"{name}.gamma_2"] * linear(hidden, f"{name}.mlp.fc2")
        layers.append((mid, x, probabilities))
    if "head.weight" in w:
        return layers, linear(norm(x[:, 1:].mean(1), "fc_norm"), "head")
    return layers, norm(x, "norm")[:, 0]


def assert_same(state: dict[str, torch.Tensor], module: torch.nn.Module):
    """What metrics see of the module we load, and its output, are the reference's."""
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(5))
    found = []

    def visit(layer):
        sites = ("tokens_mid", "tokens_out")
        tokens = [torch.cat([layer.prefix_tokens(site), getattr(layer, site)], 1) for site in sites]
        found.append((*tokens, layer.attention_full))

    needs = frozenset({"tokens_mid", "tokens_out", "attention_full"})
    output = Watcher(module, images).run(images, [Visitor(needs, visit)])
    layers, expected = reference(state, images)
    assert len(found) == 12
    for number, (want, have) in enumerate(zip(layers, found, strict=True)):
        for name, a, b in zip(("tokens after attention", "tokens", "attention"), want, have, strict=True):
            assert a.shape == b.shape and (a - b).abs().max() < 1e-5, f"{name} of block {number}"
    assert (output - expected).abs().max() < 1e-5
    assert layers[-1][2].amax(-1).mean() * 197 > 2, "the attention is uniform: it would show no difference"


@pytest.fixture(scope="module")
def weights():
    return encoder(1)


@pytest.fixture
def published(weights, tmp_path, monkeypatch):
    """(content, save): `save` writes the content as it then is, and forgets yacs."""
    content = checkpoint(weights, monkeypatch)

    def save():
        path = tmp_path / "simmim_pretrain__vit_base.pth"
        torch.save(content, path)
        monkeypatch.delitem(sys.modules, "yacs.config")
        monkeypatch.delitem(sys.modules, "yacs")
        return path

    return content, save


def test_the_published_layout_gives_the_reference_tokens_and_attention(published, weights):
    _, save = published
    model = load_model(f"simmim:vit-b16@{save()}", Catalog())
    assert_same(weights, model.module)
    assert len(model.accounting.used) == len(weights)
    assert set(model.accounting.ignored) == {
        "encoder.mask_token",
        "encoder.rel_pos_bias.relative_position_index",
        "decoder.0.weight",
        "decoder.0.bias",
    }
    assert "yacs.config" not in sys.modules, "the file's classes were imported"
    assert model.preprocessing.mean == (0.485, 0.456, 0.406)
    assert model.preprocessing.interpolation == "bicubic"


def test_a_bare_state_dict_saved_as_our_hint_says(weights, tmp_path):
    save_file(weights, tmp_path / "weights.safetensors")
    module = load_model(f"simmim@{tmp_path}/weights.safetensors", Catalog()).module
    assert torch.equal(module.blocks[11].gamma_2, weights["blocks.11.gamma_2"])


def fine_tuned(state: dict[str, torch.Tensor]) -> dict:
    """As main_finetune.py writes it: no prefix, the buffers of every block."""
    index = {f"blocks.{block}.attn.relative_position_index": INDEX for block in range(12)}
    return {"model": state | index, "epoch": 99, "max_accuracy": 83.8, "args": argparse.Namespace(amp="O1")}


def test_the_fine_tuned_layout(tmp_path):
    weights = encoder(2, "vit-b16-ft")
    path = tmp_path / "simmim_finetune__vit_base.pth"
    torch.save(fine_tuned(weights), path)
    model = load_model(f"simmim:vit-b16-ft@{path}", Catalog())
    assert_same(weights, model.module)
    assert len(model.accounting.used) == len(weights)
    assert set(model.accounting.ignored) == {f"blocks.{n}.attn.relative_position_index" for n in range(12)}

    with pytest.raises(
        WeightsError,
        match=r"finetune__vit_base.pth' is a file of 'simmim:vit-b16-ft', not of 'simmim:vit-b16'",
    ) as caught:
        load_model(f"simmim:vit-b16@{path}", Catalog())
    assert "'simmim:vit-b16-ft@PATH'" in caught.value.hint
    module = load_model("simmim:vit-b16-ft@random", Catalog(), image_size=(224, 448)).module
    pretrained = {f"encoder.{key}": torch.empty(s, device="meta") for key, s in encoder_shapes().items()}
    with pytest.raises(WeightsError, match="is a file of 'simmim:vit-b16', not of 'simmim:vit-b16-ft'"):
        fit(pretrained, module)
    fitted = fit({key: weights[key] for key in weights if "bias_table" in key}, module)
    assert {table.shape for table in fitted.values()} == {(27 * 55 + 3, 12)} and len(fitted) == 12


@pytest.mark.parametrize("variant", ["vit-b16", "vit-b16-ft"])
def test_the_network_is_the_papers(variant):
    module = load_model(f"simmim:{variant}@random", Catalog()).module
    assert [block.attn.num_heads for block in module.blocks] == [12] * 12
    assert module.pos_embed is None
    assert {m.eps for m in module.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}
    assert {key: tuple(value.shape) for key, value in module.state_dict().items()} == encoder_shapes(variant)
    assert float(module.blocks[0].gamma_1.detach().max()) == pytest.approx(0.1)


def test_an_untrained_network_starts_as_the_authors_do():
    module = load_model("simmim@random", Catalog(), seed=3).module
    for weight in (module.patch_embed.proj.weight, module.blocks[4].mlp.fc1.weight):  # cut off at one sigma
        weight = weight.detach()
        assert float(weight.abs().max()) == pytest.approx(0.02, rel=1e-3)
        assert float(weight.std()) == pytest.approx(0.02 * 0.5396, rel=0.02)
    for block in (0, 11):
        weight = module.blocks[block].attn.proj.weight.detach()
        assert float(weight.abs().max()) == pytest.approx(0.02 / math.sqrt(2 * (block + 1)), rel=1e-3)
    assert not module.patch_embed.proj.bias.detach().any()
    tuned = load_model("simmim:vit-b16-ft@random", Catalog(), seed=3).module
    assert float(tuned.blocks[4].mlp.fc1.weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    assert float(tuned.head.weight.detach().std()) == pytest.approx(2e-5, rel=0.02)


def test_other_files_are_refused(published, tmp_path):
    content, save = published
    state = content["model"]
    del state["encoder.blocks.3.attn.q_bias"]
    state["encoder.pos_embed"] = torch.zeros(1, 197, 768)
    with pytest.raises(
        WeightsError, match=r"1 missing \('blocks.3.attn.q_bias' \(768\)\); 1 unexpected \('pos_embed'"
    ) as caught:
        load_model(f"simmim@{save()}", Catalog())
    assert "fine-tuned" in caught.value.hint

    plain = tmp_path / "vit.pth"
    torch.save({"model": {"pos_embed": torch.zeros(1, 197, 768), "cls_token": torch.zeros(1, 1, 768)}}, plain)
    with pytest.raises(WeightsError, match="doesn't fit"):
        load_model(f"simmim@{plain}", Catalog())
    torch.save({"state_dict": {"a": {"b": 1}}, "epoch": 3}, plain)
    with pytest.raises(WeightsError, match="has no 'model': it holds 'state_dict', 'epoch'"):
        load_model(f"simmim@{plain}", Catalog())


def test_a_truncated_file_and_one_that_runs_code_are_refused(published, tmp_path):
    content, save = published

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    content["config"]["MODEL"]["hook"] = Payload()
    path = save()
    with pytest.raises(WeightsError, match=r"needs code to load \('posix.system'\)"):
        load_model(f"simmim@{path}", Catalog())
    assert not (tmp_path / "ran").exists()
    path.write_bytes(path.read_bytes()[:-100_000])
    with pytest.raises(WeightsError, match="cut short"):
        load_model(f"simmim@{path}", Catalog())


def test_another_image_size_interpolates_the_table(published):
    _, save = published
    path = save()
    model = load_model(f"simmim@{path}", Catalog(), image_size=(224, 448))
    assert model.module.rel_pos_bias.relative_position_bias_table.shape == (27 * 55 + 3, 12)
    assert model(torch.zeros(1, 3, 224, 448)).shape == (1, 768)
    with pytest.raises(UsageError, match="don't tile 230 x 224"):
        load_model(f"simmim@{path}", Catalog(), image_size=(230, 224))


@pytest.mark.parametrize("axis", [0, 1])
def test_the_interpolated_table_keeps_its_axes(weights, tmp_path, axis):
    """A bias that depends on one offset alone, rising with it, still does so on a grid of 14 x 28."""
    rising = torch.linspace(-1, 1, 27)
    flat = (rising[:, None] if axis == 0 else rising[None, :]).expand(27, 27).reshape(-1, 1).expand(-1, 12)
    table = torch.cat([flat, torch.tensor([7.0, 8.0, 9.0])[:, None].expand(3, 12)])
    path = tmp_path / "table.safetensors"
    save_file(weights | {"rel_pos_bias.relative_position_bias_table": table.contiguous()}, path)
    module = load_model(f"simmim@{path}", Catalog(), image_size=(224, 448)).module
    found = module.rel_pos_bias.relative_position_bias_table.detach()
    assert found[-3:, 5].tolist() == [7.0, 8.0, 9.0]
    offsets = found[:-3].reshape(27, 55, 12)
    assert torch.allclose(offsets, offsets.select(1 - axis, 0).unsqueeze(1 - axis), atol=1e-5)
    along = offsets.select(1 - axis, 0)[:, 0]
    assert bool((along.diff() > 0).all())
    assert [float(along[0]), float(along[len(along) // 2]), float(along[-1])] == pytest.approx(
        [-1, 0, 1], abs=1e-6
    )
    if axis == 0:  # as many rows as before: nothing there may move
        assert torch.allclose(along, rising, atol=1e-6)
    else:  # the offsets beside zero keep their bias, the far ones are spread out
        assert float(along[28]) == pytest.approx(float(rising[14]), abs=1e-6)
        assert float(along[40]) > float(rising[26]) / 2  # the steps grow, so half-way out is past the half


def test_what_the_entries_say():
    specs = {spec.variant: spec for spec in probekit_models()}
    assert list(specs) == ["mini", "vit-b16", "vit-b16-ft", "swin-b", "swin-l"]
    assert [spec.variant for spec in specs.values() if spec.default] == ["mini"]
    assert specs["mini"].published_as in specs and specs["mini"].weights.bundled
    for variant, objective, file in (
        ("vit-b16", "MIM", "1dJn6GYkwMIcoP3zqOEyW1_iQfpBi8UOw"),
        ("vit-b16-ft", "supervised", "1fKgDYd0tRgyHyTnyB1CleYxjo0Gn5tEB"),
        ("swin-b", "MIM", "15zENvGjHlM71uKQ3d2FbljWPubtrPtjl"),
        ("swin-l", "MIM", "1qDxrTl2YUDB0505_4QrU5LU2R1kKmcBP"),
    ):
        spec = specs[variant]
        assert spec.objective == objective and f"id={file}&" in spec.weights.url
        assert spec.citation and spec.weights.licence == "MIT"
        swin_heads = (4, 8, 16, 32) if variant == "swin-b" else (6, 12, 24, 48)
        assert (spec.heads, spec.layers) == ((12, 12) if variant.startswith("vit") else (swin_heads, 24))
    assert specs["swin-b"].preprocessing.size == specs["swin-l"].preprocessing.size == (192, 192)
    assert len({spec.weights.filename for spec in specs.values()} - {""}) == 4
