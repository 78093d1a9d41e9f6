"""The published layout of MoCo v3 rebuilt with random weights, against a reference forward in plain torch."""

from __future__ import annotations

import math
import os

import pytest
import torch
from moco_layout import POSITIONS, SHAPES, Catalog, checkpoint, encoder, encoder_shapes, reference
from probekit_moco.models import build
from probekit_moco.plugin import probekit_models
from safetensors.torch import save_file

from probekit.errors import UsageError, WeightsError
from probekit.models.checkpoints import landing
from probekit.models.model import load_model
from probekit.watch import Visitor, Watcher


def watched(module: torch.nn.Module, images: torch.Tensor):
    """The same of the module we load, as metrics see it."""
    found = []

    def visit(layer):
        sites = [
            torch.cat([layer.prefix_tokens(f"tokens_{s}"), getattr(layer, f"tokens_{s}")], 1)
            for s in ("mid", "out")
        ]
        found.append((*sites, layer.attention_full))

    needs = frozenset({"tokens_mid", "tokens_out", "attention_full"})
    Watcher(module, images).run(images, [Visitor(needs, visit)])
    return found


def assert_same(variant, module, state):
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(5))
    expected, found = reference(variant, state, images), watched(module, images)
    assert len(found) == len(expected) == SHAPES[variant].depth
    for layer, (want, have) in enumerate(zip(expected, found, strict=True)):
        for name, a, b in zip(("tokens after attention", "tokens", "attention"), want, have, strict=True):
            assert a.shape == b.shape and (a - b).abs().max() < 1e-5, f"{name} of block {layer}"
    spread = expected[-1][2][:, :, 1:, 1:].amax(-1).mean() * 197
    assert spread > 2, "the attention is uniform: it would show no difference"


@pytest.fixture(scope="module", params=["vit-s16", "vit-b16", "conv-s"])
def published(request, tmp_path_factory):
    """(variant, base weights, momentum weights, path)"""
    base = encoder(request.param, 1)
    momentum = base | {"norm.bias": base["norm.bias"] + 1}  # shared tensors are written once
    if request.param == "vit-s16":
        momentum = encoder("vit-s16", 2)
    path = tmp_path_factory.mktemp(request.param) / "checkpoint.pth.tar"
    torch.save(checkpoint(base, momentum), path)
    yield request.param, base, momentum, path
    path.unlink()


def test_the_published_layout_gives_the_reference_tokens_and_attention(published):
    variant, base, _, path = published
    model = load_model(f"moco:{variant}@{path}", Catalog())
    assert_same(variant, model.module, base)
    assert model.weights.kind == "file" and len(model.weights.sha256) == 64
    assert len(model.accounting.used) == len(base)
    assert "module.predictor.0.weight" in model.accounting.ignored
    assert "module.base_encoder.head.0.weight" in model.accounting.ignored
    assert model.preprocessing.mean == (0.485, 0.456, 0.406)
    assert model.preprocessing.interpolation == "bilinear"


def test_the_momentum_encoder_is_the_other_one(published):
    variant, _, momentum, path = published
    model = load_model(f"moco:{variant}:encoder=momentum@{path}", Catalog())
    loaded = model.module.state_dict()
    assert loaded.keys() == momentum.keys()
    assert all(torch.equal(loaded[key], value) for key, value in momentum.items())


@pytest.mark.parametrize("variant", ["vit-ti16", "conv-b"])
def test_an_own_pre_training_gives_the_reference_tokens_and_attention(variant, tmp_path):
    base = encoder(variant, 3)
    path = tmp_path / "checkpoint_0099.pth.tar"
    torch.save({"epoch": 100, "state_dict": {f"module.base_encoder.{k}": v for k, v in base.items()}}, path)
    model = load_model(f"moco:{variant}@{path}", Catalog())
    assert_same(variant, model.module, base)
    with pytest.raises(WeightsError, match=f"no weights are published for 'moco:{variant}'"):
        load_model(f"moco:{variant}", Catalog())


def test_the_large_networks_keys():
    with torch.device("meta"):  # its weights would only take time
        module = build("vit-l16")
    assert {key: tuple(value.shape) for key, value in module.state_dict().items()} == encoder_shapes(
        "vit-l16"
    )
    assert [block.attn.num_heads for block in module.blocks] == [16] * 24
    spec = next(spec for spec in probekit_models() if spec.variant == "vit-l16")
    file = {
        f"module.base_encoder.{k}": torch.empty(s, device="meta")
        for k, s in encoder_shapes("vit-l16").items()
    }
    assert landing(module, {"state_dict": file}, spec.weights.layout) == len(file)


@pytest.mark.parametrize("variant", [variant for variant in SHAPES if variant != "vit-l16"])
def test_keys_heads_norms_and_positions(variant):
    shape = SHAPES[variant]
    module = load_model(f"moco:{variant}@random", Catalog()).module
    found = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    assert found == encoder_shapes(variant)
    assert [block.attn.num_heads for block in module.blocks] == [shape.heads] * shape.depth
    assert {m.eps for m in module.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}
    assert torch.allclose(module.pos_embed, POSITIONS[shape.width], atol=1e-6)
    # MoCo's initialisation treats q, k and v as three square matrices
    bound = math.sqrt(6 / (2 * shape.width))
    assert float(module.blocks[0].attn.qkv.weight.detach().abs().max()) == pytest.approx(bound, rel=1e-3)
    assert float(module.cls_token.detach().abs().max()) < 1e-5


def test_a_stem_and_a_patch_projection_are_told_apart(small, tmp_path):
    path = tmp_path / "conv.pth.tar"
    state = {f"module.base_encoder.{k}": v for k, v in encoder("conv-s", 1).items()}
    torch.save({"state_dict": state}, path)
    with pytest.raises(
        WeightsError, match=r"missing \('patch_embed.proj.weight'.*unexpected \('patch_embed.proj.0.weight'"
    ):
        load_model(f"moco:vit-s16@{path}", Catalog())
    _, _, save = small
    with pytest.raises(WeightsError, match=r"missing \('patch_embed.proj.0.weight'") as caught:
        load_model(f"moco:conv-s@{save()}", Catalog())
    assert "conv-s" in caught.value.hint


@pytest.fixture
def small(tmp_path):
    """A ViT-S checkpoint to spoil: (content, base weights, save)"""
    base = encoder("vit-s16", 1)
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
    from probekit.models import timm

    with pytest.raises(WeightsError, match="12 heads; this model has 6"):
        timm.build("vit_small_patch16_224", weights=path)


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
    mini, *specs = probekit_models()
    assert mini.full_name == "moco:mini" and mini.default and mini.weights.bundled
    assert not any(spec.default for spec in specs)
    assert {spec.variant for spec in specs} == SHAPES.keys() and mini.published_as in SHAPES
    for spec in specs:
        shape = SHAPES[spec.variant]
        assert (spec.heads, spec.layers, spec.objective) == (shape.heads, shape.depth, "CL")
        assert spec.citation
        if spec.variant in ("vit-s16", "vit-b16"):
            assert "non-commercial" in spec.weights.licence
            assert spec.weights.url.endswith(f"vit-{spec.variant[4]}-300ep.pth.tar")
        else:
            assert spec.weights.url is None
    filenames = [spec.weights.filename for spec in specs if spec.weights.url]
    assert len(set(filenames)) == len(filenames)
