"""One result, one small netCDF4 file: ``xr.open_dataset`` opens it, and so does h5py.

Sealed like a shard (whole or not at all). The 24 bytes after the end of the netCDF data are a mark and the
xxh3_128 of all bytes before; HDF5 ignores them. They are checked before HDF5 sees the file, because netCDF's
layout has no checksums and one flipped bit can make HDF5 loop for ever. Attributes that netCDF can't hold
(booleans, None, lists, mappings) are kept as JSON text and restored by `read_result`.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xarray as xr
import xxhash

from probekit.errors import MetricError, StoreError
from probekit.store.sealing import Damaged, Missing, NewerFormat, canonical_json, check_version, write_bytes

FORMAT_VERSION = 1

_VERSION = "probekit_format"
_JSON = "probekit_json"  # names of the attributes beside it that are JSON text
_MARK = b"pkxxh3_1"  # 8 bytes before the digest
# attributes netCDF and xarray give a meaning of their own: a value stored under them would alter the data
_RESERVED = {"_FillValue", "missing_value", "scale_factor", "add_offset", "dtype", "coordinates", "_Unsigned"}
_RECOMPUTE = "delete it and run the same command again: results are made from the traces"


def write_result(path: Path, ds: xr.Dataset) -> None:
    """Seal `ds` as the netCDF4 file `path`. The same dataset gives the same bytes.

    float16 is stored as float32: netCDF has no such type, and its C library crashes on one. A numpy array
    as an attribute comes back as a list.

    Raises MetricError for what netCDF can't hold ("/" in a name, dates, objects): the metric's fault, not the
    disk's. Raises StoreError where the file can't be written.
    """
    stored = _storable(Path(path), ds)
    # Built in memory: HDF5 crashes at exit when a file with variable-length strings meets a full disk.
    buffer = io.BytesIO()
    try:
        stored.to_netcdf(buffer, engine="h5netcdf")
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        raise MetricError(f"can't store result '{path}': {error}") from error
    data = buffer.getvalue() + _MARK
    write_bytes(Path(path), data + xxhash.xxh3_128_digest(data))


def read_result(path: Path) -> xr.Dataset:
    """The dataset in memory, the file closed, its checksum verified.

    Raises Missing, Damaged, NewerFormat or StoreError. A netCDF file of another origin is read as it is.
    """
    ds, _ = _load(path)
    return ds


def verify_result(path: Path) -> None:
    """Raises Missing, Damaged, NewerFormat or StoreError unless the file is whole and a result of ours."""
    _, ours = _load(path)
    if not ours:
        raise Damaged(f"'{path}' is not a probekit result")


def _load(path: Path) -> tuple[xr.Dataset, bool]:
    """The dataset as it was given to `write_result`, and whether it is a result of ours."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise Missing(f"result '{path}' doesn't exist") from None
    except OSError as error:
        raise StoreError(f"can't read result '{path}': {str(error.strerror).lower()}") from error
    marked = data[-24:-16] == _MARK
    if marked and xxhash.xxh3_128_digest(data[:-16]) != data[-16:]:
        raise Damaged(f"result '{path}' is damaged: it doesn't match its checksum", hint=_RECOMPUTE)
    try:
        # h5py first: h5netcdf prints a traceback of its own for a file that doesn't open
        with h5py.File(io.BytesIO(data), "r") as file:
            version = int(np.ravel(file.attrs.get(_VERSION, 0))[0])
        check_version(f"result '{path}'", version, FORMAT_VERSION)
        if version and not marked:
            raise ValueError("its checksum is gone")
        # units such as "s" are units here: nothing may become a timedelta
        with xr.open_dataset(
            io.BytesIO(data), engine="h5netcdf", decode_times=False, decode_timedelta=False
        ) as file:
            ds = file.load().drop_encoding()
        for attrs in _attributes(ds).values():
            restored = _restored(attrs)
            attrs.clear()
            attrs.update(restored)
    except (NewerFormat, MemoryError):
        raise
    except Exception as error:  # whatever h5py and xarray raise for a damaged file
        reason = re.sub(r"\s+", " ", str(error)).strip("'\"")
        raise Damaged(f"result '{path}' is damaged: {reason}", hint=_RECOMPUTE) from error
    return ds, bool(version)


def _storable(path: Path, ds: xr.Dataset) -> xr.Dataset:
    """A copy netCDF can hold. Without its encodings: a string width kept from the first of several files that
    were merged would cut the longer strings of the others."""
    ds = ds.drop_encoding()
    for name in [*ds.variables, *ds.dims]:
        if not isinstance(name, str) or not name.strip(".") or "/" in name:
            raise MetricError(
                f"can't store result '{path}': '{name}' can't name a variable or dimension",
                hint="names are text without '/'; put layer names in a coordinate",
            )
    new = {}
    for name, variable in ds.variables.items():
        kind = variable.dtype.kind
        if kind == "f" and variable.dtype.itemsize == 2:
            new[name] = variable.astype(np.float32, keep_attrs=True)
        elif not (
            kind in "biufU" or (kind in "OT" and all(isinstance(v, str) for v in variable.values.flat))
        ):
            raise MetricError(
                f"can't store result '{path}': variable '{name}' has dtype {variable.dtype}",
                hint="a result holds numbers, booleans and strings",
            )
    ds = ds.assign({n: v for n, v in new.items() if n not in ds.coords}).assign_coords(
        {n: v for n, v in new.items() if n in ds.coords}
    )
    ds = ds.copy()  # own attribute dictionaries
    for name, attrs in _attributes(ds).items():
        replaced = _replaced(path, name, attrs)
        attrs.clear()
        attrs.update(replaced)
    ds.attrs[_VERSION] = FORMAT_VERSION
    return ds


def _attributes(ds: xr.Dataset) -> dict[str, dict[Hashable, Any]]:
    """The attribute dictionaries of the dataset (called "") and of its variables."""
    return {"": ds.attrs, **{str(name): ds[name].attrs for name in ds.variables}}


def _replaced(path: Path, owner: str, attrs: Mapping[Hashable, Any]) -> dict[str, Any]:
    """Attributes netCDF can hold, and the names of those that became JSON."""
    where = f" of variable '{owner}'" if owner else ""
    plain, as_json = {}, []
    for key in sorted(attrs, key=str):
        value = attrs[key]
        if (
            not isinstance(key, str)
            or not key
            or "/" in key
            or key in (_VERSION, _JSON)
            or (owner and key in _RESERVED)
        ):
            raise MetricError(f"can't store result '{path}': '{key}'{where} can't name an attribute")
        if isinstance(value, np.generic):
            value = value.item()
        whole = isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
        if whole or isinstance(value, float) or (isinstance(value, str) and _safe(value)):
            plain[key] = value
            continue
        try:
            plain[key] = canonical_json(value)
        except (TypeError, ValueError) as error:
            raise MetricError(f"can't store result '{path}': attribute '{key}'{where}: {error}") from error
        as_json.append(key)
    if as_json:
        plain[_JSON] = json.dumps(as_json)
    return plain


def _safe(text: str) -> bool:
    """Whether HDF5 can hold the text as it is: no null character, no lone surrogate, not empty."""
    return bool(text) and "\0" not in text and not any("\ud800" <= c <= "\udfff" for c in text)


def _restored(attrs: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
    as_json = set(json.loads(attrs.get(_JSON, "[]")))
    restored = {}
    for key, value in attrs.items():
        if key in (_JSON, _VERSION):
            continue
        if key in as_json:
            value = json.loads(value)
        elif isinstance(value, np.generic):
            value = value.item()
        restored[key] = value
    return restored
