"""The format of a shard: one sealed HDF5 file of contiguous, uncompressed datasets, each with its checksum.

A shard is never opened for writing again. docs/ holds the format as a specification.

Imports neither torch nor xarray: `probekit status` reads shards.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash

from probekit.errors import StoreError
from probekit.store.sealing import Damaged, DiskFile, Missing, canonical_json, check_version, sealed

FORMAT = "probekit-shard"
FORMAT_VERSION = 1
"""Raised when an older reader would misread the file; a newer file is refused."""

_RECOMPUTE = "run the command that wrote it again: it recomputes what is damaged or missing"
_ALIGN = 64  # of every dataset in the file, so that a memory map is aligned for its dtype
_HEADERS = 8192  # what a dataset and its links take beside its bytes, rounded up


class DamagedShard(Damaged):
    """A shard that is truncated or whose bytes don't match their checksum."""


@dataclass(frozen=True)
class Shard:
    """The arrays asked for, everything said about the shard, and which of its arrays are bfloat16 bits."""

    arrays: dict[str, np.ndarray]
    attrs: dict[str, Any]
    bfloat16: frozenset[str] = frozenset()


def shard_ranges(total: int, per_shard: int) -> list[range]:
    """Fixed ranges of image indices: shard k holds ``[k * per_shard, (k + 1) * per_shard)``, always."""
    if per_shard < 1:
        raise ValueError(f"per_shard must be at least 1, not {per_shard}")
    return [range(start, min(start + per_shard, total)) for start in range(0, total, per_shard)]


def shard_name(index: int) -> str:
    """``shard-00017.h5``"""
    return f"shard-{index:05d}.h5"


def write_shard(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    attrs: Mapping[str, Any],
    *,
    bfloat16: Collection[str] = (),
) -> None:
    """Write one shard. The same arguments give the same bytes.

    arrays:   numbers, booleans or strings by name; "/" in a name makes HDF5 groups
    attrs:    anything JSON can hold, also numpy scalars and paths
    bfloat16: names of uint16 arrays that are bfloat16 bits (``tensor.view(torch.uint16).numpy()``); they are
              marked so, HDF5 having no such type. ml_dtypes arrays are recognised by themselves.

    Raises StoreError where it can't be written, ValueError or TypeError for what the format can't hold.
    """
    stored = {name: _storable(name, arrays[name], name in bfloat16) for name in sorted(arrays)}
    if unknown := set(bfloat16) - set(stored):
        raise ValueError(f"no array named {sorted(unknown)} to mark as bfloat16")
    text = canonical_json(attrs).encode()
    size = sum(array.nbytes + _HEADERS for array, _ in stored.values()) + len(text) + _HEADERS
    options = {"libver": "latest", "track_order": False, "alignment_threshold": 1}
    with (
        sealed(path, size) as temporary,
        DiskFile(temporary) as disk,
        h5py.File(disk, "w", alignment_interval=_ALIGN, **options) as file,
    ):
        # Fixed-length strings throughout: a variable-length one lives outside the checksummed headers.
        file.attrs["format"] = np.bytes_(FORMAT)
        file.attrs["format_version"] = FORMAT_VERSION
        file.attrs["attrs"] = np.array(text, dtype=h5py.string_dtype("utf-8", len(text)))
        file.attrs["attrs_xxh3_128"] = np.bytes_(xxhash.xxh3_128_hexdigest(text))
        for name, (array, mark) in stored.items():
            dataset = file.create_dataset(name, data=array, dtype=array.dtype, track_times=False)
            dataset.attrs["xxh3_128"] = np.bytes_(checksum(array))
            if mark:
                dataset.attrs["dtype"] = np.bytes_(mark)


def read_shard(path: Path, names: Sequence[str] | None = None, *, verify: bool = True) -> Shard:
    """Read a shard's attributes and the arrays called `names` (default: all; ``[]``: none).

    Raises Missing, DamagedShard (truncated, altered, or, with `verify`, a dataset that doesn't match its
    checksum), NewerFormat, or StoreError for a name that isn't there.
    """
    with _opened(path) as (file, attrs, found):
        if absent := set(names or ()) - set(found):
            raise StoreError(
                f"shard '{path}' has no dataset '{min(absent)}'", hint=f"it has {', '.join(found)}"
            )
        arrays = {}
        for name in found if names is None else names:
            dataset = file[name]
            raw = dataset[()] if dataset.shape else np.asarray(dataset[()], dtype=dataset.dtype)
            if verify and checksum(raw) != _text(dataset.attrs["xxh3_128"]):
                raise DamagedShard(
                    f"shard '{path}' is damaged: dataset '{name}' doesn't match its checksum", hint=_RECOMPUTE
                )
            arrays[name] = _strings(raw) if raw.dtype.kind == "S" else raw
        marked = frozenset(n for n in found if _text(file[n].attrs.get("dtype", "")) == "bfloat16")
        return Shard(arrays, attrs, marked)


def map_dataset(path: Path, name: str) -> np.ndarray:
    """A read-only memory map of one dataset: no copy, no checksum. bfloat16 comes as its uint16 bits.

    Raises as `read_shard` does, and StoreError for a dataset of strings.
    """
    return map_shard(path, [name])[name]


