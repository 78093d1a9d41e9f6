"""What several tests share: a folder of photographs-like images, a tiny model, the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
TINY = f"{Path(__file__).parent / 'tiny.py'}:build"


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """40 smooth random images in four class folders."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for index in range(40):
        small = random.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((60, 50), Image.Resampling.BICUBIC)
        path = folder / f"class{index % 4}" / f"{index:02d}.png"
        path.parent.mkdir(exist_ok=True)
        image.save(path)
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with imagenet-sample, cifar10.zip and cue-conflict, where a machine has it."""
    folder = Path(os.environ.get("PROBEKIT_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "imagenet-sample").is_dir():
        pytest.skip("no real images on this machine (PROBEKIT_TEST_DATA)")
    return folder


def probekit_command(*words: object, env: dict[str, str] | None = None, cwd: Path | None = None, **more):
    """Run the command line in its own process; returns the finished process with text output."""
    return subprocess.run(
        [sys.executable, "-m", "probekit", *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "100", "OMP_NUM_THREADS": "1", **(env or {})},
        cwd=cwd,
        timeout=300,
        **more,
    )


@pytest.fixture
def command():
    return probekit_command


@pytest.fixture
def cli(capsys):
    """Run the command line in this process: returns (exit code, stdout, stderr)."""
    from probekit.cli.app import main

    def run(*words: object) -> tuple[int, str, str]:
        code = main([str(w) for w in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def tiny() -> str:
    """A model reference that builds in milliseconds."""
    return TINY
