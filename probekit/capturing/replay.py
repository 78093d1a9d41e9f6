"""Layers read back from a capture: the same metrics, without the model.

    captured = Captured(Path("captures/moco"))
    captured.run(torch.arange(16), [Visitor(frozenset({"attention"}), on_layer)])
    replay(Path("captures/moco"), ["nmi"], catalog, Path("runs/moco"))

A batch is numbers of images instead of pixels; otherwise a capture is used as a `Watcher` is. From a capture
in float32 come the same bits as from the model (same device, batch size and library versions).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probekit.anatomy import Anatomy
from probekit.capturing.activations import (
    SITES,
    CapturedLayer,
    CaptureFolder,
    dataset_of,
    expected,
    ranges,
    token_source,
)
from probekit.cell import run_cell
from probekit.datasets.images import Bad, Batch
from probekit.engine import numerics, pick_device
from probekit.errors import StoreError, UsageError
from probekit.events import Listener, nobody
from probekit.execution import finish_run
from probekit.grid import Resolved, make_grid
from probekit.jobs import choose_metrics
from probekit.layer import Layer, Scores
from probekit.metric import Metric, Row, Traces
from probekit.names import parse_dataset, parse_model
from probekit.plugins.catalog import Catalog, Entry
from probekit.store.cells import CellFolder, identity_hash
from probekit.store.runfolder import Run, create_run
from probekit.store.shards import map_shard
from probekit.store.writing import RunLock, read_shard, shard_problem
from probekit.subject import View, device_name, versions
from probekit.watch import Visitor

_AGAIN = "the same `probekit capture` command writes what is missing"
_HELD_AS = {capture: site for site, capture in SITES.items()}


class Captured:
    """A capture as a source of layers (`probekit.subject.Source`) and as what a run measures (`Subject`).

    path:    the capture's folder
    device:  where layers are put
    anatomy: of the whole model; `layer_rows` and `site_rows` are of the captured layers

    Raises `StoreError` for a folder that is no capture, is damaged, newer or unfinished.
    """

    def __init__(self, path: Path, device: torch.device | str = "cpu"):
        self.folder, self.device = CaptureFolder(Path(path)), torch.device(device)
        about = self.folder.read() if self.folder.path.is_dir() else None
        if about is None:
            raise StoreError(
                f"'{path}' holds no capture", hint="`probekit capture MODEL --out DIR` makes one"
            )
        self.info: dict[str, Any] = about
        try:
            self.anatomy = Anatomy.from_json(about["anatomy"])
            self.layers = [CapturedLayer.from_json(one) for one in about["layers"]]
            self.indices = list(range(int(about["identity"]["count"])))
            self._ranges = ranges(about)
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"capture file '{self.folder.path / 'capture.json'}' is damaged: {error}"
            ) from error
        self._tag = identity_hash(about["identity"])
        self._maps: dict[int, dict[str, np.ndarray]] = {}
        self._needed: set[str] = set()
        self._read_headers()
        self._constants = self._read_constants()

    def _read_headers(self) -> None:
        """Which shard and row every image is in, which datasets each shard has, and what couldn't be read."""
        self._shard = np.full(len(self.indices), -1)
        self._row = np.zeros(len(self.indices), dtype=np.int64)
        self._bfloat16: list[frozenset[str]] = []
        self._biases: list[frozenset[str]] = []
        self.bad: dict[int, Bad] = {}
        for k, images in enumerate(self._ranges):
            if problem := shard_problem(self.folder.shard(k), expected(self._tag, images)):
                raise StoreError(f"the capture '{self.folder.path}' is unfinished: {problem}", hint=_AGAIN)
            found = read_shard(self.folder.shard(k), ["index"])
            index = found.arrays["index"]
            self._shard[index], self._row[index] = k, np.arange(len(index))
            self._bfloat16.append(found.bfloat16)
            self._biases.append(frozenset(found.attrs["biases"]))
            for one in found.attrs["bad"]:
                self.bad[one["index"]] = Bad(one["index"], one["id"], one["reason"])

    def _read_constants(self) -> dict[str, Tensor]:
        if not any(one.scores and one.scores.get("bias") == "constants.h5" for one in self.layers):
            return {}
        found = read_shard(self.folder.constants)
        if found.attrs.get("capture") != self._tag:
            raise StoreError(f"'{self.folder.constants}' belongs to another capture", hint=_AGAIN)
        return {name: torch.from_numpy(array).to(self.device) for name, array in found.arrays.items()}

    # ------------------------------------------------------------------ a source of layers

    def layer_rows(self) -> list[Row]:
        return [one.row for one in self.layers]

    def site_rows(self) -> list[Row]:
        return [row for one in self.layers for row in one.sites]

    def output_rows(self) -> list[Row]:
        return []

    def output_layer(self, out: Any, batch: int) -> Layer:
        raise UsageError("the capture holds no output of the model")

    def run(self, batch: Tensor, visitors: Sequence[Visitor]) -> None:
        """Call each visitor at each layer, or token site, of the images whose numbers `batch` (B,) holds.

        Raises `UsageError` for what the capture doesn't hold, `StoreError` for a damaged shard.
        """
        numbers = batch.cpu().numpy()
        if (self._shard[numbers] < 0).any():
            raise UsageError(f"image {int(numbers[self._shard[numbers] < 0][0])} is not in the capture")
        for visitor in visitors:
            if lacking := self._lacking(visitor):
                raise UsageError(f"the capture holds no '{lacking}'")
        captures = frozenset().union(*(v.captures for v in visitors))
        self._needed = {f"{one.group}/{name}" for one in self.layers for name in one.stored(captures)}
        sites = [v for v in visitors if "tokens" in v.needs]
        others = [v for v in visitors if "tokens" not in v.needs]
        for one in self.layers:
            info, read = self.anatomy.layers[one.index], _Reader(self, one, numbers)
            for row in one.sites if sites else ():
                source, _ = token_source(row)
                found = read(source)
                tokens = {"tokens": found[source], "prefix:tokens": found[f"prefix:{source}"]}
                layer = Layer(info, row, len(numbers), tokens)
                for visitor in sites:
                    visitor.visit(layer)
            ready = [v for v in others if not v.captures & set(one.absent)]
            captured: dict[str, object] = {}
            for name in sorted(frozenset().union(*(v.captures for v in ready))):
                captured |= read(name)
            layer = Layer(info, one.row, len(numbers), captured)
            for visitor in ready:
                visitor.visit(layer)

    def _lacking(self, visitor: Visitor) -> str:
        """The first site that a visitor needs and the capture lacks."""
        for one in self.layers:
            for name in sorted(visitor.captures - {"tokens"}):
                if not one.holds(name):
                    return _HELD_AS[name]
            for row in one.sites if "tokens" in visitor.captures else ():
                if not one.holds(token_source(row)[0]):
                    return token_source(row)[0]
        return ""

    def rows_of(self, name: str, numbers: np.ndarray, default: Tensor | None = None) -> Tensor:
        """One dataset's rows of some images, float32 on the device; `default` for those of shards without it.

        A dataset is compared with its checksum when it is first read.
        """
        shards = self._shard[numbers]
        parts = []
        for k in np.unique(shards).tolist():
            own = numbers[shards == k]
            if default is not None and name not in self._biases[k]:
                parts.append(default.expand(len(own), *default.shape))
                continue
            t = torch.from_numpy(np.ascontiguousarray(self._map(k, name)[self._row[own]]))
            t = t.view(torch.bfloat16) if name in self._bfloat16[k] else t
            parts.append(t.to(self.device).float())
        if len(parts) == 1:
            return parts[0]
        place = np.argsort(np.argsort(shards, kind="stable"))
        return torch.cat(parts)[torch.from_numpy(place).to(self.device)]

    def _map(self, k: int, name: str) -> np.ndarray:
        """A dataset of shard k. All that is needed of a shard is mapped at once: opening HDF5 is slow."""
        maps = self._maps.setdefault(k, {})
        if name not in maps:
            names = {n for n in self._needed if not n.endswith("/bias") or n in self._biases[k]} | {name}
            fresh = sorted(n for n in names if n not in maps)
            maps |= map_shard(self.folder.shard(k), fresh, verify=True)
            while len(self._maps) > 2:  # a batch may lie in two shards
                self._maps.pop(next(iter(self._maps)))
        return maps[name]

    def has_own(self, name: str, numbers: np.ndarray) -> bool:
        """Whether a bias differs from the constant one somewhere in the shards of these images."""
        return any(name in self._biases[k] for k in np.unique(self._shard[numbers]))

    def constant(self, name: str) -> Tensor | None:
        return self._constants.get(name)

    # ------------------------------------------------------------------ what a run measures

    @property
    def model(self) -> str:
        return self.info["identity"]["model"]

    @property
    def dataset(self) -> str:
        return self.info["identity"]["dataset"]

    def identity(self) -> dict[str, Any]:
        """The model's and images', with how they were stored: never taken for a live run's."""
        found = {k: v for k, v in self.info["identity"].items() if k not in ("sites", "stored")}
        return found | {"dtype": f"{found['dtype']}, captured as {self.info['identity']['stored']}"}

    def lacks(self, metric: Metric) -> str:
        lacking = self._lacking(Visitor(frozenset(metric.needs), lambda layer: None))
        if lacking:
            return f"the capture holds no '{lacking}'"
        if "output" in metric.needs:
            return "the capture holds no 'output'"
        if "labels" in metric.requires and self.info["labels"] is None:
            return "the captured images have no labels"
        beyond = sorted(set(metric.requires) - {"labels"})
        if beyond or metric.variations():
            return f"a capture holds the measured images alone, no {beyond[0] if beyond else 'variations'}"
        return ""

    def view(self, view: View) -> Captured:
        return self

    def active(self) -> AbstractContextManager[None]:
        return numerics(self.device, self.info["settings"]["dtype"] or "float32")

    def listed(self) -> tuple[list[str], list[int] | None]:
        return self.info["ids"], self.info["labels"]

    def completed(self, traces: Traces) -> Traces:
        return replace(traces, classes=self.info["classes"], device=str(self.device))

    def watch(self) -> tuple[Captured, Tensor]:
        held = np.flatnonzero(self._shard >= 0)
        return self, torch.from_numpy(held[:2])

    def batches(self, chosen: Sequence[int], batch_size: int, workers: int = 0) -> Iterator[Batch]:
        """As `probekit.datasets.images` cuts them, unreadable ones counted in; `pixels` are numbers."""
        for start in range(0, len(chosen), batch_size):
            part = chosen[start : start + batch_size]
            kept = [i for i in part if i not in self.bad]
            yield Batch(
                kept, torch.tensor(kept, dtype=torch.int64), [self.bad[i] for i in part if i in self.bad]
            )

    def about(self, source: Any, batch_size: int) -> dict[str, Any]:
        kept = (
            "weights",
            "objective",
            "citation",
            "licence",
            "pack",
            "anatomy",
            "ids",
            "labels",
            "classes",
            "notes",
        )
        origin = {name: self.info[name] for name in ("device", "versions", "batch_size")}
        return {
            **{name: self.info[name] for name in kept},
            "capture": {
                **origin,
                "stored": self.info["identity"]["stored"],
                "layers": [one.group for one in self.layers],
            },
            "batch_size": batch_size,
            "device": device_name(self.device),
            "versions": versions(),
        }


