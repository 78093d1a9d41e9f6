"""Shards survive kill -9, damage is found, a full disk is one sentence, one process writes a run."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probekit import shards
from probekit.errors import StoreError
from probekit.store import (
    Damaged,
    DamagedShard,
    Missing,
    NewerFormat,
    RunLock,
    Writer,
    map_dataset,
    read_json,
    read_shard,
    remove_temporaries,
    seal_json,
    shard_name,
    shard_ok,
    shard_problem,
    shard_ranges,
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
def shard(tmp_path):
    path = tmp_path / "traces" / shard_name(0)
    write_shard(path, ARRAYS, ATTRS)
    return path


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


# ------------------------------------------------------------------------------------------- the format


def test_round_trip(shard):
    read = read_shard(shard)
    assert set(read.arrays) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert read.arrays[name].dtype.kind == array.dtype.kind
        np.testing.assert_array_equal(read.arrays[name], array)
    assert read.arrays["layers/0/q"].dtype == np.float16
    assert read.attrs == ATTRS
    assert read.bfloat16 == frozenset()
    assert os.listdir(shard.parent) == ["shard-00000.h5"]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_characters="\0")), max_size=5),
    st.sampled_from(["?", "i1", "<u2", "<i8", ">i4", "<f2", "<f4", "<f8", "<c8"]),
    st.lists(st.integers(0, 4), max_size=3),
    st.integers(),
)
def test_round_trip_of_anything(tmp_path_factory, strings, dtype, shape, seed):
    path = tmp_path_factory.mktemp("any") / "x.h5"
    raw = np.random.default_rng(abs(seed)).integers(0, 2, size=shape)
    array = raw.astype(dtype)
    write_shard(path, {"strings": np.array(strings, dtype=object), "a/b": array}, {"text": strings})
    read = read_shard(path)
    assert list(read.arrays["strings"]) == strings
    assert read.attrs == {"text": strings}
    assert read.arrays["a/b"].dtype == array.dtype
    np.testing.assert_array_equal(read.arrays["a/b"], array)
    np.testing.assert_array_equal(map_dataset(path, "a/b"), array)


def test_same_content_gives_the_same_bytes(shard):
    first = shard.read_bytes()
    time.sleep(1.1)  # a time stamp in the file would show
    write_shard(shard, dict(reversed(ARRAYS.items())), dict(reversed(ATTRS.items())))
    assert shard.read_bytes() == first


def test_readable_with_h5py_alone_and_contiguous(shard):
    with h5py.File(shard) as file:
        assert file.attrs["format"] == b"probekit-shard"
        assert file.attrs["format_version"] == 1
        assert json.loads(file.attrs["attrs"]) == ATTRS
        dataset = file["layers/0/q"]
        assert dataset.chunks is None
        assert dataset.compression is None
        assert file["images"].asstr()[0] == "a.jpg"
        import xxhash

        assert dataset.attrs["xxh3_128"].decode() == xxhash.xxh3_128_hexdigest(ARRAYS["layers/0/q"].tobytes())


def test_some_names_only(shard):
    assert list(read_shard(shard, ["nmi"]).arrays) == ["nmi"]
    assert read_shard(shard, []).attrs == ATTRS
    with pytest.raises(StoreError, match="no dataset 'cka'.*\n.*images, layers/0/q, nmi"):
        read_shard(shard, ["cka"])


def test_map_is_a_view_of_the_file(shard):
    mapped = map_dataset(shard, "layers/0/q")
    assert isinstance(mapped, np.memmap)
    assert mapped.flags.aligned
    assert not mapped.flags.writeable
    np.testing.assert_array_equal(mapped, ARRAYS["layers/0/q"])
    assert shard.read_bytes()[mapped.offset : mapped.offset + mapped.nbytes] == mapped.tobytes()
    with pytest.raises(StoreError, match="strings"):
        map_dataset(shard, "images")


def test_bfloat16_bits_are_marked(tmp_path):
    path, bits = tmp_path / "x.h5", np.array([0x3F80, 0x4000], np.uint16)
    write_shard(path, {"tokens": bits, "other": bits}, {}, bfloat16=["tokens"])
    read = read_shard(path)
    assert read.bfloat16 == {"tokens"}
    np.testing.assert_array_equal(read.arrays["tokens"], bits)
    with h5py.File(path) as file:
        assert file["tokens"].attrs["dtype"] == b"bfloat16"
    with pytest.raises(TypeError, match="uint16"):
        write_shard(path, {"x": np.ones(2)}, {}, bfloat16=["x"])
    with pytest.raises(ValueError, match="no array"):
        write_shard(path, {}, {}, bfloat16=["x"])


def test_attributes_larger_than_an_hdf5_header(tmp_path):
    attrs = {"images": [f"n{i:08d}.JPEG" for i in range(20_000)]}
    write_shard(tmp_path / "x.h5", {}, attrs)
    assert read_shard(tmp_path / "x.h5").attrs == attrs


def test_what_the_format_cannot_hold_leaves_nothing_behind(tmp_path):
    for arrays, attrs in [
        ({"x": np.array([object()])}, {}),
        ({"x": np.array(["a\0b"])}, {}),
        ({"x": np.array(["2020"], "datetime64[Y]")}, {}),
        ({"/x": np.ones(1)}, {}),
        ({"a": np.ones(1), "a/b": np.ones(1)}, {}),
        ({}, {"x": object()}),
    ]:
        with pytest.raises((TypeError, ValueError)):
            write_shard(tmp_path / "x.h5", arrays, attrs)
        assert not list(tmp_path.iterdir())


def test_ranges_and_names():
    assert shard_ranges(10, 4) == [range(4), range(4, 8), range(8, 10)]
    assert shard_ranges(0, 4) == []
    assert shard_ranges(4, 4) == [range(4)]
    with pytest.raises(ValueError, match="at least 1"):
        shard_ranges(4, 0)
    assert shard_name(17) == "shard-00017.h5"


def test_the_store_imports_neither_torch_nor_xarray():
    code = "import sys, probekit.store; print([m for m in ('torch', 'xarray', 'pandas') if m in sys.modules])"
    assert finished(python(code)).strip() == "[]"


# ----------------------------------------------------------------------------------------------- damage


def test_every_flipped_bit_is_found_or_harmless(tmp_path):
    path, damaged = tmp_path / "good.h5", tmp_path / "bad.h5"
    write_shard(path, ARRAYS, ATTRS)
    whole, rng, found = path.read_bytes(), random.Random(0), 0
    for position in rng.sample(range(len(whole)), 400):
        data = bytearray(whole)
        data[position] ^= 1 << rng.randrange(8)
        damaged.write_bytes(data)
        try:
            read = read_shard(damaged)
        except StoreError as error:
            assert str(damaged) in error.message
            found += 1
        else:
            assert read.attrs == ATTRS
            assert all(np.array_equal(read.arrays[name], ARRAYS[name]) for name in ARRAYS)
    assert found > 50  # most of such a small file is padding


def test_a_flip_in_the_data_names_file_and_dataset(shard):
    offset = map_dataset(shard, "nmi").offset
    data = bytearray(shard.read_bytes())
    data[offset + 5] ^= 4
    shard.write_bytes(data)
    with pytest.raises(DamagedShard, match=r"shard-00000\.h5' is damaged: dataset 'nmi'") as caught:
        read_shard(shard)
    assert caught.value.hint
    read_shard(shard, ["images"])  # the rest can be read
    read_shard(shard, verify=False)
    assert shard_ok(shard, ATTRS)
    assert "dataset 'nmi'" in shard_problem(shard, ATTRS, verify=True)


def test_truncation_at_any_length(shard):
    whole = shard.read_bytes()
    for length in [0, 1, 8, 100, len(whole) // 2, len(whole) - 1]:
        shard.write_bytes(whole[:length])
        with pytest.raises(DamagedShard, match="shard-00000"):
            read_shard(shard)
        assert not shard_ok(shard, {})


def test_a_missing_or_foreign_file(tmp_path):
    with pytest.raises(Missing, match=r"'.*x\.h5' doesn't exist"):
        read_shard(tmp_path / "x.h5")
    assert "doesn't exist" in shard_problem(tmp_path / "x.h5", {})
    with h5py.File(tmp_path / "other.h5", "w"):
        pass
    with pytest.raises(Damaged, match="not a probekit shard"):
        read_shard(tmp_path / "other.h5")
    with pytest.raises(StoreError):
        read_shard(tmp_path)


def test_a_newer_format_is_refused_and_never_taken_for_damage(shard, monkeypatch):
    monkeypatch.setattr(shards, "FORMAT_VERSION", 2)
    write_shard(shard, ARRAYS, ATTRS)
    monkeypatch.undo()
    for read in (lambda: read_shard(shard), lambda: map_dataset(shard, "nmi"), lambda: shard_ok(shard, {})):
        with pytest.raises(NewerFormat, match=r"newer probekit \(format 2; this one reads up to 1\)"):
            read()


def test_resume_compares_attributes(shard):
    assert shard_ok(shard, {"range": (0, np.int64(3))})  # as JSON sees them
    assert shard_ok(shard, {}, verify=True)
    assert "another 'range'" in shard_problem(shard, {"range": [0, 4]})
    assert "doesn't say 'weights'" in shard_problem(shard, {"weights": "x"})


# -------------------------------------------------------------------------------------------- kill loop

WRITER = """
    import sys
    from pathlib import Path
    import numpy as np
    from probekit.store import RunLock, Writer, remove_temporaries, shard_name, shard_ok, shard_ranges
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
        from probekit import shards
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
        from probekit.store import Writer, StoreError, seal_json
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
        from probekit.store import RunLock
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
        from probekit.store import RunLock
        with RunLock(sys.argv[1]):
            child = os.fork()
            if not child:
                time.sleep(60)
                os._exit(0)
            print(child, flush=True)
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
        with pytest.raises(StoreError, match="can't write in run folder '.*': read-only file system"):
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