def map_shard(
    path: Path, names: Sequence[str] | None = None, *, verify: bool = False
) -> dict[str, np.ndarray]:
    """`map_dataset` of several datasets (default: all); with `verify` each is compared with its checksum."""
    places = {}
    with _opened(path) as (file, _, found):
        for name in found if names is None else names:
            if name not in found:
                raise StoreError(f"shard '{path}' has no dataset '{name}'", hint=f"it has {', '.join(found)}")
            dataset = file[name]
            wanted = _text(dataset.attrs["xxh3_128"])
            places[name] = dataset.dtype, dataset.shape, dataset.id.get_offset(), wanted
    maps = {}
    for name, (dtype, shape, offset, wanted) in places.items():
        if dtype.kind == "S":
            raise StoreError(f"dataset '{name}' of shard '{path}' holds strings and can't be mapped")
        empty = offset is None or 0 in shape
        array = np.empty(shape, dtype) if empty else np.memmap(path, dtype, "r", offset, shape)
        if verify and checksum(array) != wanted:
            raise DamagedShard(
                f"shard '{path}' is damaged: dataset '{name}' doesn't match its checksum", hint=_RECOMPUTE
            )
        maps[name] = array
    return maps


def shard_problem(path: Path, expect_attrs: Mapping[str, Any], *, verify: bool = False) -> str | None:
    """Why a shard can't be kept on resume, or None: it is missing, damaged, or says something else.

    Every key of `expect_attrs` must be there with that value. `verify` also reads every array.

    Raises NewerFormat and StoreError (no permission): recomputing wouldn't be right.
    """
    try:
        attrs = read_shard(path, None if verify else [], verify=verify).attrs
    except (Missing, Damaged) as error:
        return error.message
    return disagreement(path, attrs, expect_attrs)


def disagreement(path: Path, attrs: Mapping[str, Any], expect_attrs: Mapping[str, Any]) -> str | None:
    """The first of `expect_attrs` that a shard with `attrs` doesn't say, or None."""
    for key in sorted(expect_attrs):
        if key not in attrs:
            return f"shard '{path}' doesn't say '{key}'"
        if canonical_json(attrs[key]) != canonical_json(expect_attrs[key]):
            return f"shard '{path}' has another '{key}'"
    return None


def shard_ok(path: Path, expect_attrs: Mapping[str, Any], *, verify: bool = False) -> bool:
    """Whether `shard_problem` finds nothing."""
    return shard_problem(path, expect_attrs, verify=verify) is None


def checksum(array: np.ndarray) -> str:
    """xxh3_128 of an array's bytes in C order, as 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(np.asarray(array, order="C").reshape(-1).view(np.uint8))


def _storable(name: str, array: Any, bfloat16: bool) -> tuple[np.ndarray, str]:
    """The array as HDF5 gets it, and its dtype mark."""
    if not name or any(part in ("", ".", "..") for part in name.split("/")):
        raise ValueError(f"'{name}' can't name a dataset")
    array = np.asarray(array, order="C")
    if array.dtype.name == "bfloat16":  # ml_dtypes; h5py would store it as opaque bytes
        return array.view(np.uint16), "bfloat16"
    if bfloat16:
        if array.dtype != np.uint16:
            raise TypeError(f"bfloat16 bits of '{name}' must come as uint16, not {array.dtype}")
        return array, "bfloat16"
    if array.dtype.kind in "OU":
        return _string_bytes(name, array), ""
    if array.dtype.kind not in "biufc":
        raise TypeError(f"array '{name}' has dtype {array.dtype}, which a shard can't hold")
    return array, ""


def _string_bytes(name: str, array: np.ndarray) -> np.ndarray:
    for text in array.flat:
        if not isinstance(text, str):
            raise TypeError(f"array '{name}' holds {type(text).__name__}, which a shard can't hold")
        if "\0" in text:
            raise ValueError(f"a string in array '{name}' contains a null character")
    # surrogateescape: a file name that isn't UTF-8 must survive as an image id
    encoded = [text.encode("utf-8", "surrogateescape") for text in array.flat]
    dtype = h5py.string_dtype("utf-8", max(map(len, encoded), default=1) or 1)
    return np.array(encoded, dtype=dtype).reshape(array.shape)


def _strings(raw: np.ndarray) -> np.ndarray:
    decoded = [text.decode("utf-8", "surrogateescape") for text in raw.flat]
    return np.array(decoded, dtype=np.str_).reshape(raw.shape)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[h5py.File, dict[str, Any], list[str]]]:
    """The open file, its attributes and its datasets' names; what HDF5 raises becomes our errors."""
    try:
        # a sealed file never changes, so no lock: HDF5's fails on some network and read-only file systems
        with h5py.File(path, "r", locking=False) as file:
            if _text(file.attrs.get("format", "")) != FORMAT:
                raise Damaged(f"'{path}' is not a probekit shard")
            check_version(f"shard '{path}'", int(file.attrs["format_version"]), FORMAT_VERSION)
            text = file.attrs["attrs"]
            text = text.encode() if isinstance(text, str) else bytes(text)
            if xxhash.xxh3_128_hexdigest(text) != _text(file.attrs["attrs_xxh3_128"]):
                raise DamagedShard(
                    f"shard '{path}' is damaged: its attributes don't match their checksum", hint=_RECOMPUTE
                )
            names: list[str] = []
            file.visititems(lambda n, item: names.append(n) if isinstance(item, h5py.Dataset) else None)
            yield file, json.loads(text), sorted(names)
    except (StoreError, MemoryError):
        raise
    except FileNotFoundError:
        raise Missing(f"shard '{path}' doesn't exist", hint=_RECOMPUTE) from None
    except (PermissionError, IsADirectoryError) as error:
        raise StoreError(f"can't read shard '{path}': {os.strerror(error.errno).lower()}") from error
    except Exception as error:
        # h5py raises OSError, KeyError, RuntimeError, ValueError or TypeError, whichever part is damaged
        reason = re.sub(r" \(file (read|write) failed.*", "", str(error)).strip("'\"")
        raise DamagedShard(f"shard '{path}' is damaged: {reason}", hint=_RECOMPUTE) from error
