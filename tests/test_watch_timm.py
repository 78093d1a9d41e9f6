"""The watcher over timm's families: untouched outputs, true attention, exact tokens, hand-written anatomy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from probekit.errors import DoesNotApply
from probekit.watch import Visitor, Watcher


@dataclass(frozen=True)
class Stage:
    """What a run of layers should look like, written down by hand from the paper or the code."""

    layers: int
    heads: int
    grid: tuple[int, int]
    stride: float
    windows: int = 1
    prefix: int = 0
    role: str = "tokens"
    window: str = "global"
    stage: int = 0


@dataclass(frozen=True)
class Family:
    """A model, made small, and what is true of it.

    blocks: module paths of its blocks, which return the residual stream; their `middle` is the submodule
            that takes the stream after attention, (part, prefix tokens)
    others: attention that is no layer of patch tokens
    maps:   "softmax": every softmax of the unfused model is a map; "drop": outputs of modules `attn_drop` are
    """

    name: str
    stages: tuple[Stage, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    size: tuple[int, int] = (96, 96)
    blocks: tuple[str, ...] = ()
    middle: str = "norm2"
    others: int = 0
    maps: str = "softmax"
    warns: tuple[str, ...] = ()
    drift: float = 1e-4  # how far fused and unfused float32 passes drift apart; more with more threads

    def make(self) -> nn.Module:
        torch.manual_seed(0)
        model = timm.create_model(self.name, num_classes=8, **self.options).eval()
        return peaked(model)

    def images(self, batch: int = 3) -> Tensor:
        return torch.randn(batch, 3, *self.size, generator=torch.Generator().manual_seed(1))


def peaked(model: nn.Module) -> nn.Module:
    """Query and key weights times 4: random attention that is far from uniform."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            owner, _, kind = name.rpartition(".")
            owner = owner.rpartition(".")[2]
            if kind != "weight" or p.dim() < 2:
                continue
            if owner in ("qkv", "to_qkv", "in_proj"):
                p[: 2 * len(p) // 3] *= 4
            elif owner in ("q", "k", "q_proj", "k_proj", "qk", "kv", "to_q", "query", "key"):
                p *= 4
    return model


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def load_families() -> Iterator[Family]:
    for entry in yaml.safe_load((Path(__file__).parent / "timm_families.yaml").read_text()):
        stages = tuple(Stage(**{k: _tuples(v) for k, v in stage.items()}) for stage in entry.pop("stages"))
        options = {k: _tuples(v) for k, v in entry.pop("options", {}).items()}
        yield Family(stages=stages, options=options, **{k: _tuples(v) for k, v in entry.items()})


by_family = pytest.mark.parametrize("family", list(load_families()), ids=lambda f: f.name)


# ---------------------------------------------------------------------- references


class Softmaxes(TorchFunctionMode):
    """Every softmax of a forward pass, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.__name__ == "softmax":
            self.maps.append(out)
        return out


@contextmanager
def hooked(*pairs: tuple[nn.Module, Callable]) -> Iterator[None]:
    handles = [m.register_forward_hook(hook) for m, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def own_maps(model: nn.Module, images: Tensor, how: str) -> list[Tensor]:
    """The maps of the model's own unfused attention, in the order of its calls."""
    switched = [m for m in model.modules() if getattr(m, "fused_attn", False)]
    for m in switched:
        m.fused_attn = False
    found: list[Tensor] = []
    drops = [m for n, m in model.named_modules() if n.endswith("attn_drop")] if how == "drop" else []
    with torch.no_grad(), Softmaxes() as tap, hooked(*((m, lambda *a: found.append(a[2])) for m in drops)):
        model(images)
    for m in switched:
        m.fused_attn = True
    return found if how == "drop" else tap.maps


def canonical(maps: Tensor, heads: int, batch: int) -> Tensor:
    """(B * W, H, Q, K) from the layouts in which timm's models have their maps."""
    if maps.dim() == 3:  # SAM has (B * W * H, Q, K)
        return maps.unflatten(0, (-1, heads))
    if maps.dim() == 5:  # NesT has (B, H, W, Q, K), Twins (B, W, H, Q, K)
        maps = maps.transpose(1, 2) if maps.shape[1] == heads and maps.shape[2] != heads else maps
        return maps.flatten(0, 1)
    if maps.shape[1] != heads:  # halo: (B * H, W, Q, K)
        return maps.unflatten(0, (batch, heads)).transpose(1, 2).flatten(0, 1)
    return maps


def flat(stream: Tensor, channels: int, prefix: int) -> Tensor:
    """(B, N, C) patch tokens of a stream that is (B, T, C), (B, h, w, C) or (B, C, h, w)."""
    if stream.dim() == 4 and stream.shape[-1] != channels:
        stream = stream.permute(0, 2, 3, 1)
    return stream.reshape(len(stream), -1, channels)[:, prefix:]


def bits(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def hooks_of(model: nn.Module) -> int:
    names = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_always_called",
        "_forward_hooks_with_kwargs",
    )
    return sum(len(getattr(m, n)) for m in model.modules() for n in names)


# ---------------------------------------------------------------------- every family


@by_family
def test_family(family: Family) -> None:
    model, images = family.make(), family.images()
    with torch.no_grad():
        before = bits(model(images))
    watcher = Watcher(model, images)
    assert hooks_of(model) == 0
    check_anatomy(family, watcher)

    maps = own_maps(model, images, family.maps)
    streams = streams_of(family, model, images)
    compared = {"maps": 0, "tokens": 0}

    def attention(layer) -> None:
        if layer.info.role == "channels":
            with pytest.raises(DoesNotApply, match="over channels"):
                _ = layer.attention
            return
        compare_maps(layer, watcher, maps, family.drift)
        compared["maps"] += 1

    visitors = [Visitor(frozenset({"attention"}), attention)]
    for name in ("in", "mid", "out"):
        needs = frozenset({f"tokens_{name}"})
        visitors.append(Visitor(needs, lambda layer, n=name: compare_tokens(layer, n, streams, compared)))
    after = bits(watcher.run(images, visitors))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "outputs are bit-identical"
    assert hooks_of(model) == 0
    assert compared["maps"] == sum(s.layers for s in family.stages if s.role != "channels")
    assert compared["tokens"] == sum(map(len, streams.values()))
    if family.blocks:
        assert compared["tokens"] >= len(family.blocks)


def compare_tokens(
    layer, name: str, streams: Mapping[str, Mapping[str, Tensor]], compared: dict[str, int]
) -> None:
    """One token tensor is the stream that a hook on the block saw, bit for bit."""
    expected = streams.get(layer.info.name, {}).get(name)
    if expected is None:
        return
    found = getattr(layer, f"tokens_{name}")
    assert torch.equal(found, flat(expected, layer.info.width, layer.prefix)), (layer.info.name, name)
    compared["tokens"] += 1


def check_anatomy(family: Family, watcher: Watcher) -> None:
    seen = list(watcher.anatomy.layers)
    assert len(seen) == sum(s.layers for s in family.stages)
    assert len(watcher.anatomy.others) == family.others
    expected = [s for s in family.stages for _ in range(s.layers)]
    for depth, (info, want) in enumerate(zip(seen, expected, strict=True), 1):
        facts = (
            info.heads,
            info.prefix,
            info.grid,
            info.windows,
            info.role,
            info.window,
            info.stage,
            info.depth,
        )
        wanted = (want.heads, want.prefix, want.grid, want.windows, want.role, want.window, want.stage, depth)
        assert facts == wanted, info.name
        assert info.stride == pytest.approx((want.stride, want.stride), rel=1e-4), info.name
        rows, columns = want.grid
        centres = watcher.anatomy.image_size
        assert info.positions.shape == (rows * columns, 2)
        assert info.positions.min() >= 0
        assert (info.positions.max(0) <= np.add(centres, want.stride)).all()
    for text in family.warns:
        assert any(text in w for w in watcher.anatomy.warnings), watcher.anatomy.warnings
    assert len(watcher.anatomy.warnings) == len(family.warns), watcher.anatomy.warnings


def compare_maps(layer, watcher: Watcher, maps: list[Tensor], drift: float) -> None:
    """Attention of every set of tokens is the model's own unfused map, cut and renormalised."""
    info = layer.info
    calls = watcher.layers.layers[info.index].calls
    count = len(maps)
    numbers = [c.number for c in calls]
    assert max(numbers) < count
    own = torch.cat([canonical(maps[n], info.heads // len(calls), layer.batch) for n in numbers], 1).float()
    assert own.shape[:2] == (layer.batch * info.windows, info.heads)
    plain = all((np.diff(places[0]) == 1).all() for places in (info.groups[0].queries, info.groups[0].keys))
    if info.windows == 1 and not info.padded and plain:
        torch.testing.assert_close(layer.attention_full, own, rtol=0, atol=drift)
        torch.testing.assert_close(layer.attention_full.sum(-1), torch.ones(own.shape[:3]), rtol=0, atol=1e-5)
    own = own.unflatten(0, (layer.batch, info.windows))
    seen = 0
    for part in layer.windows():
        group = part.group or info.groups[0]
        for g, (w, q, k) in enumerate(zip(group.windows, group.queries, group.keys, strict=True)):
            expected = own[:, w][:, :, q][..., k]
            expected = expected / expected.sum(-1, keepdim=True)
            found = part.unfold(part.attention)[:, g]
            torch.testing.assert_close(found, expected, rtol=0, atol=drift)
            seen += len(q)
    assert seen == info.tokens


def streams_of(family: Family, model: nn.Module, images: Tensor) -> dict[str, dict[str, Tensor]]:
    """What hooks on the blocks see: {attention module: {"in", "mid", "out": stream}}."""
    found: dict[str, dict[str, Tensor]] = {}
    pairs = []
    for path in family.blocks:
        block = model.get_submodule(path)
        names = [n for n, _ in block.named_children() if n.startswith(("attn", "attns"))]
        entry = found.setdefault(f"{path}.{names[0]}", {})

        def around(_: nn.Module, args: tuple, out: Any, entry: dict = entry) -> None:
            if args[0].shape == (out if isinstance(out, Tensor) else out[0]).shape:
                entry["in"] = args[0].clone()
            entry["out"] = (out if isinstance(out, Tensor) else out[0]).clone()

        def middle(_: nn.Module, args: tuple, out: Any, entry: dict = entry) -> None:
            entry["mid"] = args[0].clone()

        pairs.append((block, around))
        if hasattr(block, family.middle):
            pairs.append((getattr(block, family.middle), middle))
    with torch.no_grad(), hooked(*pairs):
        model(images)
    return found
