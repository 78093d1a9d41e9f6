"""What a watched model shows, as named tensors: of two images as a probe, and of a shard's images to keep."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probekit.capturing.activations import SITES, CapturedLayer, groups, token_source
from probekit.engine import DTYPES, within_memory
from probekit.errors import WatchError
from probekit.layer import Layer, Scores
from probekit.watch import Visitor, Watcher

Put = Callable[[str, Layer, str, Tensor], None]
"""put(site, layer, dataset, values of shape (images, ...))"""


def _visitors(sites: Iterable[str], put: Put, batch: int) -> list[Visitor]:
    """Visitors that hand over every site's tensors as they are in a shard.

    One visitor a site: one that waits for several would never come where the model lacks one of them.
    """

    def visit(site: str, layer: Layer) -> None:
        got = layer.captured[SITES[site]]
        if isinstance(got, Scores):
            for name in ("q", "k", "bias", "probabilities"):
                if getattr(got, name) is not None:
                    put(site, layer, name, _per_image(getattr(got, name), batch))
        elif site.startswith("tokens"):
            put(site, layer, site, got)
            prefix = layer.captured[f"prefix:{site}"]
            if prefix.size(1):
                put(site, layer, f"{site}_prefix", prefix)
        else:
            put(site, layer, site, _per_image(got, batch))

    return [Visitor(frozenset({site}), partial(visit, site)) for site in sites]


def _per_image(t: Tensor, batch: int) -> Tensor:
    """(images * windows, ...) -> (images, windows, ...); a bias of one row is every image's."""
    t = t.expand(batch, -1, -1, -1) if t.size(0) == 1 else t
    return t.unflatten(0, (batch, -1))


def _overflows(values: Tensor, cast: Tensor) -> bool:
    return not bool(cast.isfinite().all()) and bool((values.isfinite() & cast.isinf()).any())


class Probe:
    """One watched forward of two images: what there is, of which shape, and which biases are constant."""

    def __init__(self, watcher: Watcher, images: Tensor, dtype: str):
        self.anatomy = watcher.anatomy
        self.rows, self.site_rows = watcher.layer_rows(), watcher.site_rows()
        self.dtype = DTYPES[dtype]
        self.shapes: dict[int, dict[tuple[str, str], tuple[int, ...]]] = {}
        self.scales: dict[int, float] = {}
        self.biases: dict[int, Tensor] = {}
        self.wide: set[tuple[int, str]] = set()
        self.order: dict[int, dict[str, tuple[int, ...]]] = {}
        watcher.run(images, _visitors(SITES, self._put, len(images)), verify=True)

    def _put(self, site: str, layer: Layer, name: str, values: Tensor) -> None:
        index = layer.info.index
        self.shapes.setdefault(index, {})[site, name] = tuple(values.shape[1:])
        order = tuple(sorted(range(values.dim()), key=lambda axis: -values.stride(axis)))
        if order != tuple(range(values.dim())) and 0 not in values.stride():
            self.order.setdefault(index, {})[name] = order
        if _overflows(values, values.to(self.dtype)):
            self.wide.add((index, name))
        if site == "attention":
            self.scales[index] = layer.captured["scores"].scale
        if name == "bias" and bool((values == values[:1]).all()):
            self.biases[index] = values[0].float().clone()

    def layers(self, chosen: Sequence[int], sites: Sequence[str]) -> list[CapturedLayer]:
        names = groups([info.name for info in self.anatomy.layers])
        return [self._layer(i, names[i], sites) for i in chosen]

    def _layer(self, index: int, group: str, sites: Sequence[str]) -> CapturedLayer:
        found = self.shapes.get(index, {})
        came = {site for site, _ in found}
        datasets = {name: shape for (site, name), shape in found.items() if site in sites}
        scores: dict[str, Any] | None = None
        if "attention" in sites and "attention" in came:
            bias = None
            if "bias" in datasets:
                bias = "constants.h5" if index in self.biases else "shards"
            scores = {"kind": "q and k", "scale": self.scales[index], "bias": bias}
            scores = scores if ("attention", "q") in found else {"kind": "probabilities"}
            if bias == "constants.h5":
                del datasets["bias"]
        depth = self.anatomy.layers[index].depth
        token_rows = tuple(row for row in self.site_rows if token_source(row)[1] == depth)
        absent = tuple(capture for site, capture in SITES.items() if site not in came)
        order = {name: axes for name, axes in self.order.get(index, {}).items() if name in datasets}
        return CapturedLayer(index, group, self.rows[index], token_rows, datasets, scores, absent, order)


