"""Cue conflict: from one decision an image to shape bias, and the decisions as a table. Needs no torch."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from probekit.store.sealing import write_bytes

if TYPE_CHECKING:
    import xarray as xr

COLUMNS = ("layer", "depth", "site", "image", "decision", "shape", "texture", "counted", "cue")


@dataclass(frozen=True)
class Counts:
    """Trials by what decided them.

    counted:    (images,) bool, trials whose two cues differ and can both be decided
    conflict:   (images,) bool, trials whose two cues differ
    by_shape, by_texture: (layers, classes) decisions for the shape, and for the texture, by the shape's class
    """

    counted: np.ndarray
    conflict: np.ndarray
    by_shape: np.ndarray
    by_texture: np.ndarray


def count(
    decisions: np.ndarray, shape: np.ndarray, texture: np.ndarray, decidable: np.ndarray, classes: int
) -> Counts:
    """Count (layers, images) class numbers. `decidable`: the classes that could be decided at all."""
    conflict = shape != texture
    counted = conflict & np.isin(shape, decidable) & np.isin(texture, decidable)
    found = [np.zeros((len(decisions), classes), dtype=np.int64) for _ in range(2)]
    for table, cue in zip(found, (shape, texture), strict=True):
        for layer, decided in enumerate(decisions):
            table[layer] = np.bincount(shape[counted & (decided == cue)], minlength=classes)
    return Counts(counted, conflict, *found)


def decisions_csv(result: xr.Dataset, path: Path) -> Path:
    """Write a `shape_bias` result's trials as CSV: `COLUMNS`, a row for each layer and image.

    cue: ``shape``, ``texture`` or ``neither``, what the decision follows; empty for trials not counted.
    Raises `StoreError` where the file can't be written.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(rows(result))
    write_bytes(Path(path), buffer.getvalue().encode("utf-8"))
    return Path(path)


def rows(result: xr.Dataset) -> Iterator[tuple[str | int, ...]]:
    """`COLUMNS` of each trial of a `shape_bias` result, layer by layer."""
    names = [str(name) for name in result["class"].values]
    images = [str(image) for image in result["image"].values]
    shape, texture = (result[cue].values for cue in ("shape", "texture"))
    counted = result["counted"].values.astype(bool)
    places = (result[name].values for name in ("layer", "depth", "site"))
    for layer, (label, depth, site) in enumerate(zip(*places, strict=True)):
        for i, decided in enumerate(result["decisions"].values[layer]):
            cue = "shape" if decided == shape[i] else "texture" if decided == texture[i] else "neither"
            spoken = (names[number] for number in (decided, shape[i], texture[i]))
            followed = cue if counted[i] else ""
            yield (str(label), f"{depth:g}", str(site), images[i], *spoken, int(counted[i]), followed)
