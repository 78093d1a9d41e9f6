"""Raw activations of one model on one dataset, for chosen sites and layers, in sealed HDF5 shards.

    capture(resolved, catalog, Path("captures/moco"), sites="attention,tokens_out", layers="0,-1")

What is written and where: `probekit.capturing.activations`. The same call again writes what is missing or
damaged, the same bytes as an undisturbed one. The forward waits for the disk only when the disk is the
bottleneck.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probekit.capturing.activations import (
    SITES,
    CapturedLayer,
    CaptureFolder,
    choose_layers,
    expected,
    parse_dtype,
    parse_layers,
    parse_sites,
)
from probekit.capturing.arrays import Probe, ShardArrays
from probekit.datasets.images import Batch
from probekit.engine import DTYPES, numerics, pick_device
from probekit.errors import StoreError, UsageError
from probekit.events import Event, Listener, nobody
from probekit.grid import Resolved
from probekit.plugins.catalog import Catalog
from probekit.store.cells import identity_hash, require_same
from probekit.store.runfolder import shard_size
from probekit.store.sealing import human_bytes
from probekit.store.writing import (
    RunLock,
    Writer,
    read_shard,
    remove_temporaries,
    shard_problem,
    shard_ranges,
    write_shard,
)
from probekit.subject import Live, default_batch, open_dataset
from probekit.watch import Watcher

SHARD_BYTES = 128_000_000
"""Smaller shards write at half the disk's speed."""

_BATCH_BYTES = 1 << 30
"""What a batch of the default size may take on the host; a batch is the least a shard can hold."""


@dataclass(frozen=True)
class Summary:
    """What a capture holds, or with ``--dry-run`` would hold.

    per_image: bytes; bytes: of the whole capture; missing: of the shards still to be written
    free:      bytes of the disk, before the capture
    bad:       images that could not be read; promoted: datasets stored as float32 somewhere
    """

    path: Path
    model: str
    dataset: str
    images: int
    sites: tuple[str, ...]
    layers: tuple[str, ...]
    dtype: str
    shards: int
    per_shard: int
    per_image: int
    bytes: int
    missing: int
    free: int
    written: int = 0
    bad: int = 0
    promoted: tuple[str, ...] = ()


def capture(
    resolved: Resolved,
    catalog: Catalog,
    out: Path,
    *,
    sites: str | Sequence[str] = "attention",
    layers: str | int | Sequence[int] = "all",
    dtype: str = "float16",
    dry_run: bool = False,
    listen: Listener = nobody,
) -> Summary:
    """Run a model and write its activations to the folder `out`, or what is missing of them.

    resolved: one model and one dataset; `Grid.dtype` is the forward's
    sites:    some of `probekit.capturing.activations.SITES`; ``attention`` is q, k, scale and bias, or
              probabilities where the model computes its softmax by hand
    layers:   see `parse_layers`
    dtype:    float16, bfloat16 or float32, as stored. Where values overflow it, a dataset of a shard becomes
              float32, with a warning; what the shard held before the overflow stays rounded
    dry_run:  forwards two images, writes nothing

    Raises `UsageError`; `StoreError` for a folder that is locked, full, newer or of another capture;
    `WatchError`, `DataError`, `WeightsError` as a run's cell would.
    """
    chosen = parse_sites(sites), parse_layers(layers), parse_dtype(dtype)
    if len(resolved.models) != 1 or len(resolved.datasets) != 1:
        raise UsageError("a capture is of one model on one dataset", hint="make one folder for each")
    device, entry = pick_device(resolved.grid.device), resolved.datasets[0]
    dataset = open_dataset(entry, catalog)
    folder = CaptureFolder(Path(out))
    folder.read()  # a foreign folder is refused before weights are fetched, and left without a lock file
    load = partial(Live.load, resolved.models[0], (entry, dataset), resolved.grid, catalog, device, listen)
    if dry_run:
        return _Capture(folder, load(), *chosen, listen).run(dry_run=True)
    with RunLock(folder.path):
        return _Capture(folder, load(), *chosen, listen).run()


