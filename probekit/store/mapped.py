"""A trace's values left on disk: pooled features of a large dataset needn't fit into memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from probekit.store.shards import map_shard

VALUES = "values/"
"""What the names of a metric's datasets in a shard begin with."""


class MappedArray:
    """Arrays (n, ...) that follow each other along the first axis, read where they are indexed.

    ``array[:, 3]`` reads the fourth row of every image; ``np.asarray(array)`` reads all. Indexed as numpy is
    with integers, slices and, on the first axis, arrays of integers.
    """

    def __init__(self, parts: Sequence[np.ndarray]):
        self._parts = list(parts)
        self._ends = np.cumsum([len(part) for part in parts])
        self.shape = (int(self._ends[-1]), *parts[0].shape[1:])
        self.dtype, self.ndim = parts[0].dtype, parts[0].ndim

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate(self._parts).astype(dtype or self.dtype, copy=False)

    def __getitem__(self, key: Any) -> np.ndarray:
        first, *inner = key if isinstance(key, tuple) else (key,)
        if isinstance(first, slice) and first == slice(None):
            return np.concatenate([part[(slice(None), *inner)] for part in self._parts])
        chosen = np.arange(len(self))[first]
        places = np.searchsorted(self._ends, np.atleast_1d(chosen), side="right")
        starts = self._ends - [len(part) for part in self._parts]
        found = [
            self._parts[k][(i - starts[k], *inner)]
            for k, i in zip(places, np.atleast_1d(chosen), strict=True)
        ]
        if np.ndim(chosen) == 0:
            return found[0]
        return np.stack(found) if found else self._parts[0][(slice(0, 0), *inner)]


def mapped_values(shards: Sequence[Path]) -> tuple[np.ndarray, Mapping[str, MappedArray]]:
    """The images' numbers and the values of a trace's shards, in order, each compared with its checksum.

    Raises what `map_shard` does.
    """
    maps = [map_shard(path, verify=True) for path in shards]
    full = [m for m in maps if len(m["index"])]
    names = [n for n in full[0] if n.startswith(VALUES)] if full else []
    values = {n.removeprefix(VALUES): MappedArray([m[n] for m in full]) for n in names}
    return np.concatenate([m["index"] for m in maps]), values
