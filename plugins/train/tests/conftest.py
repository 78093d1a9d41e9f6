"""Makes the dataset beside these tests importable, also for the processes they start."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def probekit(capsys):
    """Runs a command line in this process: (exit code, stdout, stderr)."""
    from probekit.cli.app import main

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main(["--plugin", str(HERE / "tiny_pictures.py"), *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
