"""The published layouts of DINO and DINOv2 rebuilt with random weights, against a forward in plain torch."""

from __future__ import annotations

import importlib
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from probekit_dino.plugin import probekit_models

from probekit.errors import UsageError, WeightsError
from probekit.models.model import load_model
from probekit.names import parse_model, read_options
from probekit.watch import Visitor, Watcher

SHAPES = {"s": (384, 6, 12), "b": (768, 12, 12), "l": (1024, 16, 24)}


class Catalog:
    """The two calls `load_model` makes, over this pack's specs alone."""

    def model(self, ref):
        ref = parse_model(ref)
        spec = next(s for s in probekit_models() if s.variant == ref.variant)
        options = read_options(spec.options, ref.options, ref.name)
        return SimpleNamespace(
            spec=spec, pack="dino", version="0", ref=ref, options=options, variant=spec.variant
        )

    def resolve_target(self, entry):
        module, _, attribute = entry.spec.target.partition(":")
        return getattr(importlib.import_module(module), attribute)


def shapes(width: int, patch: int, tokens: int, registers: int | None = None, layers: int = 12) -> dict:
    """Keys of the backbone files (METRICS.md part II). `registers` None: DINO; 0 and 4: DINOv2."""
    found: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, tokens, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    if registers is not None:
        found["mask_token"] = (1, width)
    if registers:
        found["register_tokens"] = (1, registers, width)
    for block in range(layers):
        name = f"blocks.{block}"
        found |= {
            f"{name}.norm1.weight": (width,),
            f"{name}.norm1.bias": (width,),
            f"{name}.attn.qkv.weight": (3 * width, width),
            f"{name}.attn.qkv.bias": (3 * width,),
            f"{name}.attn.proj.weight": (width, width),
            f"{name}.attn.proj.bias": (width,),
            f"{name}.norm2.weight": (width,),
            f"{name}.norm2.bias": (width,),
            f"{name}.mlp.fc1.weight": (4 * width, width),
            f"{name}.mlp.fc1.bias": (4 * width,),
            f"{name}.mlp.fc2.weight": (width, 4 * width),
            f"{name}.mlp.fc2.bias": (width,),
        }
        if registers is not None:
            found |= {f"{name}.ls1.gamma": (width,), f"{name}.ls2.gamma": (width,)}
    return found


def weights(seed: int, **of) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in shapes(**of).items():
        scale = 0.04 if ".qkv.weight" in key else 0.2 if "token" in key or "pos" in key else 0.02
        centre = 1.0 if "norm" in key and "weight" in key else 0.5 if "gamma" in key else 0.0
        state[key] = torch.randn(shape, generator=generator) * scale + centre
    return state


def positions(state: dict, rows: int, columns: int) -> torch.Tensor:
    """The position embedding as the authors' `interpolate_pos_encoding` makes it at each forward pass."""
    table = state["pos_embed"].float()
    side = int(math.sqrt(table.shape[1] - 1))
    if (rows, columns) == (side, side):
        return table.double()
    square = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if "register_tokens" in state:
        square = F.interpolate(square, mode="bicubic", antialias=True, size=(rows, columns))
    else:
        scale = (float(rows + 0.1) / side, float(columns + 0.1) / side)
        square = F.interpolate(square, mode="bicubic", scale_factor=scale)
    assert square.shape[-2:] == (rows, columns)
    patches = square.permute(0, 2, 3, 1).reshape(1, rows * columns, -1)
    return torch.cat([table[:, :1], patches], dim=1).double()


def reference(state: dict[str, torch.Tensor], images: torch.Tensor, heads: int):
    """Tokens after each block and attention of each block, float64, from the file's tensors."""
    w = {key: value.double() for key, value in state.items()}
    width, _, patch, _ = w["patch_embed.proj.weight"].shape
    count, size = len(images), width // heads
    rows, columns = images.shape[-2] // patch, images.shape[-1] // patch

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scale = torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)
        return centred / scale * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    cut = images.double().reshape(count, 3, rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5)
    x = cut.reshape(count, rows * columns, -1) @ w["patch_embed.proj.weight"].reshape(width, -1).T
    x = torch.cat([w["cls_token"].expand(count, 1, width), x + w["patch_embed.proj.bias"]], dim=1)
    x = x + positions(state, rows, columns)
    if "register_tokens" in w:
        x = torch.cat([x[:, :1], w["register_tokens"].expand(count, -1, width), x[:, 1:]], dim=1)
    tokens, attention = [], []
    block = 0
    while (name := f"blocks.{block}") + ".norm1.weight" in w:
        qkv = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv")
        q, k, v = qkv.reshape(count, -1, 3, heads, size).permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(-1, -2) / math.sqrt(size)
        logits = torch.exp(logits - logits.amax(-1, keepdim=True))
        probabilities = logits / logits.sum(-1, keepdim=True)
        mixed = linear((probabilities @ v).transpose(1, 2).reshape(x.shape), f"{name}.attn.proj")
        x = x + mixed * w.get(f"{name}.ls1.gamma", 1.0)
        hidden = linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + linear(hidden, f"{name}.mlp.fc2") * w.get(f"{name}.ls2.gamma", 1.0)
        tokens.append(x)
        attention.append(probabilities)
        block += 1
    return tokens, attention


