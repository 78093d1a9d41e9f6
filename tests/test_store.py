"""A run survives kill -9, a full disk is one sentence, one process writes a run, no error is lost."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from probekit.errors import StoreError
from probekit.store import shards
from probekit.store.writing import (
    RunLock,
    read_shard,
    remove_temporaries,
    write_bytes,
    write_shard,
)

ROOT = Path(shards.__file__).parents[1]
ARRAYS = {
    "nmi": np.arange(36, dtype=np.float32).reshape(3, 12),
    "layers/0/q": np.arange(60, dtype=np.float16).reshape(3, 4, 5),
    "images": np.array(["a.jpg", "é.jpg", "odd\udcff.jpg"]),
}
ATTRS = {"range": [0, 3], "metric": "nmi", "seed": None}


def python(code: str, *args: object, **kwargs) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def finished(process: subprocess.Popen, timeout: float = 120) -> str:
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, (process.returncode, out, err)
    return out


@pytest.fixture
def mounted(tmp_path):
    """Mounts small tmpfs folders; skips where that isn't allowed."""
    folders = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"mount{len(folders)}"
        folder.mkdir()
        try:
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True, capture_output=True
            )
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("can't mount here")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", folder], check=True)


def test_the_store_imports_neither_torch_nor_xarray():
    code = "import sys, probekit.store.writing; print([m for m in ('torch', 'xarray', 'pandas') if m in sys.modules])"
    assert finished(python(code)).strip() == "[]"


# -------------------------------------------------------------------------------------------- kill loop

WRITER = """
    import sys
    from pathlib import Path
    import numpy as np
    from probekit.store.writing import RunLock, Writer, remove_temporaries, shard_name, shard_ok, shard_ranges
    folder = Path(sys.argv[1])
    with RunLock(folder), Writer() as writer:
        remove_temporaries(folder)
        print("ready", flush=True)
        for index, images in enumerate(shard_ranges(120, 4)):
            path, attrs = folder / "traces" / shard_name(index), {"range": [images.start, images.stop]}
            if shard_ok(path, attrs, verify=True):
                continue
            values = np.arange(262144, dtype=np.float32).reshape(4, 65536) + index
            writer.write_shard(path, {"values": values}, attrs)
    print("done")
"""


def state(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "run.lock"}


def test_killed_at_random_moments_and_resumed_is_byte_identical(tmp_path):
    reference = tmp_path / "reference"
    began = time.monotonic()
    finished(python(WRITER, reference))
    whole = time.monotonic() - began
    expected = state(reference)
    assert len(expected) == 30
    rng, kills, rounds, temporaries = random.Random(1), 0, 0, 0
    while kills < 20:
        folder = tmp_path / f"run{rounds}"
        rounds += 1
        while True:
            process = python(WRITER, folder)
            assert process.stdout.readline() == "ready\n", process.stderr.read()
            time.sleep(rng.uniform(0, min(0.15, whole / 3)))
            process.kill()
            out, _ = process.communicate(timeout=60)
            if process.returncode == 0 or "done" in out:
                break
            assert process.returncode == -signal.SIGKILL
            kills += 1
            for path in folder.rglob("*.h5"):
                read_shard(path)  # whole, or not there
            temporaries += len(list(folder.rglob("*.tmp")))
            if kills >= 20 and rounds > 1:
                finished(python(WRITER, folder))
                break
        assert state(folder) == expected
    assert temporaries > 0  # some kills did hit a shard in the making


def test_only_our_temporaries_are_removed(tmp_path):
    ours = tmp_path / "a" / "shard-00001.h5.4711-0123abcd.tmp"
    theirs = [tmp_path / "notes.tmp", tmp_path / "a" / "x.123.tmp", tmp_path / "a" / "shard-00001.h5"]
    ours.parent.mkdir()
    for path in [ours, *theirs]:
        path.write_bytes(b"x")
    assert remove_temporaries(tmp_path) == [ours]
    assert not ours.exists()
    assert all(path.exists() for path in theirs)


# ------------------------------------------------------------------------------------------- full disks


