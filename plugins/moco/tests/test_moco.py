"""The published layout of MoCo v3 rebuilt with random weights, against a reference forward in plain torch."""

from __future__ import annotations

import argparse
import importlib
import itertools
import math
import os
from types import SimpleNamespace

import pytest
import torch
from probekit_moco.plugin import probekit_models
from safetensors.torch import save_file

from probekit.errors import UsageError, WeightsError
from probekit.model import load_model
from probekit.names import parse_model

WIDTHS = {"vit-s16": 384, "vit-b16": 768}
HEADS = 12


class Catalog:
    """The two calls `load_model` makes, over this pack's specs alone."""

    def model(self, ref):
        ref = parse_model(ref)
        spec = next(s for s in probekit_models() if s.variant == (ref.variant or "vit-b16"))
        options = {key: option.default for key, option in spec.options.items()} | ref.options
        return SimpleNamespace(
            spec=spec, pack="moco", version="0", ref=ref, options=options, variant=spec.variant
        )

    def resolve_target(self, entry):
        module, _, attribute = entry.spec.target.partition(":")
        return getattr(importlib.import_module(module), attribute)


def encoder_shapes(width: int) -> dict[str, tuple[int, ...]]:
    """METRICS.md part II, "Key shapes": cls_token to norm."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 197, width),
        "patch_embed.proj.weight": (width, 3, 16, 16),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for block in range(12):
        shapes |= {
            f"blocks.{block}.norm1.weight": (width,),
            f"blocks.{block}.norm1.bias": (width,),
            f"blocks.{block}.attn.qkv.weight": (3 * width, width),
            f"blocks.{block}.attn.qkv.bias": (3 * width,),
            f"blocks.{block}.attn.proj.weight": (width, width),
            f"blocks.{block}.attn.proj.bias": (width,),
            f"blocks.{block}.norm2.weight": (width,),
            f"blocks.{block}.norm2.bias": (width,),
            f"blocks.{block}.mlp.fc1.weight": (4 * width, width),
            f"blocks.{block}.mlp.fc1.bias": (4 * width,),
            f"blocks.{block}.mlp.fc2.weight": (width, 4 * width),
            f"blocks.{block}.mlp.fc2.bias": (width,),
        }
    return shapes


def moco_positions(width: int) -> torch.Tensor:
    """Fixed sines and cosines, the row's half of the channels first, zeros for the class token."""
    table = torch.zeros(1, 197, width)
    quarter = width // 4
    for row in range(14):
        for column in range(14):
            for i in range(quarter):
                speed = 10000 ** (-i / quarter)
                table[0, 1 + 14 * row + column, i] = math.sin(row * speed)
                table[0, 1 + 14 * row + column, quarter + i] = math.cos(row * speed)
                table[0, 1 + 14 * row + column, 2 * quarter + i] = math.sin(column * speed)
                table[0, 1 + 14 * row + column, 3 * quarter + i] = math.cos(column * speed)
    return table


POSITIONS = {width: moco_positions(width) for width in WIDTHS.values()}


def encoder(width: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in encoder_shapes(width).items():
        scale = 0.04 if ".qkv.weight" in key else 0.02
        state[key] = torch.randn(shape, generator=generator) * scale + ("norm" in key and "weight" in key)
    state["pos_embed"] = POSITIONS[width].clone()
    return state


def mlp(sizes: list[int]) -> dict[str, torch.Tensor]:
    """A projector or predictor: Linear without bias, BatchNorm, ReLU, ...; thin, since nothing reads it."""
    state = {}
    for layer, (before, after) in enumerate(itertools.pairwise(sizes)):
        state[f"{3 * layer}.weight"] = torch.zeros(after, before)
        for name in ("weight", "bias", "running_mean", "running_var"):
            state[f"{3 * layer + 1}.{name}"] = torch.ones(after)
        state[f"{3 * layer + 1}.num_batches_tracked"] = torch.tensor(7)
    return state


def checkpoint(base: dict, momentum: dict) -> dict:
    state = {}
    for name, weights in (("base", base), ("momentum", momentum)):
        state |= {f"module.{name}_encoder.{key}": value for key, value in weights.items()}
        state |= {f"module.{name}_encoder.head.{key}": value for key, value in mlp([384, 16, 16, 4]).items()}
    state |= {f"module.predictor.{key}": value for key, value in mlp([4, 16, 4]).items()}
    return {
        "epoch": 300,
        "arch": "vit_base",
        "state_dict": state,
        "optimizer": {
            "state": {0: {"step": 3, "exp_avg": torch.zeros(4)}},
            "param_groups": [{"lr": 1e-4, "params": [0]}],
        },
        "scaler": {"scale": 65536.0, "growth_factor": 2.0},
        "args": argparse.Namespace(arch="vit_base", moco_m=0.99),
    }


def reference(state: dict[str, torch.Tensor], images: torch.Tensor):
    """Tokens after each block and attention of each block, float64, from the file's tensors."""
    w = {key: value.double() for key, value in state.items()}
    width = w["cls_token"].shape[-1]
    count, size = images.shape[0], width // HEADS

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scale = torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)
        return centred / scale * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    patches = (
        images.double().reshape(count, 3, 14, 16, 14, 16).permute(0, 2, 4, 1, 3, 5).reshape(count, 196, 768)
    )
    kernel = w["patch_embed.proj.weight"].reshape(width, 768)
    x = patches @ kernel.T + w["patch_embed.proj.bias"]
    x = torch.cat([w["cls_token"].expand(count, 1, width), x], dim=1) + w["pos_embed"]
    tokens, attention = [], []
    for block in range(12):
        name = f"blocks.{block}"
        qkv = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv")
        q, k, v = qkv.reshape(count, 197, 3, HEADS, size).permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(-1, -2) / math.sqrt(size)
        logits = torch.exp(logits - logits.amax(-1, keepdim=True))
        probabilities = logits / logits.sum(-1, keepdim=True)
        mixed = (probabilities @ v).transpose(1, 2).reshape(count, 197, width)
        x = x + linear(mixed, f"{name}.attn.proj")
        hidden = linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + linear(hidden, f"{name}.mlp.fc2")
        tokens.append(x)
        attention.append(probabilities)
    return tokens, attention