def watched(model, images):
    """The same of the model we load, prefix tokens first, as a metric would see it."""
    tokens, attention = [], []

    def see(layer):
        tokens.append(torch.cat([layer.prefix_tokens("tokens_out"), layer.tokens_out], dim=1))
        attention.append(layer.attention_full)

    watcher = Watcher(model.module, images, forward=model.forward)
    watcher.run(images, [Visitor(frozenset({"tokens_out", "attention_full"}), see)])
    return watcher.anatomy, tokens, attention


def assert_same(model, state, heads, size=(224, 224)):
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(5))
    anatomy, *found = watched(model, images)
    expected = reference(state, images, heads)
    for want, have in zip(expected, found, strict=True):
        assert len(have) == len(want) == 12
        for layer in range(12):
            assert have[layer].shape == want[layer].shape
            assert (have[layer] - want[layer]).abs().max() < 1e-5, f"block {layer}"
    last = expected[1][-1]
    assert last.amax(-1).mean() * last.shape[-1] > 2, "the attention is uniform: it would show no difference"
    return anatomy


def test_a_backbone_file_gives_the_reference_tokens_and_attention(tmp_path):
    state = weights(1, width=384, patch=16, tokens=197)
    torch.save(state, tmp_path / "dino_deitsmall16_pretrain.pth")
    model = load_model(f"dino:vit-s16@{tmp_path}/dino_deitsmall16_pretrain.pth", Catalog())
    anatomy = assert_same(model, state, heads=6)
    assert {(layer.heads, layer.prefix, layer.grid, layer.stride) for layer in anatomy.layers} == {
        (6, 1, (14, 14), (16, 16))
    }
    assert len(model.accounting.used) == len(state) and not model.accounting.ignored
    assert {m.eps for m in model.module.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}


def test_another_size_resamples_the_positions_as_the_authors_do(tmp_path):
    state = weights(2, width=384, patch=8, tokens=785)
    torch.save(state, tmp_path / "w.pth")
    model = load_model(f"dino:vit-s8@{tmp_path}/w.pth", Catalog(), image_size=(96, 128))
    anatomy = assert_same(model, state, heads=6, size=(96, 128))
    assert (anatomy.layers[0].grid, anatomy.layers[0].stride) == ((12, 16), (8, 8))
    assert model.preprocessing.size == (96, 128)
    with pytest.raises(UsageError, match="8 x 8 px, which don't tile 100 x 96"):
        load_model("dino:vit-s8@random", Catalog(), image_size=(100, 96))


def head(width: int) -> dict[str, torch.Tensor]:
    """The projection head: thin, since nothing reads it; the last layer is weight-normalised."""
    state = {f"head.mlp.{i}.{name}": torch.zeros(2) for i in (0, 2, 4) for name in ("weight", "bias")}
    return state | {
        "head.last_layer.weight_g": torch.ones(4, 1),
        "head.last_layer.weight_v": torch.ones(4, 2),
    }


@pytest.fixture
def full(tmp_path):
    """(teacher, student, path) of a full checkpoint: the student came out of DistributedDataParallel."""
    teacher, student = (weights(seed, width=384, patch=16, tokens=197) for seed in (3, 4))
    networks = {
        "teacher": {f"backbone.{key}": value for key, value in teacher.items()} | head(384),
        "student": {f"module.backbone.{key}": value for key, value in student.items()}
        | {f"module.{key}": value for key, value in head(384).items()},
    }
    rest = {"optimizer": {"state": {}}, "epoch": 800, "dino_loss": {"center": torch.zeros(1, 4)}}
    path = tmp_path / "dino_deitsmall16_pretrain_full_checkpoint.pth"
    torch.save(networks | rest, path)
    return teacher, student, path


