"""A folder of captured activations: what it holds and where. Reads without torch.

    capture.json             model, weights, images, preprocessing, anatomy, sites, layers, dtype, scores
    constants.h5             LAYER/bias: additive biases that are the same for every image
    shards/shard-00000.h5    LAYER/DATASET of a fixed range of images; `index` (in capture.json's ids), `ids`

LAYER is the attention module's path, ``blocks.0.attn``. Datasets, their first axis the images:

    q, k, v, head_outputs    (images, windows, heads, tokens, d), all tokens as the model has them;
                             windows is 1 where attention is global; q and k as the scores used them
    probabilities            (images, windows, heads, queries, keys), where the model has no fused attention
    bias                     (images, windows, heads or 1, queries, keys), where it differs between images
    tokens_in, tokens_mid, tokens_out      (images, N, channels), patch tokens in raster order
    tokens_in_prefix, ...                  (images, P, channels), prefix tokens, CLS first

Attention is softmax(scale * q k^T + bias), scale and place of the bias being in capture.json.
bfloat16 is stored as its bits (uint16) with the attribute ``dtype``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from probekit.errors import StoreError, UsageError
from probekit.metric import Row
from probekit.names import did_you_mean
from probekit.store.sealing import foreign_files
from probekit.store.shards import shard_name, shard_ranges
from probekit.store.writing import read_json, seal_json

FORMAT = "probekit-capture"
FORMAT_VERSION = 1

SITES: Mapping[str, str] = {
    "attention": "scores",
    "q": "q",
    "k": "k",
    "v": "v",
    "head_outputs": "heads",
    "tokens_in": "tokens_in",
    "tokens_mid": "tokens_mid",
    "tokens_out": "tokens_out",
}
"""What can be captured, with the watcher's name for it."""

STORED = ("float16", "bfloat16", "float32")

_TOKEN_SITES = {"embed": ("tokens_in", 1.0), "mid": ("tokens_mid", 0.5), "out": ("tokens_out", 0.0)}
_SHORT = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "float": "float32"}


@dataclass(frozen=True)
class CapturedLayer:
    """One layer of a capture.

    index:    its place among the anatomy's layers
    group:    its HDF5 group
    row:      its entry on the layer axis
    sites:    token sites of the layer that a metric on tokens is measured at
    datasets: shape per image of every dataset in a shard
    scores:   how attention is stored: ``{"kind": "q and k", "scale": 0.125, "bias": None}``, bias being None,
              "constants.h5" or "shards"; ``{"kind": "probabilities"}``; None where it isn't
    absent:   what the model doesn't have in this layer, by the watcher's names
    order:    axes of a dataset as they lay in the model's memory, outermost first, where not as stored:
              sums over values that lie otherwise may differ in their last bit
    """

    index: int
    group: str
    row: Row
    sites: tuple[Row, ...]
    datasets: Mapping[str, tuple[int, ...]]
    scores: Mapping[str, Any] | None
    absent: tuple[str, ...]
    order: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        shapes = {name: list(shape) for name, shape in self.datasets.items()}
        rows = {"row": _row_json(self.row), "sites": [_row_json(row) for row in self.sites]}
        order = {name: list(axes) for name, axes in self.order.items()}
        return {**asdict(self), **rows, "datasets": shapes, "absent": list(self.absent), "order": order}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CapturedLayer:
        return cls(
            data["index"],
            data["group"],
            _row(data["row"]),
            tuple(_row(row) for row in data["sites"]),
            {name: tuple(shape) for name, shape in data["datasets"].items()},
            data["scores"],
            tuple(data["absent"]),
            {name: tuple(axes) for name, axes in data["order"].items()},
        )

    def holds(self, capture: str) -> bool:
        """Whether the watcher's `capture` can be read back, or isn't in the model either."""
        if capture in self.absent:
            return True
        return self.scores is not None if capture == "scores" else dataset_of(capture) in self.datasets

    def stored(self, captures: Collection[str]) -> list[str]:
        """The datasets from which captures are read back; ``"tokens"`` is every token site's."""
        wanted = {dataset_of(capture) for capture in captures}
        if "tokens" in captures:
            wanted |= {token_source(row)[0] for row in self.sites}
        if "scores" in captures:
            wanted |= (
                {"q", "k", "bias"} if (self.scores or {}).get("kind") == "q and k" else {"probabilities"}
            )
        return [name for name in self.datasets if name.removesuffix("_prefix") in wanted]


def dataset_of(capture: str) -> str:
    """The dataset's name of what the watcher calls `capture`."""
    return {"heads": "head_outputs"}.get(capture, capture)


def _row_json(row: Row) -> dict[str, Any]:
    stride = [None if s != s else s for s in row.stride]  # JSON has no NaN
    return {**asdict(row), "grid": list(row.grid), "stride": stride}


def _row(data: Mapping[str, Any]) -> Row:
    stride = tuple(float("nan") if s is None else s for s in data["stride"])
    return Row(**{**data, "grid": tuple(data["grid"]), "stride": stride})


