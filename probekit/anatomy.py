"""What a model's attention looks like from outside: layers, heads, prefix tokens, grids, windows.

Plain data, without torch: it is stored with every capture and printed by ``probekit inspect``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

Role = Literal["tokens", "pooled keys", "channels", "untraced"]
"""Between patch tokens; of patch tokens to pooled ones; over channels (XCiT); positions lost on the way."""


@dataclass(frozen=True)
class Declared:
    """What a pack says about its model because it can't be inferred.

    parts: module path prefixes and the part they are, ``{"decoder_blocks": "decoder"}``
    """

    parts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class WindowGroup:
    """Equal-sized sets of tokens that attend among themselves: windows, or a shifted window's regions.

    windows: (G,) which of the model's windows each set lies in
    queries: (G, n) places of its tokens among that window's queries
    keys:    (G, m) places of its keys among that window's keys
    tokens:  (G, n) the same queries as patch numbers in raster order
    key_positions: (G, m, 2) row and column of the keys in pixels
    """

    windows: np.ndarray
    queries: np.ndarray
    keys: np.ndarray
    tokens: np.ndarray
    key_positions: np.ndarray

    @property
    def size(self) -> int:
        return self.queries.shape[1]


@dataclass(frozen=True)
class LayerInfo:
    """One attention layer.

    depth:     1-based, counted over the whole model
    positions: (N, 2) row and column centres of the patch tokens in input pixels, raster order
    grid:      rows and columns of tokens; None where the tokens form no full grid (masked MAE)
    stride:    pixels between neighbouring tokens, (rows, columns)
    windows:   how many windows an image has (1: global attention)
    groups:    which tokens attend to which, by size; one group of one set when attention is global
    padded:    keys that stand for padding, dropped from every map
    """

    index: int
    name: str
    depth: int
    part: str
    stage: int
    role: Role
    kind: str
    heads: int
    prefix: int
    width: int | None
    grid: tuple[int, int] | None
    stride: tuple[float, float] | None
    positions: np.ndarray
    windows: int
    groups: tuple[WindowGroup, ...]
    padded: int = 0
    masked: bool = False
    sites: tuple[str, ...] = ("in", "mid", "out")
    starts: bool = False
    note: str = ""

    @property
    def tokens(self) -> int:
        return len(self.positions)

    @property
    def window(self) -> str:
        """The window as people say it: ``global``, ``7x7``, ``7x7 dilated``, ``7x7, masked regions``."""
        if self.windows == 1 or not self.groups:
            return "global"
        places = self.positions[max(self.groups, key=lambda g: g.size).tokens[0]]
        rows, columns = (len(np.unique(axis)) for axis in places.T)
        text = f"{rows}x{columns}" if rows * columns == len(places) else f"{len(places)} tokens"
        apart = np.ptp(places, axis=0) > 1.25 * np.multiply(self.stride or (1, 1), (rows - 1, columns - 1))
        if self.stride is not None and apart.any():
            text += " dilated"
        return f"{text}, masked regions" if self.masked else text


@dataclass(frozen=True)
class Anatomy:
    """The ordered attention layers of a model at one input size, and what was seen besides them.

    others: attention that isn't a layer of patch tokens (class attention, attention pooling), with why
    warnings: what a reader of the numbers should know (padded keys, positions not traced)
    """

    image_size: tuple[int, int]
    layers: tuple[LayerInfo, ...]
    others: tuple[Mapping[str, str], ...] = ()
    warnings: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers, from which `from_json` rebuilds the same anatomy."""

        def plain(value: Any) -> Any:
            if isinstance(value, np.ndarray):
                return value.tolist()
            if isinstance(value, dict):
                return {k: plain(v) for k, v in value.items()}
            if isinstance(value, (list, tuple)):
                return [plain(v) for v in value]
            return value

        return plain(asdict(self))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Anatomy:
        layers = []
        for raw in data["layers"]:
            groups = tuple(
                WindowGroup(
                    **{
                        k: np.asarray(v, dtype=np.float64 if k == "key_positions" else np.int64)
                        for k, v in g.items()
                    }
                )
                for g in raw["groups"]
            )
            pairs = {k: tuple(raw[k]) if raw[k] is not None else None for k in ("grid", "stride", "sites")}
            positions = np.asarray(raw["positions"], dtype=np.float64).reshape(-1, 2)
            layers.append(LayerInfo(**{**raw, **pairs, "groups": groups, "positions": positions}))
        return cls(tuple(data["image_size"]), tuple(layers), tuple(data["others"]), tuple(data["warnings"]))