@dataclass
class _Capture:
    folder: CaptureFolder
    subject: Live
    sites: tuple[str, ...]
    selectors: list[int | slice]
    dtype: str
    listen: Listener

    def run(self, dry_run: bool = False) -> Summary:
        subject, before = self.subject, self.folder.read()
        with numerics(subject.device, subject.grid.dtype):
            watcher, pair = subject.watch()
            probe = Probe(watcher, pair, self.dtype)
            chosen = choose_layers(self.selectors, len(watcher.anatomy.layers))
            layers = probe.layers(chosen, self.sites)
            self._note_absent(layers)
            identity = subject.identity()
            identity |= {"layers": chosen, "sites": list(self.sites), "stored": self.dtype}
            recipes = [one.to_json() for one in layers]
            if before is not None:
                require_same(self.folder, before["identity"], identity)
                then, now = ([{**one, "order": None} for one in each] for each in (before["layers"], recipes))
                require_same(self.folder, {"activations": then}, {"activations": now})
            size = _Size(layers, probe, self.dtype)
            batch, per_shard = self._cut(size, before)
            images = shard_ranges(len(subject.indices), per_shard)
            tag = identity_hash(identity)
            missing = self._missing(tag, images)
            found = Summary(
                self.folder.path, subject.model_name, subject.dataset_name, len(subject.indices), self.sites,
                tuple(one.group for one in layers), self.dtype, len(images), per_shard, size.per_image,
                size.per_image * len(subject.indices) + size.constants,
                size.per_image * sum(len(images[k]) for k in missing), _free(self.folder.path),
            )  # fmt: skip
            if dry_run:
                return found
            _check_space(found)
            remove_temporaries(self.folder.path)
            if before is None:
                settings = {"settings": subject.grid.settings(), "per_shard": per_shard, "layers": recipes}
                self.folder.write({"identity": identity, **settings, **subject.about(watcher, batch)})
            constants = self._constants(tag, layers, probe)
            self._write(watcher, layers, constants, tag, images, missing, batch)
        return self._closing(replace(found, written=len(missing)), images)

    def _note_absent(self, layers: Sequence[CapturedLayer]) -> None:
        for site in self.sites:
            without = [one.group for one in layers if SITES[site] in one.absent]
            if len(without) == len(layers):
                raise UsageError(f"none of the layers has '{site}'", hint="leave it out of --sites")
            if without:
                self._warn(f"{len(without)} layers have no '{site}' (first: '{without[0]}')")

    def _warn(self, text: str) -> None:
        self.listen(Event("warning", self.subject.model_name, self.subject.dataset_name, text=text))

    def _cut(self, size: _Size, before: dict[str, Any] | None) -> tuple[int, int]:
        """Images per forward pass and per shard: as in a run, so that its batches and these are the same."""
        asked = self.subject.grid.batch_size or (before or {}).get("batch_size")
        batch = asked or default_batch(self.subject.device, self.subject.preprocessing.size)
        while not asked and batch > 1 and batch * size.per_image > _BATCH_BYTES:
            batch //= 2
        if before is not None:
            return batch, int(before["per_shard"])
        whole = shard_size(len(self.subject.indices))
        unit = whole if whole % min(batch, whole) else min(batch, whole)
        return batch, unit * max(1, math.ceil(SHARD_BYTES / max(1, unit * size.per_image)))

    def _batches(self, chosen: Sequence[int], batch: int) -> Iterator[Batch]:
        """Batches as a run of the same batch size has them: cut again where one of its shards ends."""
        whole = shard_size(len(self.subject.indices))
        step = len(chosen) if whole % min(batch, whole) == 0 else whole
        for start in range(0, len(chosen), step):
            part = chosen[start : start + step]
            yield from self.subject.batches(part, min(batch, whole), self.subject.grid.workers)

    def _missing(self, tag: str, images: Sequence[range]) -> list[int]:
        wanted = []
        for k, part in enumerate(images):
            problem = shard_problem(self.folder.shard(k), expected(tag, part), verify=True)
            if problem is None:
                continue
            wanted.append(k)
            if self.folder.shard(k).exists():
                self._warn(f"{problem}: captured again")
        return wanted

    def _constants(self, tag: str, layers: Sequence[CapturedLayer], probe: Probe) -> dict[int, Tensor]:
        """Biases as stored, on the device; written where they aren't there yet."""
        using = _with_constants(layers)
        if not using:
            return {}
        path, says = self.folder.constants, {"capture": tag}
        if shard_problem(path, says, verify=True) is not None:
            arrays = {f"{one.group}/bias": probe.biases[one.index].cpu().numpy() for one in using}
            write_shard(path, arrays, says)
        stored = read_shard(path).arrays
        device = self.subject.device
        return {one.index: torch.from_numpy(stored[f"{one.group}/bias"]).to(device) for one in using}

    def _write(
        self,
        watcher: Watcher,
        layers: Sequence[CapturedLayer],
        constants: dict[int, Tensor],
        tag: str,
        images: Sequence[range],
        missing: Sequence[int],
        batch: int,
    ) -> None:
        subject, told = self.subject, set()
        total = len(subject.indices)
        done = total - sum(len(images[k]) for k in missing)
        self.listen(Event("cell", subject.model_name, subject.dataset_name, total=total, done=done))
        with Writer(depth=1) as writer:
            for k in missing:
                numbered = {one.index: one for one in layers}
                shard = ShardArrays(numbered, len(images[k]), DTYPES[self.dtype], constants, subject.device)
                place = {subject.indices[i]: i for i in images[k]}
                kept: list[int] = []
                bad: list[dict[str, Any]] = []
                for part in self._batches(list(place), batch):
                    bad += [{"index": place[b.index], "id": b.id, "reason": b.reason} for b in part.bad]
                    if len(part):
                        shard.take(watcher, self.sites, part.pixels)
                        kept += [place[i] for i in part.indices]
                    self.listen(Event("images", done=len(part) + len(part.bad)))
                arrays, half = shard.arrays()
                arrays["index"] = np.asarray(kept, dtype=np.int64)
                arrays["ids"] = np.asarray(
                    [subject.dataset.ids[subject.indices[i]] for i in kept], dtype=np.str_
                )
                if fresh := [key for key in shard.promoted if key not in told]:
                    told.update(fresh)
                    more = f" and of {len(fresh) - 1} more" if len(fresh) > 1 else ""
                    self._warn(f"values of '{fresh[0]}'{more} overflow {self.dtype}: stored as float32")
                says = {
                    **expected(tag, images[k]),
                    "bad": bad,
                    "promoted": sorted(shard.promoted),
                    "biases": [key for key in arrays if key.endswith("/bias")],
                }
                writer.write_shard(self.folder.shard(k), arrays, says, bfloat16=half)
        self.listen(Event("cell-done", subject.model_name, subject.dataset_name))

    def _closing(self, found: Summary, images: Sequence[range]) -> Summary:
        said = [read_shard(self.folder.shard(k), []).attrs for k in range(len(images))]
        promoted = sorted({key for attrs in said for key in attrs["promoted"]})
        bad = sum(len(attrs["bad"]) for attrs in said)
        return replace(found, missing=0, bad=bad, promoted=tuple(promoted))


