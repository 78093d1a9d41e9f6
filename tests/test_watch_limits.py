"""The watcher at its limits: masks, precision, wrappers, torch's own layers, and what has to be refused."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import probekit
from probekit.errors import DoesNotApply, MetricError, WatchError
from probekit.testing import TinyViT
from probekit.watch import Visitor, Watcher

WIDTH, HEADS, SIDE, PATCH = 24, 3, 4, 8
TOKENS = SIDE * SIDE
IMAGES = torch.randn(3, 3, SIDE * PATCH, SIDE * PATCH, generator=torch.Generator().manual_seed(2))


class Core:
    """Attention that remembers what it was called with; `how` computes it from q, k and v."""

    def __init__(self, how: Callable[..., Tensor] | None = None, **options: Any):
        self.how = how or (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=1.0, **options))
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.calls.append((q, k, v))
        return self.how(q, k, v)


def method(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).softmax(-1) @ v


def collect(watcher: Watcher, *fields: str, images: Tensor = IMAGES) -> tuple[list[dict[str, Tensor]], Any]:
    found: list[dict[str, Tensor]] = []

    def visit(layer) -> None:
        found.append({f: getattr(layer, f).clone() for f in fields})

    return found, watcher.run(images, [Visitor(frozenset(fields), visit)])


def watched(core: Core, *fields: str) -> list[tuple[dict[str, Tensor], tuple[Tensor, Tensor, Tensor]]]:
    """Fields of each layer of a ViT with `core`, and the q, k and v it had; the output is checked."""
    model = TinyViT(core)
    watcher = Watcher(model, IMAGES)
    core.calls.clear()
    found, out = collect(watcher, *fields)
    pairs = list(zip(found, core.calls, strict=True))
    with torch.no_grad():
        assert torch.equal(out, model(IMAGES))
    return pairs


# ---------------------------------------------------------------------- masks, heads, precision, batches


@pytest.mark.parametrize("kind", ["bool", "float", "per head", "causal"])
def test_masks(kind: str) -> None:
    n, generator = TOKENS + 1, torch.Generator().manual_seed(5)
    if kind == "causal":
        options, bias = {"is_causal": True}, torch.ones(n, n).tril().log()
    elif kind == "bool":
        mask = (torch.rand(n, n, generator=generator) > 0.3) | torch.eye(n, dtype=torch.bool)
        options, bias = {"attn_mask": mask}, mask.float().log()
    else:
        bias = torch.randn((1, HEADS, n, n) if kind == "per head" else (n, n), generator=generator)
        options = {"attn_mask": bias}
    for layer, (q, k, _) in watched(Core(**options), "attention", "attention_full"):
        own = (q @ k.mT + bias).softmax(-1)
        torch.testing.assert_close(layer["attention_full"], own, rtol=0, atol=2e-6)
        cut = own[:, :, 1:, 1:]
        torch.testing.assert_close(layer["attention"], cut / cut.sum(-1, keepdim=True), rtol=0, atol=2e-5)


@pytest.mark.parametrize("how", ["enable_gqa", "one head", "by hand"])
def test_fewer_heads_of_keys(how: str) -> None:
    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k[:, :1], v[:, :1]
        if how == "by hand":
            return method(q, k, v)
        return F.scaled_dot_product_attention(q, k, v, scale=1.0, enable_gqa=how == "enable_gqa")

    for layer, (q, k, v) in watched(Core(core), "attention_full", "q", "k", "v", "head_outputs"):
        own = (q @ k[:, :1].mT).softmax(-1)
        torch.testing.assert_close(layer["attention_full"], own, rtol=0, atol=2e-6)
        torch.testing.assert_close(layer["head_outputs"], (own @ v[:, :1])[:, :, 1:], rtol=0, atol=2e-6)
        assert torch.equal(layer["q"], q[:, :, 1:])
        assert torch.equal(layer["k"], k[:, :1, 1:].expand(-1, HEADS, -1, -1))
        assert torch.equal(layer["v"], v[:, :1, 1:].expand(-1, HEADS, -1, -1))


def test_grouped_heads_of_keys() -> None:
    core = Core(
        lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], scale=1.0, enable_gqa=True)
    )
    model = TinyViT(core, heads=4)
    watcher = Watcher(model, IMAGES)
    core.calls.clear()
    found, _ = collect(watcher, "attention_full", "k")
    for layer, (q, k, _) in zip(found, core.calls, strict=True):
        shared = k[:, [0, 0, 1, 1]]
        torch.testing.assert_close(layer["attention_full"], (q @ shared.mT).softmax(-1), rtol=0, atol=2e-6)
        assert torch.equal(layer["k"], shared[:, :, 1:])


def test_autocast_probabilities_are_float32_of_the_models_q_and_k() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pairs = watched(Core(), "attention_full", "tokens_out")
    for layer, (q, k, _) in pairs:
        assert k.dtype == torch.bfloat16
        assert layer["attention_full"].dtype == layer["tokens_out"].dtype == torch.float32
        exact = (q.double() @ k.double().mT).softmax(-1).float()
        torch.testing.assert_close(layer["attention_full"], exact, rtol=0, atol=1e-6)


def test_double_precision() -> None:
    model, images = TinyViT().double(), IMAGES.double()
    found, out = collect(Watcher(model, images), "attention", images=images)
    assert out.dtype == torch.float64
    assert found[0]["attention"].dtype == torch.float32


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_batches_of_any_size(batch: int) -> None:
    model = TinyViT(method)
    images = torch.cat([IMAGES, IMAGES])[:batch]
    watcher = Watcher(model, images[:1])
    found, out = collect(watcher, "attention", images=images)
    with torch.no_grad():
        assert torch.equal(out, model(images))
    alone, _ = collect(watcher, "attention", images=images[-1:])
    torch.testing.assert_close(alone[1]["attention"][0], found[1]["attention"][-1], rtol=0, atol=1e-6)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(WatchError, match="images are 64 x 64, the model is watched at 32 x 32"):
        Watcher(TinyViT(), IMAGES).run(torch.randn(1, 3, 64, 64), [])


def test_one_patch_beside_cls() -> None:
    info = Watcher(TinyViT(), torch.randn(2, 3, PATCH, PATCH)).anatomy.layers[0]
    assert (info.role, info.grid, info.prefix, info.tokens) == ("tokens", (1, 1), 1, 1)


# ---------------------------------------------------------------------- torch's own layers


class Encoder(nn.Module):
    """torch's encoder layers over patches."""

    def __init__(self, *, batch_first: bool, norm_first: bool = True, heads: int = 4):
        super().__init__()
        torch.manual_seed(4)
        self.batch_first = batch_first
        self.patch = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))
        options = {"batch_first": batch_first, "norm_first": norm_first, "dim_feedforward": 2 * WIDTH}
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, heads, **options) for _ in range(2))
        self.head = nn.Linear(WIDTH, 5)
        with torch.no_grad():
            for layer in self.layers:
                layer.self_attn.in_proj_weight[: 2 * WIDTH] *= 3
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        x = x if self.batch_first else x.transpose(0, 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1 if self.batch_first else 0))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_torch_encoder_layers(batch_first: bool, norm_first: bool) -> None:
    model = Encoder(batch_first=batch_first, norm_first=norm_first)
    watcher = Watcher(model, IMAGES)
    facts = {(i.kind, i.heads, i.prefix, i.grid, i.sites) for i in watcher.anatomy.layers}
    assert facts == {("mha", 4, 1, (SIDE, SIDE), ("in", "mid", "out"))}

    maps: list[Tensor] = []

    def weights(m: nn.MultiheadAttention, args: tuple, kwargs: dict) -> None:
        names = [*args, *(kwargs[n] for n in ("query", "key", "value")[len(args) :])]
        found = nn.MultiheadAttention.forward(m, *names, need_weights=True, average_attn_weights=False)
        maps.append(found[1])

    handles = [b.self_attn.register_forward_pre_hook(weights, with_kwargs=True) for b in model.layers]
    streams: list[Tensor] = []
    handles += [b.register_forward_hook(lambda m, a, out: streams.extend((a[0], out))) for b in model.layers]
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            expected = model(IMAGES)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
        for handle in handles:
            handle.remove()
    found, out = collect(watcher, "attention_full", "tokens_in", "tokens_out", "head_outputs", "v")
    assert torch.equal(out, expected)
    assert torch.equal(watcher.forward(IMAGES), out)
    with torch.no_grad():
        torch.testing.assert_close(
            model(IMAGES), out, rtol=0, atol=1e-4
        )  # torch's fused path, which it leaves
    assert torch.backends.mha.get_fastpath_enabled()
    for i, layer in enumerate(found):
        torch.testing.assert_close(layer["attention_full"], maps[i], rtol=0, atol=2e-6)
        own = maps[i][:, :, 1:, 1:] @ layer["v"]
        assert layer["head_outputs"].shape == own.shape
        turned = [t if batch_first else t.transpose(0, 1) for t in streams[2 * i : 2 * i + 2]]
        assert torch.equal(layer["tokens_in"], turned[0][:, 1:])
        if norm_first:
            assert torch.equal(layer["tokens_out"], turned[1][:, 1:])


