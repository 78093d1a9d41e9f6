"""Files written whole or not at all: temporary name, close, fsync, rename, fsync of the folder.

A file under its real name is complete and on disk, whatever was killed or unplugged when.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from probekit.errors import StoreError

_AGAIN = "free space and run the same command again"
_TEMPORARY = re.compile(r".+\.\d+-[0-9a-f]{8}\.tmp")
_FULL = {errno.ENOSPC, errno.EDQUOT}


class Missing(StoreError):
    """The file isn't there."""


class Damaged(StoreError):
    """The file is truncated, altered or not what its name says."""


class NewerFormat(StoreError):
    """The file was written by a newer probekit; it must be neither read nor overwritten."""


@contextlib.contextmanager
def sealed(path: Path, size: int) -> Iterator[Path]:
    """Give a temporary path to write; on leaving, make it `path`, whole, durable and atomically.

    `size` is the number of bytes that will be written, for the check of free space (1.1 times as much must
    be there). Missing parent folders are made. Whatever goes wrong, nothing is left behind.

    Raises StoreError for every OSError, naming `path`.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name[:200]}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        make_folder(path.parent)
        space = os.statvfs(path.parent)
        if 1.1 * size > space.f_bavail * space.f_frsize:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield temporary
        _fsync(temporary)
        os.replace(temporary, path)
        _fsync(path.parent)
    except BaseException as error:
        _discard(temporary)
        if isinstance(error, OSError):
            raise _explain(error, path, size) from error
        raise


def make_folder(folder: Path) -> None:
    """Make a folder and its parents so that they survive a power cut. Raises OSError."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        if folder.parent == folder:
            break
        folder = folder.parent
    for each in reversed(missing):
        each.mkdir(exist_ok=True)
        _fsync(each.parent)


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Seal `data` as the file `path`. Raises StoreError."""
    with sealed(path, len(data)) as temporary, open(temporary, "xb") as file:
        file.write(data)


class DiskFile:
    """A new file for h5py to write through, which hides a failed write until the file is closed.

    HDF5 2.0 may crash the process when a write fails while it closes a file (a full disk). So it is told that
    all went well, and the first error is raised on leaving the ``with`` block, where the file is discarded.
    """

    def __init__(self, path: Path):
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._position = 0
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest and self._error is None:
                done = os.pwrite(self._handle, rest, self._position)
                self._position += done
                rest = rest[done:]
        except OSError as error:
            self._error = error
        return size

    def readinto(self, data: Any) -> int:
        return os.preadv(self._handle, [data], self._position)

    def read(self, size: int = -1) -> bytes:  # h5py knows a file by this method
        return os.pread(self._handle, size, self._position)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + (os.fstat(self._handle).st_size if whence == os.SEEK_END else 0)
        return self._position

    def tell(self) -> int:
        return self._position

    def truncate(self, size: int) -> int:
        try:
            if self._error is None:
                os.ftruncate(self._handle, size)
        except OSError as error:
            self._error = error
        return size

    def flush(self) -> None:
        """`sealed` syncs the whole file at the end."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)
        if self._error is not None:
            raise self._error


def remove_temporaries(folder: Path) -> list[Path]:
    """Delete what interrupted writers left in `folder` and below, and nothing else; return what was deleted.

    Only for the holder of the folder's `RunLock`: another writer's temporary file in use looks the same.
    """
    found = sorted(p for p in Path(folder).rglob("*.tmp") if _TEMPORARY.fullmatch(p.name) and p.is_file())
    for path in found:
        _discard(path)
    return found


def foreign_files(folder: Path) -> list[str]:
    """Names in a folder without a run or capture of what neither locks nor a killed writer left there."""
    found = sorted(p.name for p in Path(folder).glob("*"))
    return [n for n in found if not n.startswith("run.lock") and not _TEMPORARY.fullmatch(n)]


def _discard(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # some network file systems can't sync a folder and need not
        if not (os.path.isdir(path) and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EBADF)):
            raise
    finally:
        os.close(handle)


def _explain(error: OSError, path: Path, size: int) -> StoreError:
    code = error.errno
    if code in _FULL:
        with contextlib.suppress(OSError):
            space = os.statvfs(path.parent)
            has = human_bytes(space.f_bavail * space.f_frsize)
            return StoreError(
                f"'{path}' needs {human_bytes(int(1.1 * size))}, the disk has {has}", hint=_AGAIN
            )
    if code == errno.EFBIG:
        hint = "raise the limit (`ulimit -f unlimited`) and run the same command again"
    elif code in (errno.EACCES, errno.EPERM, errno.EROFS):
        hint = "choose a folder you can write to with `--out`"
    else:
        hint = "run the same command again once the cause is gone"
    reason = os.strerror(code) if code else str(error)
    return StoreError(f"can't write '{path}': {reason[:1].lower()}{reason[1:]}", hint=hint)


def human_bytes(count: int) -> str:
    """``38 MB``: decimal units, two significant digits or more."""
    value, unit = float(count), "bytes"
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            break
        value /= 1000
    return f"{value:.1f} {unit}" if value < 9.95 and unit != "bytes" else f"{value:.0f} {unit}"


def seal_json(path: Path, obj: Any) -> None:
    """Write sorted, indented JSON, whole or not at all; the same object gives the same bytes.

    numpy values and paths become JSON types. A mapping that may change its meaning some day should carry
    ``format_version``, which `read_json` checks. Raises StoreError, or TypeError for what JSON can't hold.
    """
    text = json.dumps(obj, indent=2, sort_keys=True, default=plain)
    write_bytes(Path(path), (text + "\n").encode())


def read_json(path: Path, what: str, newest_version: int) -> Any:
    """What `seal_json` wrote. `what` is the file's name in messages: ``"run"``, ``"cell"``.

    Raises Missing, Damaged, NewerFormat (``format_version`` above `newest_version`) or StoreError.
    """
    try:
        obj = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise Missing(f"{what} file '{path}' doesn't exist") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise Damaged(
            f"{what} file '{path}' is damaged: {error}",
            hint="move it away and run the same command again",
        ) from error
    except OSError as error:
        raise StoreError(f"can't read {what} file '{path}': {str(error.strerror).lower()}") from error
    if isinstance(obj, Mapping):
        version = obj.get("format_version", 1)
        if not isinstance(version, int):
            raise Damaged(f"{what} file '{path}' is damaged: its format_version is {version!r}")
        check_version(f"{what} file '{path}'", version, newest_version)
    return obj


def canonical_json(value: Any) -> str:
    """Sorted, compact ASCII JSON of anything made of JSON types, numpy values and paths, or TypeError."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=plain)


def plain(value: Any) -> Any:
    """A JSON type for a numpy value, path, set or mapping. Raises TypeError for anything else."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} can't be stored as JSON")


def check_version(what: str, found: int, newest: int) -> None:
    """Raises NewerFormat when `found` is more than this probekit reads."""
    if found > newest:
        raise NewerFormat(
            f"{what} was written by a newer probekit (format {found}; this one reads up to {newest})",
            hint="update probekit: `pip install -U vit-probekit`",
        )
