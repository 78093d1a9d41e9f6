"""What is measured or captured: one model on chosen images of one dataset, loaded, identified, watched."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import metadata
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from probekit.anatomy import Anatomy
from probekit.datasets import images as image_loading
from probekit.datasets.dataset import BadImage, Dataset, fingerprint_of, renumbered, select
from probekit.engine import numerics, within_memory
from probekit.errors import DataError, DoesNotApply, PluginError, WatchError
from probekit.events import Event, Listener
from probekit.grid import Grid
from probekit.layer import Layer
from probekit.metric import Metric, Row, Traces, Variation
from probekit.models.model import Model, load_model
from probekit.names import slug
from probekit.plugins.catalog import Catalog, Entry, source_of
from probekit.plugins.loading import blamed
from probekit.specs import ModelSpec, Preprocessing
from probekit.store.cells import MEASURED
from probekit.watch import Visitor, Watcher

TRAIN_SHARE = 4
"""With ``--limit N`` and no ``--train-limit``, probes are trained on this many times N images."""


class Source(Protocol):
    """Where layers come from: a watched model (`probekit.Watcher`) or a capture (`Captured`)."""

    def layer_rows(self) -> list[Row]: ...

    def site_rows(self) -> list[Row]: ...

    def output_rows(self) -> list[Row]:
        """One row, of what the model returns; none where that is not known."""

    def output_layer(self, out: Any, batch: int) -> Layer:
        """The model's output as what a metric on ``"output"`` sees."""

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

    def view(self, view: View) -> Subject:
        """The same model on other images, or changed."""

    def active(self) -> AbstractContextManager[None]:
        """Around every forward pass: precision, and the model as the view wants it."""

    def listed(self) -> tuple[list[str], list[int] | None]:
        """Ids and labels of the images, in the order of `indices`."""

    def completed(self, traces: Traces) -> Traces:
        """Traces with what the dataset knows of their images: class names, cues, masks."""


@dataclass(frozen=True)
class View:
    """Which images a pass shows, and with which change.

    owner: the metric whose variation it is, where another one is measured under it
    """

    split: Literal["measured", "train"] = "measured"
    variation: Variation | None = None
    owner: tuple[Entry, Metric] | None = None

    @property
    def name(self) -> str:
        """Of its folder: ``all``, ``train``, ``all~reinit~last-1``: two metrics may name variations alike."""
        if self.owner is None:
            return self.title
        entry, _ = self.owner
        return f"{self._images}~{slug(entry.name if entry.built_in else entry.qualified)}{self._change}"

    @property
    def title(self) -> str:
        """For people: ``all~last-1``."""
        return f"{self._images}{self._change}"

    @property
    def _images(self) -> str:
        return MEASURED if self.split == "measured" else self.split

    @property
    def _change(self) -> str:
        return f"~{self.variation.name}" if self.variation else ""