def test_too_little_space_is_said_before_writing(tmp_path, monkeypatch):
    real = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((*real[:4], 20, *real[5:])))
    with pytest.raises(StoreError, match=r"x\.h5' needs 4.4 MB, the disk has \d+ kB") as caught:
        write_shard(tmp_path / "x.h5", {"x": np.zeros(1_000_000, np.float32)}, {})
    assert caught.value.hint == "free space and run the same command again"
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_while_writing(mounted):
    """At every fill level: one StoreError, all space given back, the next shard works, a clean exit."""
    folder = mounted("size=1m")
    code = """
        import os, sys
        from pathlib import Path
        import numpy as np
        from probekit.store import shards
        folder = Path(sys.argv[1])
        real = os.statvfs
        class Plenty:
            f_bavail, f_frsize = 2**40, 1
        arrays = {f"layers/{i}": np.arange(20_000, dtype="f4") for i in range(4)}
        arrays["images"] = np.array(["x" * 50] * 100)
        attrs = {"images": "x" * 30_000}
        failed = written = 0
        for left in [0, 4096, 40960, 163840, *range(311296, 380000, 4096)]:
            free = real(folder).f_bavail * 4096
            (folder / "fill").write_bytes(b"x" * (free - left))
            before = real(folder).f_bavail
            os.statvfs = lambda _: Plenty
            try:
                shards.write_shard(folder / "x.h5", arrays, attrs)
                written += 1
            except shards.StoreError as error:
                assert "needs" in error.message, error
                failed += 1
                assert real(folder).f_bavail == before, (left, "space isn't given back")
                assert [p.name for p in folder.iterdir()] == ["fill"]
            (folder / "fill").unlink()
            os.statvfs = real
            shards.write_shard(folder / "x.h5", arrays, attrs)
            shards.read_shard(folder / "x.h5")
            (folder / "x.h5").unlink()
        print(failed, written)
    """
    failed, written = map(int, finished(python(code, folder)).split())
    assert failed > 8
    assert written > 2


def test_a_file_size_limit(tmp_path):
    code = """
        import resource, sys
        from pathlib import Path
        import numpy as np
        from probekit.store.writing import Writer, StoreError, seal_json
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        for write in (lambda w: w.write_shard(Path(sys.argv[1]) / "x.h5", {"x": np.zeros(100_000)}, {}),
                      lambda w: w.submit(seal_json, Path(sys.argv[1]) / "x.json", "x" * 200_000)):
            try:
                with Writer() as writer:
                    write(writer)
            except StoreError as error:
                print(error.message)
    """
    lines = finished(python(code, tmp_path)).splitlines()
    assert [line.partition("': ")[2] for line in lines] == ["file too large"] * 2
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------ locks and folders


def test_two_processes_cannot_write_one_run(tmp_path):
    holder = python(
        """
        import sys, time
        from probekit.store.writing import RunLock
        with RunLock(sys.argv[1]):
            print("held", flush=True)
            time.sleep(60)
        """,
        tmp_path / "run",
    )
    try:
        assert holder.stdout.readline() == "held\n"
        lock = RunLock(tmp_path / "run")
        expected = f"is being written by probekit pid {holder.pid} on host {socket.gethostname()} since 20"
        with pytest.raises(StoreError, match=expected) as caught:
            lock.acquire()
        assert caught.value.hint
    finally:
        holder.kill()
        holder.communicate()
    with lock:  # the kernel let go
        assert json.loads((tmp_path / "run/run.lock.json").read_bytes())["pid"] == os.getpid()
        with pytest.raises(StoreError, match=f"pid {os.getpid()}"):
            RunLock(tmp_path / "run").acquire()
    assert not (tmp_path / "run/run.lock.json").exists()
    with RunLock(tmp_path / "run"):
        pass


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    """A data loader's worker may outlive a killed run."""
    code = """
        import os, sys, time
        from probekit.store.writing import RunLock
        with RunLock(sys.argv[1]):
            child = os.fork()
            if not child:
                print(os.getpid(), flush=True)  # by now it runs, and has let go
                time.sleep(60)
                os._exit(0)
            time.sleep(60)
    """
    holder = python(code, tmp_path)
    child = int(holder.stdout.readline())
    try:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait(timeout=20)
        with RunLock(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        holder.communicate()


def test_a_read_only_folder(mounted):
    folder = mounted("size=1m,ro")
    with pytest.raises(StoreError, match=r"can't write '.*x\.h5': read-only file system") as caught:
        write_shard(folder / "x.h5", ARRAYS, ATTRS)
    assert "--out" in caught.value.hint
    for path in (folder, folder / "run"):
        with pytest.raises(StoreError, match=r"can't write in run folder '.*': read-only file system"):
            RunLock(path).acquire()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with pytest.raises(StoreError, match="permission denied"):
            write_shard(tmp_path / "x.h5", ARRAYS, ATTRS)
        with pytest.raises(StoreError, match="permission denied"):
            RunLock(tmp_path).acquire()
    finally:
        tmp_path.chmod(stat.S_IRWXU)


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(StoreError, match="run"):
        RunLock(tmp_path / "run").acquire()
    with pytest.raises(StoreError, match="can't write"):
        write_bytes(tmp_path / "run" / "x", b"")