# ------------------------------------------------------------------------------------------------- JSON


def test_json_round_trip_and_errors(tmp_path):
    path = tmp_path / "deep" / "run.json"
    obj = {"format_version": 1, "b": [1, None, "\udcff"], "a": {"x": 0.1}}
    seal_json(path, {**obj, "n": np.float32(0.5), "path": Path("x")})
    assert read_json(path, "run", 1) == {**obj, "n": 0.5, "path": "x"}
    assert list(read_json(path, "run", 1)) == ["a", "b", "format_version", "n", "path"]
    with pytest.raises(Missing, match=r"run file '.*none\.json' doesn't exist"):
        read_json(tmp_path / "none.json", "run", 1)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(Damaged, match=r"run file '.*run\.json' is damaged: .*line"):
        read_json(path, "run", 1)
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(Damaged):
        read_json(path, "run", 1)
    seal_json(path, {"format_version": 3})
    with pytest.raises(NewerFormat, match="newer probekit"):
        read_json(path, "run", 2)
    with pytest.raises(TypeError):
        seal_json(path, {"x": object()})
    assert read_json(path, "run", 3) == {"format_version": 3}
    with pytest.raises(StoreError, match="can't read"):
        read_json(tmp_path, "run", 1)


# ----------------------------------------------------------------------------------------------- writer