@dataclass
class Live:
    """A `Subject` that is forwarded. Make one with `load`."""

    entry: Entry
    model: Model
    dataset_entry: Entry
    measured: Dataset
    train: Dataset | None
    indices: list[int]
    grid: Grid
    catalog: Catalog
    device: torch.device
    listen: Listener
    shown: View = View()
    # shared by all views
    _watched: list[tuple[Watcher, Tensor]] = field(default_factory=list)
    _fingerprints: dict[str, str] = field(default_factory=dict)
    _prepared: image_loading.Prepared = field(default_factory=image_loading.Prepared)

    @classmethod
    def load(
        cls,
        model: Entry,
        dataset: tuple[Entry, Dataset],
        grid: Grid,
        catalog: Catalog,
        device: torch.device,
        listen: Listener,
        train: Dataset | None = None,
    ) -> Live:
        """Load the model. `train` is the train split of a dataset without its own.

        Raises `DataError` for a dataset without images, and what `load_model` raises.
        """
        entry, images = dataset
        indices = select(len(images), grid.limit)
        if not indices:
            raise DataError(f"dataset '{entry.ref}' has no images")
        loaded = load_model(model.ref, catalog, seed=grid.seed, image_size=grid.image_size)
        own = images.train if images.train is not None else train
        return cls(model, loaded, entry, images, own, indices, grid, catalog, device, listen)

    @property
    def dataset(self) -> Dataset:
        """The one whose images are shown."""
        return self.train if self.shown.split == "train" else self.measured

    @property
    def model_name(self) -> str:
        return str(self.entry.ref)

    @property
    def dataset_name(self) -> str:
        return str(self.dataset_entry.ref)

    @property
    def preprocessing(self) -> Preprocessing:
        return self.model.preprocessing or Preprocessing()

    def identity(self) -> dict[str, Any]:
        split = self.shown.split
        if split not in self._fingerprints:
            with blamed(f"dataset '{self.dataset.name}'"):
                self._fingerprints[split] = fingerprint_of(self.dataset, self.indices)
        return {
            "model": self.model_name,
            "weights": self.model.weights.sha256,
            "dataset": self.dataset_name,
            "images": self._fingerprints[split],
            "count": len(self.indices),
            "preprocessing": self.preprocessing.model_dump(mode="json"),
            "dtype": self.grid.dtype,
            **source_of(self.entry, self.catalog.resolve_target(self.entry)),
        }

    def lacks(self, metric: Metric) -> str:
        data, needed = self.measured, metric.requires
        if "labels" in needed and data.labels is None:
            return "the dataset has no labels"
        if "cues" in needed and not {"shape", "texture"} <= set(data.cues):
            return "the dataset doesn't say which shape and which texture its images show"
        if "masks" in needed and not data.has_masks:
            return "the dataset has no masks"
        if "train" not in needed:
            return ""
        if self.train is None:
            return "the dataset has no train split (`--train DATASET` names one)"
        if "masks" in needed:
            return "" if self.train.has_masks else "the train split has no masks"
        if self.train.labels is None:
            return "the train split has no labels"
        return "" if self._trainable else "no class of the train split is one of the dataset's"

    # ------------------------------------------------------------------ views

    def view(self, view: View) -> Live:
        if view.split == "measured":
            return replace(self, shown=view)
        # masks have no one class an image
        usable = list(self._trainable) if self.train.labels is not None else list(range(len(self.train)))
        limit = self.grid.train_limit or (self.grid.limit and TRAIN_SHARE * self.grid.limit)
        chosen = [usable[k] for k in select(len(usable), limit)]
        return replace(self, indices=chosen, shown=view)

    @cached_property
    def _trainable(self) -> dict[int, int]:
        """Label of each train image, in the numbering of the measured dataset, where it has that class."""
        return renumbered(self.train, self.measured)

    @contextmanager
    def active(self) -> Iterator[None]:
        change = self.shown.variation.model if self.shown.variation else None
        with numerics(self.device, self.grid.dtype):
            if change is None:
                yield
                return
            module, anatomy = self.model.module, self.watch()[0].anatomy
            before = {name: value.clone() for name, value in module.state_dict().items()}
            try:
                change(module, self._fresh, anatomy)
                yield
            finally:
                module.load_state_dict(before)

    def _fresh(self) -> nn.Module:
        """The same architecture with random weights of another seed."""
        ref = replace(self.entry.ref, weights="random")
        made = load_model(ref, self.catalog, seed=self.grid.seed + 1, image_size=self.grid.image_size)
        if made.weights.sha256 == self.model.weights.sha256:  # one that loads its weights itself
            raise DoesNotApply("its builder gives the same weights whatever the seed: none are fresh")
        return made.module.to(self.device)

    def listed(self) -> tuple[list[str], list[int] | None]:
        ids, labels = [self.dataset.ids[i] for i in self.indices], self.dataset.labels
        if labels is None:
            return ids, None
        if self.shown.split == "train":
            return ids, [self._trainable[i] for i in self.indices]
        return ids, [int(labels[i]) for i in self.indices]

    def completed(self, traces: Traces) -> Traces:
        place = {self.dataset.ids[i]: i for i in self.indices}
        cues = {
            cue: [int(numbers[place[id]]) for id in traces.images]
            for cue, numbers in self.dataset.cues.items()
        }

        def mask(position: int) -> np.ndarray:
            return image_loading.masks(self.dataset, place[traces.images[position]], self.preprocessing)

        has_masks = self.dataset.has_masks
        return replace(
            traces,
            classes=self.measured.classes,
            cues=cues,
            mask=mask if has_masks else None,
            class_of=self.measured.class_of if self.measured.classes is not None else None,
            device=str(self.device),
        )

    def watch(self) -> tuple[Watcher, Tensor]:
        """The plan is made on the first two images that can be read, whatever shard is measured next."""
        if self._watched:
            return self._watched[0]
        found: list[Tensor] = []
        for batch in self.batches(self.indices, 1):
            found += list(batch.pixels)
            if len(found) == 2:
                break
        if not found:
            raise DataError(f"no image of dataset '{self.dataset_name}' can be read")
        with within_memory(self.device):
            pixels = torch.stack(found).to(self.device)
            self.model.module.to(self.device)
        watcher = watched(self.model, pixels, allow_unwatched=self.grid.allow_unwatched)
        check_spec(self.model.spec, watcher.anatomy)
        for warning in watcher.anatomy.warnings:
            self.listen(Event("warning", self.model_name, self.dataset_name, text=warning))
        self._watched.append((watcher, pixels))
        return watcher, pixels

    def batches(
        self, chosen: Sequence[int], batch_size: int, workers: int = 0
    ) -> Iterator[image_loading.Batch]:
        variation = self.shown.variation
        source = image_loading.batches(
            self.dataset,
            chosen,
            self.preprocessing,
            batch_size=batch_size,
            workers=workers,
            on_bad=self.grid.on_bad_image,
            variant=variation.pixels if variation else None,
            prepared=self._prepared if variation and self.shown.split == "measured" else None,
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
            "pack": f"{self.entry.pack} {self.entry.version}".strip(),
            "anatomy": source.anatomy.to_json(),
            "ids": [dataset.ids[i] for i in self.indices],
            "labels": [int(dataset.labels[i]) for i in self.indices] if dataset.labels is not None else None,
            "classes": list(dataset.classes) if dataset.classes is not None else None,
            "notes": list(dataset.notes),
            "train": self.train.name if self.train is not None else None,
            "batch_size": batch_size,
            "device": device_name(self.device),
            "versions": versions(),
        }


