"""The watcher over Hugging Face's vision models, eager and sdpa, built small and offline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from probekit.errors import WatchError
from probekit.watch import Visitor, Watcher

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
SIZE = {"image_size": 64, "patch_size": 16}
GRID = (4, 4)

MODELS: dict[str, tuple[str, str, dict[str, Any], int]] = {
    # name: model, config, options, prefix tokens
    "vit": ("ViTModel", "ViTConfig", SMALL | SIZE, 1),
    "deit": ("DeiTModel", "DeiTConfig", SMALL | SIZE, 2),
    "beit own bias": ("BeitModel", "BeitConfig", SMALL | SIZE | {"use_relative_position_bias": True}, 1),
    "beit shared bias": (
        "BeitModel",
        "BeitConfig",
        SMALL | SIZE | {"use_shared_relative_position_bias": True, "use_mean_pooling": False},
        1,
    ),
    "dinov2": ("Dinov2Model", "Dinov2Config", SMALL | SIZE, 1),
    "dinov2 registers": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        SMALL | SIZE | {"num_register_tokens": 4},
        5,
    ),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", SMALL | SIZE | {"num_register_tokens": 4}, 5),
    "i-jepa": ("IJepaModel", "IJepaConfig", SMALL | SIZE, 0),
    "data2vec": (
        "Data2VecVisionModel",
        "Data2VecVisionConfig",
        SMALL | SIZE | {"use_relative_position_bias": True},
        1,
    ),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", SMALL | SIZE, 1),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", SMALL | SIZE, 0),
}


def build(model: str, config: str, options: dict[str, Any], implementation: str) -> nn.Module:
    torch.manual_seed(0)
    made = getattr(transformers, config)(**options)
    made._attn_implementation = implementation
    module = getattr(transformers, model)(made).eval()
    with torch.no_grad():
        for name, p in module.named_parameters():
            if any(part in name for part in ("query", "key", "q_proj", "k_proj")) and p.dim() == 2:
                p *= 12
            elif "relative_position_bias_table" in name:
                p.normal_()
    return module


def layers_of(watcher: Watcher, images: Tensor, field: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def visit(layer) -> None:
        found[layer.info.name] = getattr(layer, field)

    watcher.run(images, [Visitor(frozenset({field}), visit)])
    return found


def assert_untouched(
    module: nn.Module, watcher: Watcher, images: Tensor, forward: Callable | None = None
) -> None:
    forward = forward or (lambda m, x: m(x))
    with torch.no_grad():
        expected = forward(module, images)
    found = watcher.run(images, [])
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert torch.equal(found[name].nan_to_num(), value.nan_to_num()), name  # a loss over no patches


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_attention_is_what_eager_says(name: str, implementation: str) -> None:
    model, config, options, prefix = MODELS[name]
    module = build(model, config, options, implementation)
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    watcher = Watcher(module, images)
    assert_untouched(module, watcher, images)
    assert len(watcher.anatomy.layers) == 2
    for info in watcher.anatomy.layers:
        assert (info.grid, info.stride, info.prefix, info.heads) == (GRID, (16, 16), prefix, 3)
        assert info.sites == ("in", "mid", "out")
        assert info.kind == ("fused" if implementation == "sdpa" else "explicit")
    assert len(watcher.site_rows()) == 5

    eager = build(model, config, options, "eager")
    with torch.no_grad():
        expected = eager(images, output_attentions=True, output_hidden_states=True)
    maps = layers_of(watcher, images, "attention_full")
    assert len(maps) == len(expected.attentions) == 2
    for found, own in zip(maps.values(), expected.attentions, strict=True):
        assert own.amax() > 0.3, "attention is peaked"
        torch.testing.assert_close(found, own, rtol=0, atol=2e-5)
    cut = [a[:, :, prefix:, prefix:] for a in expected.attentions]
    for found, own in zip(layers_of(watcher, images, "attention").values(), cut, strict=True):
        torch.testing.assert_close(found, own / own.sum(-1, keepdim=True), rtol=0, atol=2e-5)

    before, between, *_ = (h[:, prefix:] for h in expected.hidden_states)
    ins, outs = (list(layers_of(watcher, images, f"tokens_{n}").values()) for n in ("in", "out"))
    torch.testing.assert_close(ins[0], before, rtol=0, atol=1e-5)
    torch.testing.assert_close(ins[1], between, rtol=0, atol=1e-5)
    torch.testing.assert_close(outs[0], between, rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_swin(implementation: str) -> None:
    options = {
        "image_size": 64,
        "patch_size": 4,
        "embed_dim": 24,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 4,
    }
    module = build("SwinModel", "SwinConfig", options, implementation)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    watcher = Watcher(module, images)
    assert_untouched(module, watcher, images)
    facts = [(i.heads, i.grid, i.stride, i.windows, i.window, i.stage) for i in watcher.anatomy.layers]
    assert facts == [
        (2, (16, 16), (4, 4), 16, "4x4", 0),
        (2, (16, 16), (4, 4), 16, "4x4, masked regions", 0),
        (4, (8, 8), (8, 8), 4, "4x4", 1),
        (4, (8, 8), (8, 8), 4, "4x4, masked regions", 1),
    ]
    assert [g.size for g in watcher.anatomy.layers[1].groups] == [4, 8, 16]
    eager = build("SwinModel", "SwinConfig", options, "eager")
    other = Watcher(eager, images)
    ours, theirs = ({}, {})
    for store, w in ((ours, watcher), (theirs, other)):

        def visit(layer, store=store) -> None:
            store[layer.info.name] = [part.attention for part in layer.windows()]

        w.run(images, [Visitor(frozenset({"attention"}), visit)])
    for name, parts in ours.items():
        for a, b in zip(parts, theirs[name], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-5)

    maps: list[Tensor] = []  # its own output_attentions don't line up with its blocks
    for m in eager.modules():
        if type(m).__name__ in ("SwinAttention", "SwinSelfAttention"):
            m.register_forward_hook(lambda m, args, out: maps.append(out[1]))
    with torch.no_grad():
        eager(images, output_attentions=True)
    for info, own in zip(watcher.anatomy.layers, maps, strict=True):
        own = own.unflatten(0, (2, -1))
        for part, group in zip(ours[info.name], info.groups, strict=True):
            found = part.unflatten(0, (2, -1))
            for g, (w, places) in enumerate(zip(group.windows, group.queries, strict=True)):
                expected = own[:, w][:, :, places][..., places]
                torch.testing.assert_close(found[:, g], expected, rtol=0, atol=2e-5)


def masked_autoencoder(implementation: str) -> tuple[nn.Module, Callable]:
    decoder = {
        "decoder_hidden_size": 32,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 64,
        "mask_ratio": 0.0,
    }
    module = build("ViTMAEForPreTraining", "ViTMAEConfig", SMALL | SIZE | decoder, implementation)

    def forward(m: nn.Module, images: Tensor) -> Any:
        noise = torch.arange(16.0).expand(len(images), 16)
        return m(images, noise=noise)

    return module, forward


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_masked_autoencoder_has_an_encoder_and_a_decoder(implementation: str) -> None:
    module, forward = masked_autoencoder(implementation)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    watcher = Watcher(module, images, forward=forward)
    assert_untouched(module, watcher, images, forward)
    facts = [(i.part, i.heads, i.prefix, i.grid, i.stride, i.width) for i in watcher.anatomy.layers]
    encoder, decoder = ("encoder", 3, 1, GRID, (16, 16), 48), ("decoder", 2, 1, GRID, (16, 16), 32)
    assert facts == [encoder, encoder, decoder]
    assert [(r.part, r.site) for r in watcher.site_rows()] == [
        ("encoder", "embed"), *[("encoder", "mid"), ("encoder", "out")] * 2,
        ("decoder", "embed"), ("decoder", "mid"), ("decoder", "out"),
    ]  # fmt: skip
    eager, _ = masked_autoencoder("eager")
    with torch.no_grad():
        noise = torch.arange(16.0).expand(2, 16)
        expected = eager(images, noise=noise, output_attentions=True).attentions
    found = list(layers_of(watcher, images, "attention_full").values())
    for ours, own in zip(found, expected, strict=False):
        torch.testing.assert_close(ours, own, rtol=0, atol=2e-5)
    assert len(found) == 3


def test_declared_parts_name_the_decoder() -> None:
    module, forward = masked_autoencoder("sdpa")
    parts = {"decoder": "generator"}
    watcher = Watcher(module, torch.randn(2, 3, 64, 64), forward=forward, declared_parts=parts)
    assert [i.part for i in watcher.anatomy.layers] == ["encoder", "encoder", "generator"]


def test_masked_tokens_form_no_grid() -> None:
    module, _ = masked_autoencoder("sdpa")
    module.vit.embeddings.config.mask_ratio = 0.75

    def forward(m: nn.Module, images: Tensor) -> Any:
        return m.vit(images, noise=torch.arange(16.0).expand(len(images), 16))

    info = Watcher(module, torch.randn(2, 3, 64, 64), forward=forward).anatomy.layers[0]
    assert info.tokens == 4
    assert info.prefix == 1
    assert info.grid == (1, 4), "the first four patches are one row"


def test_random_order_of_tokens_is_refused() -> None:
    module, _ = masked_autoencoder("sdpa")
    with pytest.raises(WatchError, match="draws random numbers") as refusal:
        Watcher(module, torch.randn(2, 3, 64, 64))
    assert "forward" in refusal.value.hint


def test_flex_attention_is_refused() -> None:
    module = build("ViTModel", "ViTConfig", SMALL | SIZE, "sdpa")
    module.config._attn_implementation = "flex_attention"
    with pytest.raises(WatchError, match="attention implementation 'flex_attention'") as refusal:
        Watcher(module, torch.randn(2, 3, 64, 64))
    assert refusal.value.hint == "model.set_attn_implementation('sdpa')"
    module.set_attn_implementation("sdpa")
    assert len(Watcher(module, torch.randn(2, 3, 64, 64)).anatomy.layers) == 2