def watched(module: torch.nn.Module, images: torch.Tensor):
    """The same of the module we load, by plain forward hooks."""
    tokens, attention, handles = [], [], []
    for block in module.blocks:
        block.attn.fused_attn = False
        handles.append(block.register_forward_hook(lambda m, i, out: tokens.append(out)))
        handles.append(block.attn.attn_drop.register_forward_hook(lambda m, i, out: attention.append(out)))
    with torch.inference_mode():
        module(images)
    for handle in handles:
        handle.remove()
    return tokens, attention


def assert_same(module, state):
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(5))
    expected, found = reference(state, images), watched(module, images)
    for want, have in zip(expected, found, strict=True):
        assert len(have) == 12
        for layer in range(12):
            assert (have[layer] - want[layer]).abs().max() < 1e-5, f"block {layer}"
    spread = expected[1][-1][:, :, 1:, 1:].amax(-1).mean() * 197
    assert spread > 2, "the attention is uniform: it would show no difference"


@pytest.fixture(scope="module", params=["vit-s16", "vit-b16"])
def published(request, tmp_path_factory):
    """(variant, base weights, momentum weights, path)"""
    width = WIDTHS[request.param]
    base, momentum = encoder(width, 1), encoder(width, 2)
    path = tmp_path_factory.mktemp(request.param) / "checkpoint.pth.tar"
    torch.save(checkpoint(base, momentum), path)
    yield request.param, base, momentum, path
    path.unlink()


def test_the_published_layout_gives_the_reference_tokens_and_attention(published):
    variant, base, _, path = published
    model = load_model(f"moco:{variant}@{path}", Catalog())
    assert_same(model.module, base)
    assert model.weights.kind == "file" and len(model.weights.sha256) == 64
    assert len(model.accounting.used) == len(base)
    assert "module.predictor.0.weight" in model.accounting.ignored
    assert "module.base_encoder.head.0.weight" in model.accounting.ignored
    assert model.preprocessing.mean == (0.485, 0.456, 0.406)
    assert model.preprocessing.interpolation == "bilinear"


def test_the_momentum_encoder_is_the_other_one(published):
    variant, _, momentum, path = published
    model = load_model(f"moco:{variant}:encoder=momentum@{path}", Catalog())
    assert torch.equal(model.module.blocks[3].attn.qkv.weight, momentum["blocks.3.attn.qkv.weight"])
    assert_same(model.module, momentum)


def test_heads_and_norms():
    for variant, width in WIDTHS.items():
        module = load_model(f"moco:{variant}@random", Catalog()).module
        assert [block.attn.num_heads for block in module.blocks] == [12] * 12
        assert {m.eps for m in module.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}
        assert torch.allclose(module.pos_embed, POSITIONS[width], atol=1e-6)
        assert sum(1 for _ in module.state_dict()) == len(encoder_shapes(width))


@pytest.fixture
def small(tmp_path):
    """A ViT-S checkpoint to spoil: (content, base weights, save)"""
    base = encoder(384, 1)
    content = checkpoint(base, base)

    def save(changed=None):
        path = tmp_path / "changed.pth.tar"
        torch.save(content if changed is None else changed, path)
        return path

    return content, base, save