def test_full_checkpoints_hold_two_networks(full):
    teacher, student, path = full
    for text, state, name in (
        ("dino:vit-s16", teacher, "teacher"),
        ("dino:vit-s16:network=student", student, "student"),
    ):
        model = load_model(f"{text}@{path}", Catalog())
        assert torch.equal(model.module.blocks[7].attn.qkv.weight, state["blocks.7.attn.qkv.weight"])
        assert model.accounting.layout == f"DINO full checkpoint ({name})"
        assert len(model.accounting.used) == len(state) and len(model.accounting.ignored) == 8
    content = torch.load(path)
    content["teacher"] = {f"module.{key}": value for key, value in content["teacher"].items()}  # of a ResNet
    torch.save(content, path)
    model = load_model(f"dino:vit-s16@{path}", Catalog())
    assert torch.equal(model.module.pos_embed, teacher["pos_embed"])


def test_a_backbone_file_is_not_the_student(full, tmp_path):
    teacher, _, _ = full
    torch.save(teacher, tmp_path / "backbone.pth")
    with pytest.raises(WeightsError, match="is a DINO backbone for 'dino:vit-s16:network=teacher', not for"):
        load_model(f"dino:vit-s16:network=student@{tmp_path}/backbone.pth", Catalog())


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_at_224_gives_the_reference_tokens_and_attention(tmp_path, registers):
    state = weights(5, width=384, patch=14, tokens=1370, registers=registers)
    torch.save(state, tmp_path / "w.pth")
    variant = f"v2-s14{'-reg' if registers else ''}"
    model = load_model(f"dino:{variant}@{tmp_path}/w.pth", Catalog())
    anatomy = assert_same(model, state, heads=6)
    assert {(layer.heads, layer.prefix, layer.grid, layer.stride) for layer in anatomy.layers} == {
        (6, 1 + registers, (16, 16), (14, 14))
    }
    assert model.accounting.ignored == ("mask_token",) and len(model.accounting.used) == len(state) - 1
    other = f"v2-s14{'' if registers else '-reg'}"
    with pytest.raises(WeightsError, match=r"doesn't fit.*DINOv2") as caught:
        load_model(f"dino:{other}@{tmp_path}/w.pth", Catalog())
    assert "_reg4_" in caught.value.hint


def test_at_518_the_files_positions_are_untouched(tmp_path):
    state = weights(6, width=384, patch=14, tokens=1370, registers=4)
    torch.save(state, tmp_path / "w.pth")
    module = load_model(f"dino:v2-s14-reg@{tmp_path}/w.pth", Catalog(), image_size=(518, 518)).module
    assert torch.equal(module.pos_embed, state["pos_embed"][:, 1:])
    assert torch.equal(module.cls_token, state["cls_token"] + state["pos_embed"][:, :1])
    assert torch.equal(module.reg_token, state["register_tokens"])
    state["pos_embed"] = state["pos_embed"][:, 1:]  # no class token's position
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"of another shape \('pos_embed' \(1, 1368, 384\)"):
        load_model(f"dino:v2-s14-reg@{tmp_path}/w.pth", Catalog(), image_size=(518, 518))


@pytest.mark.parametrize("variant", [spec.variant for spec in probekit_models()])
def test_every_variant_builds_and_says_what_it_is(variant):
    spec = next(s for s in probekit_models() if s.variant == variant)
    with torch.device("meta"):
        module = Catalog().resolve_target(SimpleNamespace(spec=spec))(variant)
    size = variant.split("-")[1][0]
    patch = int(variant.split("-")[1][1:])
    width, heads, layers = SHAPES[size]
    assert (
        (spec.heads, spec.layers) == (heads, layers) == (module.blocks[0].attn.num_heads, len(module.blocks))
    )
    assert module.patch_embed.patch_size == (patch, patch) and module.embed_dim == width
    assert module.num_prefix_tokens == (5 if variant.endswith("-reg") else 1)
    registers = None if variant.startswith("vit") else 4 if variant.endswith("-reg") else 0
    expected = shapes(width, patch, (224 // patch) ** 2 + 1, registers, layers)
    expected.pop("mask_token", None)
    if registers:
        expected["reg_token"] = expected.pop("register_tokens")
        expected["pos_embed"] = (1, 256, width)
    assert {key: tuple(value.shape) for key, value in module.state_dict().items()} == expected
    assert spec.objective == ("CL" if registers is None else "hybrid")
    assert spec.weights.licence == "Apache-2.0" and spec.citation
    assert spec.weights.url.endswith(f"/{spec.weights.filename}")
    assert (spec.preprocessing.interpolation, spec.preprocessing.crop_pct) == ("bicubic", 0.875)
    assert spec.preprocessing.mean == (0.485, 0.456, 0.406)


def test_random_weights_come_from_the_seed():
    one, two = (load_model("dino:v2-s14-reg@random", Catalog(), seed=seed).weights for seed in (0, 1))
    assert one.kind == "random" and one.sha256 != two.sha256
