"""What is measured or captured: one model on chosen images of one dataset, loaded, identified, watched."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Protocol

import torch
from torch import Tensor

from probekit.anatomy import Anatomy
from probekit.datasets import images as image_loading
from probekit.datasets.dataset import BadImage, Dataset, select
from probekit.errors import DataError, WatchError
from probekit.events import Event, Listener
from probekit.grid import Grid
from probekit.metric import Metric, Row
from probekit.models.model import Model, load_model
from probekit.plugins.catalog import Catalog, Entry
from probekit.specs import ModelSpec, Preprocessing
from probekit.watch import Visitor, Watcher

LACKING = "the capture holds no"
"""How the reason begins of a metric that another capture could give."""


class Source(Protocol):
    """Where layers come from: a watched model (`probekit.Watcher`) or a capture (`Captured`)."""

    def layer_rows(self) -> list[Row]: ...

    def site_rows(self) -> list[Row]: ...

    def run(self, batch: Tensor, visitors: Sequence[Visitor]) -> Any:
        """Show every layer of a batch (of pixels; of image numbers in a capture) to the visitors."""


class Subject(Protocol):
    """One model on one dataset.

    indices: the images used, as indices of the dataset
    device:  where layers are measured
    """

    indices: list[int]
    device: torch.device

    def identity(self) -> dict[str, Any]:
        """All that the numbers depend on."""

    def lacks(self, metric: Metric) -> str:
        """Why a metric can't be measured here at all; "" when it can be tried."""

    def watch(self) -> tuple[Source, Tensor]:
        """A source of layers, and a batch of two images to try it on."""

    def batches(self, chosen: Sequence[int], batch_size: int, workers: int = 0) -> Iterator[Any]:
        """Batches of the images `chosen`, in order (`probekit.datasets.images.Batch`)."""

    def about(self, source: Source, batch_size: int) -> dict[str, Any]:
        """What cell.json says."""


@dataclass
class Live:
    """A `Subject` that is forwarded. Make one with `load`."""

    model_name: str
    dataset_name: str
    model: Model
    pack: str
    dataset: Dataset
    indices: list[int]
    grid: Grid
    device: torch.device
    listen: Listener

    @classmethod
    def load(
        cls,
        model: Entry,
        dataset: tuple[Entry, Dataset],
        grid: Grid,
        catalog: Catalog,
        device: torch.device,
        listen: Listener,
    ) -> Live:
        """Load the model. Raises `DataError` for a dataset without images, and what `load_model` raises."""
        entry, images = dataset
        indices = select(len(images), grid.limit)
        if not indices:
            raise DataError(f"dataset '{entry.ref}' has no images")
        loaded = load_model(model.ref, catalog, seed=grid.seed, image_size=grid.image_size)
        pack = f"{model.pack} {model.version}".strip()
        return cls(str(model.ref), str(entry.ref), loaded, pack, images, indices, grid, device, listen)

    @property
    def preprocessing(self) -> Preprocessing:
        return self.model.preprocessing or Preprocessing()

    def identity(self) -> dict[str, Any]:
        return {
            "model": self.model_name,
            "weights": self.model.weights.sha256,
            "dataset": self.dataset_name,
            "images": self.dataset.fingerprint(self.indices),
            "count": len(self.indices),
            "preprocessing": self.preprocessing.model_dump(mode="json"),
            "dtype": self.grid.dtype,
        }

    def lacks(self, metric: Metric) -> str:
        return ""

    def watch(self) -> tuple[Watcher, Tensor]:
        """The plan is made on the first two images that can be read, whatever shard is measured next."""
        found: list[Tensor] = []
        for batch in self.batches(self.indices, 1):
            found += list(batch.pixels)
            if len(found) == 2:
                break
        if not found:
            raise DataError(f"no image of dataset '{self.dataset_name}' can be read")
        pixels = torch.stack(found).to(self.device)
        watcher = Watcher(
            self.model.module.to(self.device),
            pixels,
            forward=self.model.forward,
            declared_parts=self.model.declared.parts if self.model.declared else None,
            allow_unwatched=self.grid.allow_unwatched,
        )
        check_spec(self.model.spec, watcher.anatomy)
        for warning in watcher.anatomy.warnings:
            self.listen(Event("warning", self.model_name, self.dataset_name, text=warning))
        return watcher, pixels

    def batches(
        self, chosen: Sequence[int], batch_size: int, workers: int = 0
    ) -> Iterator[image_loading.Batch]:
        source = image_loading.batches(
            self.dataset,
            chosen,
            self.preprocessing,
            batch_size=batch_size,
            workers=workers,
            on_bad=self.grid.on_bad_image,
        )
        try:
            with contextlib.closing(source):
                yield from source
        except BadImage as error:
            error.contained = False  # asked for: --on-bad-image fail ends the run
            raise

    def about(self, source: Watcher, batch_size: int) -> dict[str, Any]:
        spec, weights, dataset = self.model.spec, self.model.weights, self.dataset
        return {
            "weights": {"kind": weights.kind, "source": weights.source, "note": weights.note},
            "objective": spec.objective if spec else "other",
            "citation": spec.citation if spec else None,
            "licence": spec.weights.licence if spec and spec.weights else None,
            "pack": self.pack,
            "anatomy": source.anatomy.to_json(),
            "ids": [dataset.ids[i] for i in self.indices],
            "labels": [int(dataset.labels[i]) for i in self.indices] if dataset.labels is not None else None,
            "classes": list(dataset.classes) if dataset.classes is not None else None,
            "notes": list(dataset.notes),
            "batch_size": batch_size,
            "device": device_name(self.device),
            "versions": versions(),
        }


def check_spec(spec: ModelSpec | None, anatomy: Anatomy) -> None:
    """Raise `WatchError` when a model hasn't the heads and layers its pack declares (`ModelSpec`)."""
    if spec is None:
        return
    encoder = [layer for layer in anatomy.layers if layer.part == "encoder"] or list(anatomy.layers)
    stages = tuple(dict((layer.stage, layer.heads) for layer in encoder).values())
    declared = (spec.heads,) if isinstance(spec.heads, int) else spec.heads
    if declared is not None and declared != stages:
        found, wanted = ("/".join(map(str, heads)) for heads in (stages, declared))
        wrong = f"{found} heads, but its pack declares {wanted}"
    elif spec.layers not in (None, len(encoder), len(anatomy.layers)):
        wrong = f"{len(encoder)} layers, but its pack declares {spec.layers}"
    else:
        return
    raise WatchError(
        f"model '{spec.full_name}' has {wrong}", hint="`probekit doctor` shows the versions to report"
    )


def open_dataset(entry: Entry, catalog: Catalog) -> Dataset:
    """The dataset an entry names. Raises `DataError`, `PluginError` or `UsageError`."""
    dataset = catalog.resolve_target(entry)(entry.ref.argument, **entry.options)
    dataset.check()
    return dataset


def versions() -> Mapping[str, str]:
    """What the numbers were made with."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("vit-probekit", "torch", "timm", "numpy", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def default_batch(device: torch.device) -> int:
    """Images per forward pass where nobody says."""
    return 16 if device.type == "cpu" else 64


def device_name(device: torch.device) -> str:
    """``NVIDIA H100 80GB HBM3``, ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