def watched(model: Model, pixels: Tensor, *, allow_unwatched: bool = False) -> Watcher:
    """A model watched on a batch of its device.

    Raises `WatchError`; `PluginError` for a model whose code fails, `DataError` where memory is too small.
    """
    with blamed(f"model {model.who}"), within_memory(pixels.device):
        return Watcher(
            model.module,
            pixels,
            forward=model.run,
            declared_parts=model.declared.parts if model.declared else None,
            allow_unwatched=allow_unwatched,
        )


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
    who = f"dataset '{entry.ref}' of '{entry.owner}'"
    load = catalog.resolve_target(entry)
    with blamed(who):
        dataset = load(entry.ref.argument, **entry.options)
        if not isinstance(dataset, Dataset):
            given = type(dataset).__name__
            raise PluginError(f"{who} is a '{given}'", hint="its target has to return a probekit.Dataset")
        dataset.check()
    return dataset


def versions() -> Mapping[str, str]:
    """What the numbers were made with."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("vit-probekit", "torch", "timm", "numpy", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def default_batch(device: torch.device, size: Sequence[int]) -> int:
    """Images of `size` (rows, columns) per forward pass where nobody says.

    64; on a CPU as many pixels as 16 images of 224 x 224 have, but never fewer images than 16.
    """
    if device.type != "cpu":
        return 64
    return min(64, max(16, 16 * 224**2 // (size[0] * size[1])))


def device_name(device: torch.device) -> str:
    """``NVIDIA H100 80GB HBM3``, ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