def test_torch_encoder_with_masks() -> None:
    class Masked(Encoder):
        def forward(self, images: Tensor) -> Tensor:
            x = self.patch(images).flatten(2).transpose(1, 2)
            padding = torch.zeros(x.shape[:2], dtype=torch.bool)
            padding[:, -2:] = True
            bias = torch.zeros(TOKENS, TOKENS)
            bias[:, 0] = 1.5
            for layer in self.layers:
                x = layer(
                    x, src_mask=bias, src_key_padding_mask=padding.float().masked_fill(padding, -torch.inf)
                )
            return self.head(x.mean(1))

    found, _ = collect(Watcher(Masked(batch_first=True), IMAGES), "attention")
    for layer in found:
        assert float(layer["attention"][..., -2:].abs().max()) == 0
        torch.testing.assert_close(layer["attention"].sum(-1), torch.ones(3, 4, TOKENS), rtol=0, atol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")
def test_torchvision_vit() -> None:
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(32, PATCH, 2, HEADS, WIDTH, 2 * WIDTH, num_classes=5).eval()
    watcher = Watcher(model, IMAGES)
    assert [(i.heads, i.prefix, i.grid, i.sites) for i in watcher.anatomy.layers] == [
        (HEADS, 1, (SIDE, SIDE), ("in", "mid", "out"))
    ] * 2
    with torch.no_grad():
        torch.testing.assert_close(watcher.run(IMAGES, []), model(IMAGES), rtol=0, atol=1e-5)


# ---------------------------------------------------------------------- wrappers and compilers


def test_data_parallel_is_unwrapped_outside_and_refused_inside() -> None:
    model = TinyViT()
    watcher = Watcher(nn.DataParallel(model), IMAGES)
    assert watcher.module is model
    model.blocks[0] = nn.DataParallel(model.blocks[0])
    with pytest.raises(
        WatchError, match=r"'blocks.0' of 'TinyViT' is a DataParallel, which runs in other threads"
    ):
        Watcher(model, IMAGES)


def test_torchscript_is_refused() -> None:
    traced = torch.jit.trace(TinyViT(), IMAGES)
    with pytest.raises(WatchError, match="is a TorchScript module") as refusal:
        Watcher(traced, IMAGES)
    assert refusal.value.hint


@pytest.mark.parametrize("how", ["wrapped", "in place", "blocks"])
def test_compiled_models_run_eagerly(how: str) -> None:
    model = TinyViT()
    with torch.no_grad():
        expected = model(IMAGES)

    def backend(graph: Any, inputs: Any) -> Callable:
        raise AssertionError("compiled while watched")

    subject: nn.Module = model
    if how == "wrapped":
        subject = torch.compile(model, backend=backend)
    elif how == "in place":
        model.compile(backend=backend)
    else:
        for i, block in enumerate(model.blocks):
            model.blocks[i] = torch.compile(block, backend=backend)
    watcher = Watcher(subject, IMAGES)
    found, out = collect(watcher, "attention")
    assert [i.name for i in watcher.anatomy.layers] == ["blocks.0.attn", "blocks.1.attn"]
    assert len(found) == 2
    assert torch.equal(out, expected)
    assert torch.equal(watcher.forward(IMAGES), expected)


# ---------------------------------------------------------------------- what hides attention


@torch.library.custom_op("probekit_tests::hidden_attention", mutates_args=())
def hidden_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


@torch.library.custom_op("probekit_tests::packed_attention", mutates_args=())
def packed_attention(qkv: Tensor) -> Tensor:
    q, k, v = qkv.unbind(0)
    return (q @ k.mT).softmax(-1) @ v


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return (q @ (k.mT @ v)) / (q @ k.sum(-2, keepdim=True).mT)


def unnormalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.relu(q @ k.mT) @ v


def without_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = (q @ k.mT).softmax(-1)
    return (a.unsqueeze(-1) * v.unsqueeze(-3)).sum(-2)


def through_numpy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.from_numpy(method(q, k, v).numpy().copy())


def direct(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.aten.scaled_dot_product_attention.default(q, k, v, scale=1.0)


@pytest.mark.parametrize(
    ("core", "text"),
    [
        (hidden_attention, "goes through the custom operator 'probekit_tests.hidden_attention"),
        (lambda q, k, v: packed_attention(torch.stack([q, k, v])), "ran, but no attention was seen in it"),
        (linear_attention, "weighs tokens by rows that don't sum to 1 before the product with v"),
        (unnormalised, "weighs tokens by rows that don't sum to 1 before the product with v"),
        (without_product, "takes a softmax between tokens, but not as a matrix of attention"),
        (through_numpy, "can't be seen"),
        (direct, "torch's 'scaled_dot_product_attention.default'"),
    ],
    ids=["custom op", "packed custom op", "linear", "unnormalised", "no product", "numpy", "aten"],
)
def test_hidden_attention_is_refused_and_named(core: Callable[..., Tensor], text: str) -> None:
    with pytest.raises(WatchError) as refusal:
        Watcher(TinyViT(core), IMAGES)
    assert text in refusal.value.message
    assert "'blocks.0.attn'" in refusal.value.message
    assert "\n" not in refusal.value.message
    assert refusal.value.message[0].islower() or refusal.value.message[0] == "'"


def test_a_softmax_that_nothing_uses_is_no_obstacle() -> None:
    def wasteful(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _ = (q @ k.mT).softmax(-1)
        return F.scaled_dot_product_attention(q, k, v, scale=1.0)

    assert {i.kind for i in Watcher(TinyViT(wasteful), IMAGES).anatomy.layers} == {"fused"}


def test_one_hidden_layer_can_be_left_out() -> None:
    model = TinyViT()
    model.blocks[0].attn.attend = hidden_attention
    with torch.no_grad():
        expected = model(IMAGES)
    watcher = Watcher(model, IMAGES, allow_unwatched=True)
    assert [i.name for i in watcher.anatomy.layers] == ["blocks.1.attn"]
    assert [o["name"] for o in watcher.anatomy.others] == ["blocks.0.attn"]
    assert torch.equal(watcher.run(IMAGES, []), expected)


def test_another_way_than_in_the_plan_is_refused() -> None:
    class Moody(TinyViT):
        happy = True

        def forward(self, images: Tensor) -> Tensor:
            if self.happy:
                return super().forward(images)
            x = self.patch(images).flatten(2).transpose(1, 2)
            x = torch.cat([self.prefix.expand(len(x), -1, -1), x], 1)
            return self.head(self.blocks[0](x).mean(1))

    model = Moody()
    watcher = Watcher(model, IMAGES)
    watcher.run(IMAGES, [])
    model.happy = False
    with pytest.raises(WatchError, match="took another way than in the plan: 2 add calls instead of 4"):
        watcher.run(IMAGES, [])


def test_fewer_tokens_than_in_the_plan_are_refused() -> None:
    class Shrinking(TinyViT):
        keep = TOKENS

        def forward(self, images: Tensor) -> Tensor:
            x = self.patch(images).flatten(2).transpose(1, 2)[:, : self.keep]
            for block in self.blocks:
                x = block(x)
            return self.head(x.mean(1))

    model = Shrinking()
    watcher = Watcher(model, IMAGES)
    model.keep = 9
    for needs in ("attention", "tokens_mid"):
        with pytest.raises(WatchError, match="took another way than in the plan"):
            watcher.run(IMAGES, [Visitor(frozenset({needs}), lambda layer: None)])


def test_random_forward_passes_are_refused() -> None:
    class Noisy(TinyViT):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images + torch.randn_like(images))

    with pytest.raises(WatchError, match="'Noisy' draws random numbers"):
        Watcher(Noisy(), IMAGES)

    class Shuffled(TinyViT):  # its output doesn't show it, its positions do
        def forward(self, images: Tensor) -> Tensor:
            x = self.patch(images).flatten(2).transpose(1, 2)
            x = x[:, torch.randperm(x.shape[1])]
            for block in self.blocks:
                x = block(x)
            return self.head(x.mean(1))

    with pytest.raises(WatchError, match="'Shuffled' draws random numbers"):
        Watcher(Shuffled(), IMAGES)

    class Harmless(TinyViT):
        def forward(self, images: Tensor) -> Tensor:
            torch.rand(3)
            return super().forward(images)

    assert len(Watcher(Harmless(), IMAGES).anatomy.layers) == 2


# ---------------------------------------------------------------------- what a layer lacks


class Bare(TinyViT):
    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks[0].attn(self.patch(images).flatten(2).mT).mean(1))


def test_a_layer_without_residual_has_attention_but_no_tokens() -> None:
    watcher = Watcher(Bare(), IMAGES)
    assert watcher.anatomy.layers[0].sites == ()
    assert "no residual addition was found around 1 layers" in watcher.anatomy.warnings[0]
    assert watcher.site_rows() == []
    seen = []

    def visit(layer) -> None:
        assert layer.attention.shape == (3, HEADS, TOKENS, TOKENS)
        with pytest.raises(DoesNotApply, match=r"no tokens of that kind were found around 'blocks.0.attn'"):
            _ = layer.tokens_mid
        seen.append(layer)

    watcher.run(IMAGES, [Visitor(frozenset({"attention", "tokens_mid"}), visit)])
    watcher.run(IMAGES, [Visitor(frozenset({"tokens_mid"}), seen.append)])
    assert len(seen) == 2


def test_tokens_that_depend_on_the_image_are_not_placed() -> None:
    class Pruned(TinyViT):
        def forward(self, images: Tensor) -> Tensor:
            x = self.blocks[0](self.patch(images).flatten(2).mT)
            keep = x.norm(dim=-1).argsort(1, descending=True)[:, :9]
            x = self.blocks[1](x.gather(1, keep.unsqueeze(-1).expand(-1, -1, WIDTH)))
            return self.head(x.mean(1))

    watcher = Watcher(Pruned(), IMAGES)
    assert [i.role for i in watcher.anatomy.layers] == ["tokens", "untraced"]
    assert any("could not be traced in 1 layers" in w for w in watcher.anatomy.warnings)
    reasons = []

    def visit(layer) -> None:
        try:
            _ = layer.attention
        except DoesNotApply as reason:
            reasons.append(reason.message)

    watcher.run(IMAGES, [Visitor(frozenset({"attention"}), visit)])
    assert reasons == ["the token positions of 'blocks.1.attn' could not be traced"]


def test_attention_pooling_with_learned_queries_is_no_layer() -> None:
    class Pooled(TinyViT):
        def forward(self, images: Tensor) -> Tensor:
            x = self.blocks[0](self.patch(images).flatten(2).mT)
            pooled = (self.prefix @ x.mT / math.sqrt(WIDTH)).softmax(-1) @ x
            return self.head(self.blocks[1](torch.cat([pooled, x], 1)).mean(1))

    watcher = Watcher(Pooled(method), IMAGES)
    facts = [(i.name, i.prefix, i.tokens) for i in watcher.anatomy.layers]
    assert facts == [("blocks.0.attn", 0, TOKENS), ("blocks.1.attn", 1, TOKENS)]
    assert len(watcher.anatomy.others) == 1


def test_no_attention() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    )
    with pytest.raises(WatchError, match="no attention between tokens was found in 'Sequential'"):
        Watcher(model, IMAGES)


def test_attention_that_is_not_finite_is_not_called_a_bug() -> None:
    model = TinyViT(method)
    for parameter in model.blocks[1].parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(WatchError, match=r"attention of 'blocks.1.attn' is NaN or infinite") as caught:
        collect(Watcher(model, IMAGES), "attention")
    assert "weights are not finite" in caught.value.hint


def test_needs_that_make_no_sense() -> None:
    with pytest.raises(MetricError, match="a layer has no field 'atention'"):
        Visitor(frozenset({"atention"}), print)
    with pytest.raises(MetricError, match="a token site has 'tokens' alone, no 'q'"):
        Visitor(frozenset({"tokens", "q"}), print)


def test_probe_leaves_modes_and_hooks_as_they_were() -> None:
    model = TinyViT(method).train()
    model.head.eval()
    probekit.probe(model, IMAGES, metrics=["nmi"])
    assert model.training
    assert model.blocks[0].training
    assert not model.head.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