def fail(error: Exception) -> None:
    raise error


def test_writer_keeps_order_and_flushes():
    done = []
    with Writer() as writer:
        for index in range(50):
            writer.submit(done.append, index)
        writer.flush()
        assert done == list(range(50))
        writer.submit(done.append, 50)
    assert done[-1] == 50
    with pytest.raises(RuntimeError, match="closed"):
        writer.submit(done.append, 0)


def test_writer_blocks_only_when_its_queue_is_full():
    gate, submitted = threading.Event(), []
    with Writer(depth=2) as writer:

        def produce():
            for index in range(4):
                writer.submit(gate.wait)
                submitted.append(index)

        thread = threading.Thread(target=produce)
        thread.start()
        time.sleep(0.2)
        assert submitted == [0, 1, 2]  # one runs, two wait
        gate.set()
        thread.join(timeout=10)
        assert submitted == [0, 1, 2, 3]


def test_writer_error_reaches_submit_flush_and_exit():
    error, done = OSError(errno.EIO, "broken"), []
    with pytest.raises(OSError, match="broken") as caught, Writer(depth=1) as writer:
        writer.submit(fail, error)
        for _ in range(100):  # never a hang, though the queue is short
            time.sleep(0.01)
            writer.submit(done.append, 1)
    assert caught.value is error
    assert done == []  # nothing runs after a failure
    with pytest.raises(OSError, match="broken"), Writer() as writer:
        writer.submit(fail, error)
        for _ in range(2):  # not lost by catching it once
            with pytest.raises(OSError, match="broken"):
                writer.flush()
    with pytest.raises(OSError, match="broken"), Writer() as writer:
        writer.submit(fail, error)


def test_writer_drains_when_the_block_raises():
    done = []
    with pytest.raises(ValueError, match="mine"), Writer(depth=8) as writer:
        for index in range(5):
            writer.submit(time.sleep, 0.01)
            writer.submit(done.append, index)
        raise ValueError("mine")
    assert done == list(range(5))
    with pytest.raises(ValueError, match="mine") as caught, Writer() as writer:
        writer.submit(fail, OSError("full"))
        raise ValueError("mine")
    assert caught.value.__notes__ == ["the writer also failed: full"]


def test_writer_finishes_the_call_in_flight_on_interrupt():
    done, started = [], threading.Event()

    def slow():
        started.set()
        time.sleep(0.1)
        done.append("in flight")

    with pytest.raises(KeyboardInterrupt), Writer() as writer:
        writer.submit(slow)
        writer.submit(done.append, "dropped")
        started.wait()
        raise KeyboardInterrupt
    assert done == ["in flight"]


@pytest.mark.parametrize("where", ["writer.flush()", "pass", "submit()"])
def test_writer_interrupted_while_it_waits(where):
    """A real SIGINT during a blocked submit, a flush or the exit."""
    code = f"""
        import os, signal, threading, time
        from probekit.store import Writer
        done = []
        def slow(index):
            time.sleep(0.3)
            done.append(index)
        def submit():
            for index in range(50):
                writer.submit(slow, index)
        threading.Timer(0.7, os.kill, (os.getpid(), signal.SIGINT)).start()
        began = time.monotonic()
        try:
            with Writer(depth=20) as writer:
                for index in range(20):
                    writer.submit(slow, index)
                {where}
        except KeyboardInterrupt:
            print(len(done), time.monotonic() - began < 3)
    """
    count, quick = finished(python(code), timeout=60).split()
    assert quick == "True"
    assert 1 <= int(count) <= 5


def test_a_shard_that_cannot_be_written_stops_the_run(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="can't write"), Writer() as writer:
        writer.write_shard(tmp_path / "file" / "x.h5", ARRAYS, ATTRS)