class _Size:
    """Bytes, from the shapes that the probe saw. Biases that are constant are float32."""

    def __init__(self, layers: Sequence[CapturedLayer], probe: Probe, dtype: str):
        width = DTYPES[dtype].itemsize
        self.per_image = sum(
            math.prod(shape) * (4 if (one.index, name) in probe.wide else width)
            for one in layers
            for name, shape in one.datasets.items()
        )
        self.constants = sum(probe.biases[one.index].numel() * 4 for one in _with_constants(layers))


def _with_constants(layers: Sequence[CapturedLayer]) -> list[CapturedLayer]:
    return [one for one in layers if one.scores and one.scores.get("bias") == "constants.h5"]


def _free(path: Path) -> int:
    place = path.absolute()
    while not place.exists():
        place = place.parent
    space = os.statvfs(place)
    return space.f_bavail * space.f_frsize


def _check_space(found: Summary) -> None:
    """Raise `StoreError` if the disk can't hold the rest and a tenth of a shard, which `sealed` wants."""
    need = found.missing + found.per_image * min(found.per_shard, found.images) // 10
    if not found.missing or need <= found.free:
        return
    fits = int(found.free / 1.1 / max(1, found.per_image))
    way = "free space and run the same command again"
    if found.missing == found.per_image * found.images and 0 < fits < found.images:
        way = f"--limit {fits}, fewer --layers or --sites, or another disk"
    raise StoreError(
        f"the capture needs {human_bytes(need)}, the disk of '{found.path}' has {human_bytes(found.free)}",
        hint=way,
    )
