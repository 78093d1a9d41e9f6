"""The watcher over attention as people write it by hand: every spelling, layout, wrapper and trap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probekit.errors import WatchError
from probekit.watch import Visitor, Watcher

WIDTH, HEADS, SIDE, PATCH = 24, 3, 4, 8
TOKENS = SIDE * SIDE
IMAGES = torch.randn(3, 3, SIDE * PATCH, SIDE * PATCH, generator=torch.Generator().manual_seed(2))
SCALE = (WIDTH // HEADS) ** -0.5


# ---------------------------------------------------------------------- spellings of attention
# each takes q, k, v (B, H, N, d), q scaled already, and returns (B, H, N, d)


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)


def method(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).softmax(-1) @ v


def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.matmul(F.softmax(torch.matmul(q, k.mT), dim=-1), v)


def module(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return nn.Softmax(dim=-1)(q @ k.mT) @ v


def heads_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    a = torch.einsum("bnhd,bmhd->bhnm", q, k).softmax(-1)
    return torch.einsum("bhnm,bmhd->bnhd", a, v).transpose(1, 2)


def heads_very_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = torch.einsum("bhnd, bhmd -> bnmh", q, k).softmax(2)
    return torch.einsum("bnmh,bhmd->bhnd", a, v)


def ellipsis(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = torch.einsum("...id,...jd->...ij", q, k).softmax(-1)
    return torch.einsum("...ij,...jd->...id", a, v)


def merged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h = q.shape[:2]
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    return torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v).unflatten(0, (b, h))


def merged_then_apart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h = q.shape[:2]
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2))
    return scores.view(b, h, *scores.shape[1:]).softmax(-1) @ v


def heads_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(0, 1).flatten(0, 1) for t in (q, k, v))  # (H * B, N, d)
    return torch.bmm(torch.bmm(q, k.mT).softmax(-1), v).unflatten(0, (HEADS, -1)).transpose(0, 1)


def added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, n, _ = q.shape
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    scores = torch.baddbmm(torch.zeros(b * h, n, n), q, k.mT)
    return torch.bmm(scores.softmax(-1), v).unflatten(0, (b, h))


def each_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    parts = [(q[:, i] @ k[:, i].mT).softmax(-1) @ v[:, i] for i in range(HEADS)]
    return torch.stack(parts, 1)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    z = q @ k.mT
    e = (z - z.amax(-1, keepdim=True)).exp()
    return (e / e.sum(-1, keepdim=True)) @ v


def logarithm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).log_softmax(-1).exp() @ v


def logsumexp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    z = q @ k.mT
    return (z - z.logsumexp(-1, keepdim=True)).exp() @ v


def keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = (k @ q.mT).softmax(-2)  # (keys, queries)
    return a.mT @ v


def values_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = (q @ k.mT).softmax(-1)
    return (v.mT @ a.mT).mT


def into(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    z = q @ k.mT
    torch.softmax(z, -1, out=z)
    return z @ v


def masked_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    z = q @ k.mT
    z += 0.0
    z[:, :, :, :1] -= 1.0
    return z.softmax(-1).clone() @ v


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ k.mT).softmax(-1), 0.5, training=False) @ v


SPELLINGS = (
    fused, method, function, module, heads_last, heads_very_last, ellipsis, merged, merged_then_apart,
    heads_first, added, each_head, by_hand, logarithm, logsumexp, keys_first, values_first, into,
    masked_in_place, dropped,
)  # fmt: skip


class Attend(nn.Module):
    """Multi-head self-attention with a spelling of its core; remembers q and k."""

    def __init__(self, core: Callable[..., Tensor]):
        super().__init__()
        self.core = core
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        with torch.no_grad():
            self.qkv.weight[: 2 * WIDTH] *= 3
        self.seen: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        out = self.core(q * SCALE, k, v)
        self.seen = {"q": q * SCALE, "k": k, "v": v, "heads": out}
        return self.proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A transformer block; `order` says how the residual additions are written."""

    def __init__(self, attend: nn.Module, order: str = "pre"):
        super().__init__()
        self.attend, self.order = attend, order
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.gamma = nn.Parameter(torch.rand(WIDTH))
        self.seen: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        start = x.clone()
        middle = getattr(self, self.order)
        x, mid, out = middle(x)
        self.seen = {"in": start, "mid": mid, "out": out}
        return x

    def pre(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mid = x + self.attend(self.norm1(x))
        out = mid + self.mlp(self.norm2(mid))
        return out, mid, out

    def post(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mid = x + self.attend(x)
        out = self.norm1(mid)
        out = out + self.mlp(out)
        return self.norm2(out), mid, out

    def scaled(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mid = torch.addcmul(x, self.gamma, self.attend(self.norm1(x)))
        out = torch.add(mid, self.gamma * self.mlp(self.norm2(mid)))
        return out, mid, out

    def in_place(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x += self.attend(self.norm1(x))
        mid = x.clone()
        x += self.mlp(self.norm2(x))
        return x, mid, x.clone()

    def swapped(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mid = self.attend(self.norm1(x)).add_(x)
        out = self.mlp(self.norm2(mid)).add_(mid)
        return out, mid, out

    def beside(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n = self.norm1(x)
        mid = x + self.attend(n)
        out = mid + self.mlp(n)
        return out, mid, out


ORDERS = ("pre", "post", "scaled", "in_place", "swapped", "beside")


class ViT(nn.Module):
    """A small ViT. `tokens` says where tokens that are no patches stand."""

    def __init__(
        self, core: Callable[..., Tensor] = fused, order: str = "pre", depth: int = 2, tokens: str = "first"
    ):
        super().__init__()
        torch.manual_seed(3)
        self.patch, self.placing = nn.Conv2d(3, WIDTH, PATCH, PATCH), tokens
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.registers = nn.Parameter(torch.randn(1, 2, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, TOKENS, WIDTH) * 0.1)
        self.blocks = nn.ModuleList(Block(Attend(core), order) for _ in range(depth))
        self.head = nn.Linear(WIDTH, 5)
        self.eval()

    def embed(self, images: Tensor) -> Tensor:
        return self.patch(images).flatten(2).transpose(1, 2)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images) + self.positions
        cls, registers = (t.expand(len(x), -1, -1) for t in (self.cls, self.registers))
        around = {"none": ([], []), "first": ([cls], []), "last": ([], [cls])}
        around |= {"registers": ([registers, cls], []), "around": ([cls], [registers])}
        before, after = around[self.placing]
        x = torch.cat([*before, x, *after], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


PLACES = {
    "none": [],
    "first": [0],
    "last": [TOKENS],
    "registers": [0, 1, 2],
    "around": [0, TOKENS + 1, TOKENS + 2],
}


def own_map(attend: Attend) -> Tensor:
    scores = attend.seen["q"].double() @ attend.seen["k"].double().mT
    if attend.core is masked_in_place:
        scores[..., 0] -= 1
    return scores.softmax(-1).float()


def collect(watcher: Watcher, *fields: str, images: Tensor = IMAGES) -> tuple[list[dict[str, Tensor]], Any]:
    found: list[dict[str, Tensor]] = []

    def visit(layer) -> None:
        found.append({f: getattr(layer, f).clone() for f in fields})

    out = watcher.run(images, [Visitor(frozenset(fields), visit)])
    return found, out


def assert_watched(model: ViT, watcher: Watcher | None = None) -> Watcher:
    """Output, attention, heads, q, k, v and tokens are what the model itself had."""
    with torch.no_grad():
        expected = model(IMAGES)
        seen = [(b.attend.seen | {"map": own_map(b.attend)}, dict(b.seen)) for b in model.blocks]
    watcher = watcher or Watcher(model, IMAGES)
    prefix = PLACES[model.placing]
    patches = [i for i in range(TOKENS + len(prefix)) if i not in prefix]
    for info in watcher.anatomy.layers:
        assert (info.heads, info.prefix) == (HEADS, len(prefix))
        assert (info.grid, info.stride) == ((SIDE, SIDE), (PATCH, PATCH))
        assert info.role == "tokens"
    fields = ("attention", "attention_full", "head_outputs", "v", "tokens_in", "tokens_mid", "tokens_out")
    found, out = collect(watcher, *fields)
    assert torch.equal(out, expected)
    assert len(found) == len(model.blocks)
    for layer, (attend, block) in zip(found, seen, strict=True):
        full = attend["map"][:, :, prefix + patches][..., prefix + patches]
        torch.testing.assert_close(layer["attention_full"], full, rtol=0, atol=2e-6)
        cut = attend["map"][:, :, patches][..., patches]
        torch.testing.assert_close(layer["attention"], cut / cut.sum(-1, keepdim=True), rtol=0, atol=2e-6)
        torch.testing.assert_close(layer["head_outputs"], attend["heads"][:, :, patches], rtol=0, atol=1e-6)
        assert torch.equal(layer["v"], attend["v"][:, :, patches])
        for name in ("in", "mid", "out"):
            assert torch.equal(layer[f"tokens_{name}"], block[name][:, patches]), name
    return watcher


@pytest.mark.parametrize("core", SPELLINGS, ids=lambda f: f.__name__)
def test_spellings(core: Callable[..., Tensor]) -> None:
    model = ViT(core)
    watcher = assert_watched(model)
    with torch.no_grad():
        model(IMAGES)
    for layer, block in zip(collect(watcher, "q", "k")[0], model.blocks, strict=True):
        for name in "qk":
            torch.testing.assert_close(layer[name], block.attend.seen[name][:, :, 1:], rtol=0, atol=0)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("core", [fused, method, each_head], ids=lambda f: f.__name__)
def test_residual_additions(order: str, core: Callable[..., Tensor]) -> None:
    watcher = assert_watched(ViT(core, order))
    assert [r.site for r in watcher.site_rows()] == ["embed", *["mid", "out"] * 2]
    assert [r.depth for r in watcher.site_rows()] == [0, 0.5, 1, 1.5, 2]


def test_values_kept_by_a_visitor_survive_in_place_additions() -> None:
    model = ViT(order="in_place")
    kept: list[Tensor] = []
    Watcher(model, IMAGES).run(
        IMAGES, [Visitor(frozenset({"tokens"}), lambda layer: kept.append(layer.tokens))]
    )
    first, second = (b.seen for b in model.blocks)
    expected = [first["in"], first["mid"], first["out"], second["mid"], second["out"]]
    for found, own in zip(kept, expected, strict=True):
        assert torch.equal(found, own[:, 1:])


@pytest.mark.parametrize("tokens", PLACES)
def test_where_the_other_tokens_stand(tokens: str) -> None:
    watcher = assert_watched(ViT(tokens=tokens))
    found: list[Tensor] = []
    model = watcher.module
    watcher.run(IMAGES, [Visitor(frozenset({"tokens"}), lambda layer: found.append(layer.prefix_tokens()))])
    assert torch.equal(found[0], model.blocks[0].seen["in"][:, PLACES[tokens]])


def test_prefix_mass() -> None:
    model = ViT(tokens="registers")
    found, _ = collect(Watcher(model, IMAGES), "prefix_mass")
    for layer, block in zip(found, model.blocks, strict=True):
        expected = own_map(block.attend)[:, :, 3:, :3].sum(-1).mean(-1)
        torch.testing.assert_close(layer["prefix_mass"], expected, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------- ways to patches


class Reshaped(ViT):
    def embed(self, images: Tensor) -> Tensor:
        x = images.reshape(len(images), 3, SIDE, PATCH, SIDE, PATCH).permute(0, 2, 4, 1, 3, 5)
        return F.linear(x.reshape(len(images), TOKENS, -1), self.patch.weight.flatten(1), self.patch.bias)


class Unfolded(ViT):
    def embed(self, images: Tensor) -> Tensor:
        x = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5).flatten(3)
        return torch.einsum("bhwi,oi->bhwo", x, self.patch.weight.flatten(1)).flatten(1, 2)


class Channels(ViT):
    """Tokens as columns, turned around late, and in another order than the image's."""

    def embed(self, images: Tensor) -> Tensor:
        order = torch.arange(TOKENS).flip(0)
        return super().embed(images)[:, order]


@pytest.mark.parametrize("kind", [Reshaped, Unfolded])
def test_patchify_without_convolution(kind: type[ViT]) -> None:
    assert_watched(kind())


def test_tokens_in_another_order_come_back_in_raster_order() -> None:
    model = Channels(tokens="first")
    watcher = Watcher(model, IMAGES)
    found, _ = collect(watcher, "tokens_out", "attention", "attention_full", "q", "head_outputs")
    back = torch.arange(TOKENS).flip(0)
    for layer, block in zip(found, model.blocks, strict=True):
        assert torch.equal(layer["tokens_out"], block.seen["out"][:, 1:][:, back])
        assert torch.equal(layer["q"], block.attend.seen["q"][:, :, 1:][:, :, back] / SCALE * SCALE)
        own = own_map(block.attend)
        cut = own[:, :, 1:, 1:][:, :, back][..., back]
        torch.testing.assert_close(layer["attention"], cut / cut.sum(-1, keepdim=True), rtol=0, atol=2e-6)
        order = torch.cat([torch.zeros(1, dtype=torch.long), back + 1])
        torch.testing.assert_close(layer["attention_full"], own[:, :, order][..., order], rtol=0, atol=2e-6)


class Rotary(ViT):
    """Rotates patch queries and keys alone, as EVA and DINOv3 do: cut, turn, join."""

    def __init__(self) -> None:
        super().__init__(self.rotated)

    @staticmethod
    def rotated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def turn(t: Tensor) -> Tensor:
            cls, x = t[:, :, :1], t[:, :, 1:]
            angle = torch.arange(TOKENS)[:, None] * torch.arange(1, 5) / 10
            a, b = x[..., 0::2], x[..., 1::2]
            x = torch.stack(
                [a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1
            ).flatten(-2)
            return torch.cat([cls, x], 2)

        return fused(turn(q), turn(k), v)


def test_rotary_queries() -> None:
    model = Rotary()
    watcher = Watcher(model, IMAGES)
    info = watcher.anatomy.layers[0]
    assert (info.prefix, info.grid, info.sites) == (1, (SIDE, SIDE), ("in", "mid", "out"))
    found, _ = collect(watcher, "attention", "head_outputs", "v")
    torch.testing.assert_close(found[0]["head_outputs"].shape, torch.Size((3, HEADS, TOKENS, WIDTH // HEADS)))


# ---------------------------------------------------------------------- what is done to a softmax


def mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Talking heads: each head of the factor is a sum of the softmax's heads, plus a constant."""
    mix = torch.tensor([[1.2, -0.3, 0.4], [0.1, 0.8, -0.2], [-0.5, 0.3, 0.9]])
    a = (q @ k.mT).softmax(-1).permute(0, 2, 3, 1)
    return F.linear(a, mix, torch.full((HEADS,), 0.01)).permute(0, 3, 1, 2) @ v


def mixed_keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((k @ q.mT).softmax(-2) * torch.tensor([0.5, 0.7, 1.5]).view(3, 1, 1)).mT @ v


def sink_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    z = q @ k.mT
    return torch.cat([torch.ones(*z.shape[:3], 1), z], -1).softmax(-1)[..., 1:] @ v


def sink_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    z = q @ k.mT
    return torch.cat([z, torch.ones(*z.shape[:3], 1)], -1).softmax(-1)[..., :-1] @ v


def weak_sink(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Rows sum to 0.99: once let through by the plan and then called a bug by the run."""
    z = q @ k.mT
    return torch.cat([z, torch.full((*z.shape[:3], 1), -3.0)], -1).softmax(-1)[..., :-1] @ v


def differential(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a, b = ((x @ y.mT).softmax(-1) for x, y in zip(q.chunk(2, -1), k.chunk(2, -1), strict=True))
    return (a - 0.5 * b) @ v


def gated_pairs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = (q @ k.mT).softmax(-1)
    return (a * torch.linspace(0, 1, a.shape[-1])) @ v


def clipped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).softmax(-1) * 1.2 - 0.1).clamp(0, 1) @ v


def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-2) @ v


def normalised_after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = (q @ k.mT).exp()
    return (e @ v) / e.sum(-1, keepdim=True)


@pytest.mark.parametrize("core", [mixed, mixed_keys_first], ids=lambda f: f.__name__)
@pytest.mark.parametrize("tokens", ["none", "first"])
def test_talking_heads_are_the_softmax_before_the_mixing(core: Callable[..., Tensor], tokens: str) -> None:
    model = ViT(core, tokens=tokens)
    watcher = Watcher(model, IMAGES)
    assert {i.note.split(":")[0] for i in watcher.anatomy.layers} == {"talking heads"}
    found, _ = collect(watcher, "attention_full")
    for layer, block in zip(found, model.blocks, strict=True):
        torch.testing.assert_close(layer["attention_full"], own_map(block.attend), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "core",
    [
        sink_first,
        sink_last,
        weak_sink,
        differential,
        gated_pairs,
        clipped,
        over_queries,
        normalised_after,
    ],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("tokens", ["none", "first"])
def test_what_is_no_mix_of_heads_is_not_measured(core: Callable[..., Tensor], tokens: str) -> None:
    with pytest.raises(WatchError, match="by rows that don't sum to 1 before the product with v") as refusal:
        Watcher(ViT(core, tokens=tokens), IMAGES)
    assert "'blocks.0.attend'" in refusal.value.message
    assert "--allow-unwatched" in refusal.value.hint


def subtracted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a, b = (fused(x, y, v) for x, y in zip(q.chunk(2, -1), k.chunk(2, -1), strict=True))
    return a - 0.5 * b


def test_heads_of_two_attentions_that_are_subtracted_are_named() -> None:
    anatomy = Watcher(ViT(subtracted), IMAGES).anatomy
    assert [i.heads for i in anatomy.layers] == [2 * HEADS] * 2
    assert all("differential attention" in i.note for i in anatomy.layers)
    assert "2 layers (first: 'blocks.0.attend') subtract two attentions" in anatomy.warnings[0]
    assert Watcher(ViT(each_head), IMAGES).anatomy.warnings == ()


def in_chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([fused(part, k, v) for part in q.split(4, 2)], 2)


def test_queries_in_chunks_are_named() -> None:
    warnings = Watcher(ViT(in_chunks, tokens="none"), IMAGES).anatomy.warnings
    assert any("8 layers (first: 'blocks.0.attend') share one run of a module" in w for w in warnings)


class Cascade(nn.Module):
    """EfficientViT's heads: each adds what the one before it gave to its own part of the channels."""

    def __init__(self) -> None:
        super().__init__()
        part = WIDTH // HEADS
        self.qkv = nn.ModuleList(nn.Linear(part, 3 * part) for _ in range(HEADS))
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        outs: list[Tensor] = []
        for part, qkv in zip(x.chunk(HEADS, -1), self.qkv, strict=True):
            part = part if not outs else outs[-1] + part
            outs.append(method(*qkv(part).chunk(3, -1)))
        return self.proj(torch.cat(outs, -1))


def test_a_cascade_of_heads_has_no_stream_between_its_heads() -> None:
    model = ViT(tokens="none")
    for block in model.blocks:
        block.attend = Cascade()
    watcher = Watcher(model, IMAGES)
    assert [i.sites for i in watcher.anatomy.layers] == [(), (), ("in", "mid", "out")] * 2
    assert any("6 layers (first: 'blocks.0.attend') share one run" in w for w in watcher.anatomy.warnings)
    found: dict[str, list[Tensor]] = {}
    for site in ("in", "mid", "out"):
        visit = Visitor(
            frozenset({f"tokens_{site}"}),
            lambda layer, s=site: (
                found.setdefault(s, []).append(getattr(layer, f"tokens_{s}").clone())
                if layer.info.sites
                else None
            ),
        )
        watcher.run(IMAGES, [visit])
        for own, block in zip(found[site], model.blocks, strict=True):
            assert torch.equal(own, block.seen[site])


def test_a_loop_over_images_is_named() -> None:
    def looped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.stack([fused(*one) for one in zip(q, k, v, strict=True)])

    with pytest.raises(
        WatchError, match=r"the attention in 'blocks.0.attend' is between tokens whose"
    ) as refusal:
        Watcher(ViT(looped), IMAGES)
    assert "a loop over its images" in refusal.value.hint


# ---------------------------------------------------------------------- other ways to add


class AtOnce(Block):
    def pre(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n = self.norm1(x)
        out = x + (self.attend(n) + self.mlp(n))
        return out, out, out


class ScaledSkip(Block):
    def pre(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mid = x * self.gamma + self.attend(self.norm1(x))
        out = mid * self.gamma + self.mlp(self.norm2(mid))
        return out, mid, out


def with_blocks(kind: type[Block], core: Callable[..., Tensor] = fused) -> ViT:
    model = ViT(core, tokens="none")
    model.blocks = nn.ModuleList(kind(Attend(core)) for _ in model.blocks)
    return model.eval()


@pytest.mark.parametrize("core", [fused, method], ids=lambda f: f.__name__)
def test_attention_and_mlp_that_are_added_at_once_give_the_layers_output(core: Callable[..., Tensor]) -> None:
    model = with_blocks(AtOnce, core)
    watcher = Watcher(model, IMAGES)
    assert [i.sites for i in watcher.anatomy.layers] == [("in", "out")] * 2
    assert watcher.anatomy.warnings == ()
    assert [r.site for r in watcher.site_rows()] == ["embed", "out", "out"]
    found, _ = collect(watcher, "tokens_in", "tokens_out")
    for layer, block in zip(found, model.blocks, strict=True):
        assert torch.equal(layer["tokens_in"], block.seen["in"])
        assert torch.equal(layer["tokens_out"], block.seen["out"])


def test_what_is_added_to_the_values_is_no_mlp() -> None:
    class Local(Attend):  # LePE: a convolution of v beside the attention, and no MLP after it
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            return self.proj((fused(q, k, v) + v * v).transpose(1, 2).flatten(2))

    class NoMlp(Block):
        def pre(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            mid = x + self.attend(self.norm1(x))
            return mid, mid, mid

    model = with_blocks(NoMlp)
    for block in model.blocks:
        block.attend = Local(fused)
    anatomy = Watcher(model, IMAGES).anatomy
    assert {i.sites for i in anatomy.layers} == {("in", "mid")}
    assert "no tokens after the MLP were found in 2 layers" in anatomy.warnings[0]


def test_a_scaled_skip_is_followed_to_the_stream() -> None:
    model = with_blocks(ScaledSkip)
    watcher = Watcher(model, IMAGES)
    assert [i.sites for i in watcher.anatomy.layers] == [("mid", "out"), ("in", "mid", "out")]
    assert "before the attention were found in 1 layers" in watcher.anatomy.warnings[0]
    seen: dict[str, Tensor] = {}

    def visit(layer) -> None:
        for site in layer.info.sites:
            seen[f"{layer.info.index}.{site}"] = getattr(layer, f"tokens_{site}").clone()

    watcher.run(IMAGES, [Visitor(frozenset({"tokens_in", "tokens_mid", "tokens_out"}), visit)])
    assert len(seen) == 5
    for place, tokens in seen.items():
        index, site = place.split(".")
        assert torch.equal(tokens, model.blocks[int(index)].seen[site])


# ---------------------------------------------------------------------- keys that are no tokens


@pytest.mark.parametrize("tokens", ["none", "first"])
def test_learned_keys_count_as_mass_beside_the_patches(tokens: str) -> None:
    extra = torch.randn(1, HEADS, 1, WIDTH // HEADS, generator=torch.Generator().manual_seed(5))

    def null_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (torch.cat([extra.expand(len(t), -1, -1, -1), t], 2) for t in (k, v))
        return fused(q, k, v)

    model = ViT(null_key, tokens=tokens)
    found, _ = collect(Watcher(model, IMAGES), "prefix_mass")
    first = len(PLACES[tokens])
    for layer, block in zip(found, model.blocks, strict=True):
        q, k = block.attend.seen["q"], block.attend.seen["k"]
        full = (q @ torch.cat([extra.expand(len(k), -1, -1, -1), k], 2).mT).softmax(-1)
        expected = full[:, :, first:, : 1 + first].sum(-1).mean(-1)
        torch.testing.assert_close(layer["prefix_mass"], expected, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------- maps that lie otherwise


class TokensToToken(ViT):
    """T2T: overlapping patches by F.unfold with padding."""

    def embed(self, images: Tensor) -> Tensor:
        x = F.unfold(images, PATCH + 3, padding=2, stride=PATCH)
        return F.linear(x.mT, torch.randn(WIDTH, x.shape[1], generator=torch.Generator().manual_seed(1)))


def test_padded_unfold_keeps_the_places() -> None:
    info = Watcher(TokensToToken(), IMAGES).anatomy.layers[0]
    centres = torch.arange(SIDE) * PATCH + (PATCH + 3) / 2 - 2
    expected = torch.cartesian_prod(centres, centres)
    assert (info.role, info.grid, info.padded) == ("tokens", (SIDE, SIDE), 0)
    torch.testing.assert_close(torch.from_numpy(info.positions).float(), expected)


class Transposed(ViT):
    def __init__(self, when: str):
        super().__init__(tokens="none")
        self.when, self.deeper = when, nn.Conv2d(WIDTH, WIDTH, 3, 1, 1)

    def embed(self, images: Tensor) -> Tensor:
        if self.when == "the image":
            x = self.patch(images.mT)
        elif self.when == "the map":
            x = self.deeper(self.patch(images).mT)
        else:
            x = self.patch(F.interpolate(images.mT, scale_factor=1.0))
        return x.flatten(2).mT


@pytest.mark.parametrize("when", ["the image", "the map", "an interpolated image"])
def test_a_transposed_grid_keeps_its_places(when: str) -> None:
    images = torch.randn(2, 3, SIDE * PATCH, (SIDE + 2) * PATCH)
    model = Transposed(when)
    model.positions = nn.Parameter(torch.zeros(1, SIDE * (SIDE + 2), WIDTH))
    watcher = Watcher(model, images)
    info = watcher.anatomy.layers[0]
    assert (info.role, info.grid, info.stride) == ("tokens", (SIDE, SIDE + 2), (PATCH, PATCH))
    found, _ = collect(watcher, "tokens_in", images=images)
    own = model.blocks[0].seen["in"].unflatten(1, (SIDE + 2, SIDE)).transpose(1, 2).flatten(1, 2)
    assert torch.equal(found[0]["tokens_in"], own)


def test_tokens_of_one_place_are_not_channels() -> None:
    class Learner(ViT):  # each token is a mix of all patches: all stand in the middle
        def embed(self, images: Tensor) -> Tensor:
            x = super().embed(images)
            weights = torch.rand(TOKENS, TOKENS, generator=torch.Generator().manual_seed(1))
            return F.linear(x.mT, weights).mT

    with pytest.raises(WatchError, match="between tokens whose places could not be traced"):
        Watcher(Learner(tokens="none"), IMAGES)