def test_a_linear_probe_file_is_taken_for_what_it_is(small):
    _, base, save = small
    state = {f"module.{key}": value for key, value in base.items()}
    state |= {"module.head.weight": torch.zeros(1000, 384), "module.head.bias": torch.zeros(1000)}
    path = save({"epoch": 90, "arch": "vit_small", "state_dict": state, "best_acc1": torch.tensor(73.2)})
    model = load_model(f"moco:vit-s16@{path}", Catalog())
    assert torch.equal(model.module.norm.weight, base["norm.weight"])
    assert model.accounting.ignored == ("module.head.weight", "module.head.bias")
    assert "linear-probe" in model.accounting.layout
    with pytest.raises(WeightsError, match=r"linear-probe.*encoder=base"):
        load_model(f"moco:vit-s16:encoder=momentum@{path}", Catalog())
    # and it can't be loaded into a ViT-S of six heads, which its keys and shapes fit
    from probekit.models.timm import build

    with pytest.raises(WeightsError, match="12 heads; this model has 6"):
        build("vit_small_patch16_224", weights=path)


def test_a_bare_state_dict_saved_as_our_hint_says(small, tmp_path):
    content, base, _ = small
    for name, state in (("with-prefixes", content["state_dict"]), ("stripped", base)):
        path = tmp_path / f"{name}.safetensors"
        save_file({key: value.clone() for key, value in state.items()}, path)
        module = load_model(f"moco:vit-s16@{path}", Catalog()).module
        assert torch.equal(module.blocks[11].mlp.fc2.bias, base["blocks.11.mlp.fc2.bias"])


def test_a_file_of_another_size_is_refused(small):
    _, _, save = small
    with pytest.raises(WeightsError, match=r"doesn't fit.*of another shape.*\(1, 1, 384\).*\(1, 1, 768\)"):
        load_model(f"moco:vit-b16@{save()}", Catalog())


def test_missing_and_extra_keys_are_refused_by_name(small):
    content, _, save = small
    gone = content["state_dict"].pop("module.base_encoder.blocks.7.attn.proj.bias")
    with pytest.raises(WeightsError, match=r"1 missing \('blocks.7.attn.proj.bias' \(384\)\)"):
        load_model(f"moco:vit-s16@{save()}", Catalog())
    content["state_dict"]["module.base_encoder.blocks.7.attn.proj.bias"] = gone
    content["state_dict"]["module.base_encoder.blocks.12.norm1.bias"] = gone
    content["state_dict"]["module.queue"] = gone
    with pytest.raises(
        WeightsError, match=r"2 unexpected \('blocks.12.norm1.bias' \(384\), 'module.queue'\)"
    ):
        load_model(f"moco:vit-s16@{save()}", Catalog())


def test_a_truncated_file_and_one_that_runs_code_are_refused(small, tmp_path):
    content, _, save = small
    path = save()
    path.write_bytes(path.read_bytes()[:-100_000])
    with pytest.raises(WeightsError, match="cut short"):
        load_model(f"moco:vit-s16@{path}", Catalog())

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    content["args"] = Payload()
    with pytest.raises(WeightsError, match=r"needs code to load \('posix.system'\)"):
        load_model(f"moco:vit-s16@{save()}", Catalog())
    assert not (tmp_path / "ran").exists()


def test_another_image_size_interpolates_the_position_embedding(small):
    _, base, save = small
    path = save()
    model = load_model(f"moco:vit-s16@{path}", Catalog(), image_size=(224, 448))
    assert model.preprocessing.size == (224, 448)
    assert model(torch.zeros(1, 3, 224, 448)).shape == (1, 384)
    grid = base["pos_embed"][:, 1:].reshape(1, 14, 14, 384).permute(0, 3, 1, 2)
    wide = torch.nn.functional.interpolate(grid, size=(14, 28), mode="bicubic", antialias=True)
    assert torch.allclose(model.module.pos_embed[0, 1:], wide[0].flatten(1).T, atol=1e-5)
    assert not model.module.pos_embed[0, 0].any()
    with pytest.raises(UsageError, match="don't tile 230 x 224"):
        load_model(f"moco:vit-s16@{path}", Catalog(), image_size=(230, 224))


def test_untrained_weights_depend_on_the_seed_alone():
    state = torch.random.get_rng_state()
    first, again, other = (
        load_model("moco:vit-s16@random", Catalog(), seed=seed).weights for seed in (1, 1, 2)
    )
    assert first == again and first.kind == "random"
    assert first.sha256 != other.sha256
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's generator moved"


def test_what_the_entries_say():
    specs = probekit_models()
    assert [spec.full_name for spec in specs if spec.default] == ["moco:vit-b16"]
    for spec in specs:
        assert (spec.heads, spec.layers, spec.objective) == (12, 12, "CL")
        assert "non-commercial" in spec.weights.licence and spec.citation
        assert spec.weights.url.endswith(f"vit-{spec.variant[4]}-300ep.pth.tar")
    assert len({spec.weights.filename for spec in specs}) == len(specs)