@dataclass
class ShardArrays:
    """The arrays of one shard, filled batch by batch in memory of its own.

    capacity:  images it can hold; `filled` of them are there
    constants: biases that were the same for both images of the plan, (windows, heads or 1, queries, keys)
    """

    layers: dict[int, CapturedLayer]
    capacity: int
    dtype: torch.dtype
    constants: dict[int, Tensor]
    device: torch.device
    filled: int = 0
    promoted: list[str] = field(default_factory=list)
    _buffers: dict[str, Tensor] = field(default_factory=dict)
    _came: set[str] = field(default_factory=set)

    def take(self, watcher: Watcher, sites: Sequence[str], pixels: Tensor) -> None:
        """Forward a batch and keep what it shows."""
        self._came.clear()
        with within_memory(self.device, len(pixels)):
            pixels = pixels.to(self.device, non_blocking=True)
            watcher.run(pixels, _visitors(sites, self._put, len(pixels)))
        wanted = {f"{one.group}/{name}" for one in self.layers.values() for name in one.datasets}
        wanted |= {f"{self.layers[index].group}/bias" for index in self.constants}
        if lost := sorted(wanted - self._came):
            raise WatchError(
                f"'{lost[0]}' was there in the plan and not in the run",
                hint="a model whose layers depend on its input can't be captured",
            )
        self.filled += len(pixels)

    def arrays(self) -> tuple[dict[str, np.ndarray], set[str]]:
        """What was filled, and which of it is bfloat16 bits."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the copies into pinned memory
        half = {key for key, t in self._buffers.items() if t.dtype == torch.bfloat16}
        plain = {key: t.view(torch.uint16) if key in half else t for key, t in self._buffers.items()}
        return {key: t[: self.filled].numpy() for key, t in plain.items()}, half

    def _put(self, site: str, layer: Layer, name: str, values: Tensor) -> None:
        one = self.layers.get(layer.info.index)
        if one is None:
            return
        key = f"{one.group}/{name}"
        if key in self._came:
            return  # q or k, chosen beside attention
        self._came.add(key)
        if site == "attention" and one.scores["kind"] == "q and k":
            self._same(layer.captured["scores"].scale == one.scores["scale"], key)
        before = None
        if name == "bias":
            before = self.constants.get(one.index)
            self._same(before is not None or name in one.datasets, key)
            if before is not None and key not in self._buffers and _all_equal(values, before):
                return
        shape = one.datasets[name] if before is None else tuple(before.shape)
        self._same(tuple(values.shape[1:]) == shape, key)
        self._keep(key, values, before)

    def _keep(self, key: str, values: Tensor, before: Tensor | None) -> None:
        """Copy into the shard; `before` is what the images had that came earlier."""
        buffer = self._buffers.get(key)
        if buffer is None:
            buffer = self._new(values.shape[1:], self.dtype if before is None else torch.float32)
            if before is not None:
                buffer[: self.filled] = before.cpu()
        cast = values.to(buffer.dtype)
        if buffer.dtype != torch.float32 and _overflows(values, cast):
            self.promoted.append(key)
            cast = values.float()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            wide = self._new(values.shape[1:], torch.float32)
            wide[: self.filled] = buffer[: self.filled]
            buffer = wide
        buffer[self.filled : self.filled + len(values)].copy_(cast, non_blocking=True)
        self._buffers[key] = buffer

    def _new(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(self.capacity, *shape, dtype=dtype, pin_memory=self.device.type == "cuda")

    @staticmethod
    def _same(same: bool, key: str) -> None:
        if not same:
            raise WatchError(
                f"'{key}' has another shape or scale in the run than in the plan",
                hint="a model whose layers depend on its input can't be captured",
            )


def _all_equal(values: Tensor, constant: Tensor) -> bool:
    values = values[:1] if values.stride(0) == 0 else values
    return bool((values == constant).all())