class _Reader:
    """Reads one layer's captures for one batch, each once, under the watcher's names."""

    def __init__(self, captured: Captured, layer: CapturedLayer, numbers: np.ndarray):
        self._captured, self._layer, self._numbers = captured, layer, numbers
        self._found: dict[str, Tensor] = {}

    def __call__(self, capture: str) -> dict[str, object]:
        if capture == "scores":
            return {"scores": self._scores()}
        name = dataset_of(capture)
        values = self._get(name)
        if not capture.startswith("tokens"):
            return {capture: values.flatten(0, 1)}
        has_prefix = f"{name}_prefix" in self._layer.datasets
        return {
            capture: values,
            f"prefix:{capture}": self._get(f"{name}_prefix") if has_prefix else values[:, :0],
        }

    def _get(self, name: str) -> Tensor:
        key = f"{self._layer.group}/{name}"
        if key not in self._found:
            values = self._captured.rows_of(key, self._numbers)
            order = self._layer.order.get(name)
            if order is not None:  # as it lay in the model's memory
                values = (
                    values.permute(order).contiguous().permute([order.index(a) for a in range(len(order))])
                )
            self._found[key] = values
        return self._found[key]

    def _scores(self) -> Scores:
        recipe = self._layer.scores
        if recipe["kind"] == "probabilities":
            return Scores(probabilities=self._get("probabilities").flatten(0, 1))
        q, k = self._get("q").flatten(0, 1), self._get("k").flatten(0, 1)
        return Scores(q, k, recipe["scale"], self._bias() if recipe["bias"] else None)

    def _bias(self) -> Tensor:
        name = f"{self._layer.group}/bias"
        constant = self._captured.constant(name)
        if constant is not None and constant.size(0) == 1 and not self._captured.has_own(name, self._numbers):
            return constant
        return self._captured.rows_of(name, self._numbers, constant).flatten(0, 1)


