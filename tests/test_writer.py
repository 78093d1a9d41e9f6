"""The writer thread keeps order, never hangs, and loses no error."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import probekit.store.writing
from probekit.errors import StoreError
from probekit.store.writing import Writer


def run(code: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(Path(probekit.store.writing.__file__).parents[2])}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(
        command,
        env=env,
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout


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
        from probekit.store.writing import Writer
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
    count, quick = run(code).split()
    assert quick == "True"
    assert 1 <= int(count) <= 5


def test_a_shard_that_cannot_be_written_stops_the_run(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="can't write"), Writer() as writer:
        writer.write_shard(tmp_path / "file" / "x.h5", {"x": np.ones(3)}, {})
