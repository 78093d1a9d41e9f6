"""The run folder on disk: one writer thread, one process per run; see also `.sealing` and `.shards`.

What exists is the state: every file is complete or absent, so the same command again does what is missing.

Imports neither torch nor xarray: `probekit status` reads the store.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import threading
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import filelock
import numpy as np

from probekit.errors import StoreError
from probekit.store.sealing import (
    Damaged,
    Missing,
    NewerFormat,
    read_json,
    remove_temporaries,
    seal_json,
    sealed,
    write_bytes,
)
from probekit.store.shards import (
    DamagedShard,
    Shard,
    map_dataset,
    read_shard,
    shard_name,
    shard_ok,
    shard_problem,
    shard_ranges,
    write_shard,
)

__all__ = [
    "Damaged",
    "DamagedShard",
    "Missing",
    "NewerFormat",
    "RunLock",
    "Shard",
    "Writer",
    "map_dataset",
    "read_json",
    "read_shard",
    "remove_temporaries",
    "seal_json",
    "sealed",
    "shard_name",
    "shard_ok",
    "shard_problem",
    "shard_ranges",
    "write_bytes",
    "write_shard",
]


class Writer:
    """Runs calls one after another in one background thread, so that the forward doesn't wait for the disk.

    At most `depth` calls wait; then `submit` blocks. Calls run in the order submitted. After one fails, no
    later one runs, and its exception is raised by every following `submit` and `flush` and at exit.

    Leaving the ``with`` block runs what was submitted, also when the block raised; after KeyboardInterrupt
    only the call in flight is finished. Arrays handed over must not be changed afterwards: copy a pinned
    buffer before reusing it.
    """

    def __init__(self, depth: int = 4):
        self._waiting: queue.Queue[Callable[[], Any] | None] = queue.Queue(depth)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._dropping = False
        self._closed = False

    def submit(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Queue ``function(*args, **kwargs)``; wait while the queue is full."""
        if self._closed:
            raise RuntimeError("the writer is closed")
        self._raise()
        if self._thread is None:
            # a daemon: a program that dies without leaving the block must not hang at exit
            self._thread = threading.Thread(target=self._work, name="probekit-writer", daemon=True)
            self._thread.start()
        self._waiting.put(lambda: function(*args, **kwargs))

    def write_shard(
        self,
        path: Path,
        arrays: Mapping[str, np.ndarray],
        attrs: Mapping[str, Any],
        *,
        bfloat16: Collection[str] = (),
    ) -> None:
        """Queue `probekit.store.shards.write_shard`."""
        self.submit(write_shard, path, dict(arrays), dict(attrs), bfloat16=bfloat16)

    def flush(self) -> None:
        """Wait until everything submitted has run."""
        self._waiting.join()
        self._raise()

    def close(self, *, drop: bool = False) -> None:
        """Run what waits (with `drop`: only finish the call in flight), end the thread, raise its error."""
        self._dropping |= drop
        if not self._closed:
            self._closed = True
            if self._thread is not None:
                try:
                    self._waiting.put(None)
                    self._thread.join()
                except KeyboardInterrupt:
                    self._dropping = True
                    if self._thread.is_alive():
                        self._waiting.put(None)  # a second end is harmless, a lost one would hang
                        self._thread.join()
                    raise
        self._raise()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close(drop=isinstance(error, KeyboardInterrupt))
        except Exception as lost:
            if error is None:
                raise
            if lost is not error:  # the block's own exception goes on; the thread's stays visible with it
                error.add_note(f"the writer also failed: {lost}")

    def _work(self) -> None:
        while (call := self._waiting.get()) is not None:
            try:
                if self._error is None and not self._dropping:
                    call()
            except BaseException as error:  # raised again in the caller's thread
                self._error = error
            finally:
                del call  # frees its arrays while this waits for the next
                self._waiting.task_done()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


class RunLock:
    """One process at a time writes a run folder: ``with RunLock(folder): ...``

    The kernel drops the lock when its holder dies, also by kill -9, so a lock file that is left over means
    nothing. ``run.lock.json`` beside it says who holds it, for the message only. The folder is made if
    needed.

    Raises StoreError at once when another holds it, or when the folder can't be written.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._holder = self.folder / "run.lock.json"
        # not thread-local: a run may be closed by another thread than opened it
        self._lock = filelock.FileLock(self.folder / "run.lock", timeout=0, thread_local=False)

    def acquire(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except filelock.Timeout:
            raise StoreError(
                f"run folder '{self.folder}' is being written by {self._who()}",
                hint="wait for it to end, or choose another folder with `--out`",
            ) from None
        except OSError as error:
            raise self._unwritable(error) from error
        now = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            write_bytes(
                self._holder,
                json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": now}).encode(),
            )
        except BaseException:
            self._lock.release()
            raise

    def release(self) -> None:
        """Let go; harmless when not held."""
        if self._lock.is_locked:
            with contextlib.suppress(OSError):
                self._holder.unlink()
            self._lock.release()

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _who(self) -> str:
        try:
            holder = json.loads(self._holder.read_bytes())
            return f"probekit pid {holder['pid']} on host {holder['host']} since {holder['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another probekit"

    def _unwritable(self, error: OSError) -> StoreError:
        reason = (os.strerror(error.errno) if error.errno else str(error)).lower()
        return StoreError(
            f"can't write in run folder '{self.folder}': {reason}",
            hint="choose a folder you can write to with `--out`",
        )