def replay(
    path: Path,
    metrics: Sequence[str],
    catalog: Catalog,
    out: Path,
    listen: Listener = nobody,
    *,
    device: str = "auto",
    batch_size: int | None = None,
) -> Run:
    """Measure metrics on a capture into the run folder `out`, doing only what is missing there.

    The run names the capture's model and dataset and says how the activations were stored. A metric that
    needs what the capture doesn't hold "does not apply". batch_size: by default the capture's.

    Raises `StoreError`, `UsageError`, `PluginError`.
    """
    captured = Captured(Path(path), pick_device(device))
    entries = catalog.select("metrics", metrics)
    made = choose_metrics(entries, catalog)
    settings = {k: v for k, v in captured.info["settings"].items() if v is not None}
    names = {
        "models": [captured.model],
        "datasets": [captured.dataset],
        "metrics": [str(e.ref) for e in entries],
    }
    batch = batch_size or captured.info["batch_size"]
    grid = make_grid({**names, **settings, "device": device, "batch_size": batch}, "the capture")
    model = Entry(None, "", "", parse_model(captured.model))
    dataset = Entry(None, "", "", parse_dataset(captured.dataset))
    with RunLock(Path(out)):
        create_run(Path(out), Resolved(grid, (model,), tuple(entries), (dataset,)), versions())
        folder = CellFolder(Path(out), captured.model, captured.dataset)
        run_cell(folder, lambda: captured, made, grid, listen)
        return finish_run(Run(out), made, listen)