def token_source(row: Row) -> tuple[str, int]:
    """Of a token site: the site that is captured for it, and the depth of its layer."""
    site, before = _TOKEN_SITES[row.site]
    return site, round(row.depth + before)


@dataclass(frozen=True)
class CaptureFolder:
    """Where the parts of a capture are."""

    path: Path

    @property
    def constants(self) -> Path:
        return self.path / "constants.h5"

    def shard(self, index: int) -> Path:
        return self.path / "shards" / shard_name(index)

    def read(self) -> dict[str, Any] | None:
        """capture.json, or None before a capture has begun.

        Raises `StoreError` for a damaged or newer one, and for a folder that holds something else.
        """
        file = self.path / "capture.json"
        if file.exists():
            found = read_json(file, "capture", FORMAT_VERSION)
            if not isinstance(found, dict) or found.get("format") != FORMAT:
                raise StoreError(f"'{file}' is no capture of probekit")
            return found
        if foreign := foreign_files(self.path):
            hint = "`probekit capture` makes one in an empty folder"
            raise StoreError(f"'{self.path}' holds other files ('{foreign[0]}') and no capture", hint=hint)
        return None

    def write(self, content: Mapping[str, Any]) -> None:
        seal_json(self.path / "capture.json", {"format": FORMAT, "format_version": FORMAT_VERSION, **content})


def expected(tag: str, images: range) -> dict[str, Any]:
    """What a shard must say to belong to a capture."""
    return {"capture": tag, "start": images.start, "stop": images.stop}


def ranges(about: Mapping[str, Any]) -> list[range]:
    """The images of each shard."""
    return shard_ranges(int(about["identity"]["count"]), int(about["per_shard"]))


def groups(names: Sequence[str]) -> list[str]:
    """An HDF5 group for every layer, its module path where that is possible and unique."""
    taken: dict[str, int] = {}
    chosen = []
    for name in names:
        clean = re.sub(r"[\x00-\x1f/]", "_", name).strip(".") or "model"
        taken[clean] = taken.get(clean, 0) + 1
        chosen.append(clean if taken[clean] == 1 else f"{clean}#{taken[clean]}")
    return chosen


def parse_sites(asked: str | Sequence[str]) -> tuple[str, ...]:
    """``attention,tokens_out`` or ``all``, in a fixed order. Raises `UsageError`."""
    texts = [asked] if isinstance(asked, str) else list(asked)
    names = [part.strip() for text in texts for part in text.split(",") if part.strip()]
    if not names:
        raise UsageError("no site is named", hint=f"sites are {', '.join(SITES)}")
    for name in names:
        if name not in SITES and name != "all":
            hint = did_you_mean(name, [*SITES, "all"]) or f"sites are {', '.join(SITES)}"
            raise UsageError(f"unknown site '{name}'", hint=hint)
    return tuple(site for site in SITES if site in names or "all" in names)


def parse_dtype(text: str) -> str:
    """``float16``, ``bf16``... Raises `UsageError`."""
    name = _SHORT.get(text.lower(), text.lower())
    if name not in STORED:
        raise UsageError(f"activations can't be stored as '{text}'", hint=f"take {', '.join(STORED)}")
    return name


def parse_layers(text: str | int | Sequence[int]) -> list[int | slice]:
    """``0,3,-1``, ``0:4``, ``::2``, ``all``: places counted from 0, from the end when negative.

    Raises `UsageError`. `choose_layers` says which layers of a model they are.
    """
    hint = "write --layers all, 0,3,-1 or 0:4"
    parts = [str(text)] if isinstance(text, (str, int)) else [str(part) for part in text]
    found: list[int | slice] = []
    for part in (piece.strip() for one in parts for piece in one.split(",")):
        if part == "all":
            found.append(slice(None))
            continue
        numbers = part.split(":")
        try:
            values = [int(n) if n.strip() or len(numbers) == 1 else None for n in numbers]
        except ValueError:
            values = []
        if not values or len(values) > 3 or values[2:] == [0]:
            raise UsageError(f"'{part}' names no layer", hint=hint)
        found.append(slice(*values) if len(values) > 1 else values[0])
    return found


def choose_layers(selectors: Sequence[int | slice], count: int) -> list[int]:
    """Indices of `count` layers, in order, each once. Raises `UsageError` for one that isn't there."""
    chosen: set[int] = set()
    for selector in selectors:
        if isinstance(selector, slice):
            picked = list(range(count))[selector]
            if not picked:
                text = ":".join("" if n is None else str(n) for n in (selector.start, selector.stop))
                raise UsageError(f"layers '{text}' are none of the model's {count}")
            chosen.update(picked)
        elif -count <= selector < count:
            chosen.add(selector % count)
        else:
            hint = f"layers are 0 to {count - 1}, or -1 for the last"
            raise UsageError(f"the model has {count} layers, so no layer {selector}", hint=hint)
    return sorted(chosen)
