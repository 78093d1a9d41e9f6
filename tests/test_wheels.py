"""Every distribution as a wheel, installed into an environment of its own.

A full environment would need gigabytes of torch, so the clean one sees this one's packages through links, all
but probekit's own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKS = sorted(p.parent.name for p in ROOT.glob("plugins/*/pyproject.toml"))


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("wheels")
    found = {}
    sources = {"core": ROOT, "examples": ROOT / "examples", **{p: ROOT / "plugins" / p for p in PACKS}}
    for name, source in sources.items():
        folder = out / name
        # from a copy without build folders: setuptools writes into the source tree
        copy = out / f"source-{name}"
        _copy(source, copy)
        words = [
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            str(folder),
            str(copy),
        ]
        subprocess.run([sys.executable, *words], check=True, capture_output=True)
        found[name] = next(folder.glob("*.whl"))
    return found


def _copy(source: Path, target: Path) -> None:
    never = shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", "__pycache__", "runs")

    def skip(folder: str, names: list[str]) -> set[str]:
        top = {"plugins", "tests"} if Path(folder) == source else set()
        return {*never(folder, names), *(top & set(names))}

    shutil.copytree(source, target, ignore=skip)


class Environment:
    """A Python of its own with this one's third-party packages and none of probekit's."""

    def __init__(self, folder: Path):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        self.python = folder / "bin" / "python"
        self.site = next(folder.glob("lib/python*/site-packages"))
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            if "probekit" not in entry.name.lower() and not entry.name.startswith("__editable__"):
                (self.site / entry.name).symlink_to(entry)

    def install(self, wheel: Path) -> None:
        words = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(self.site), str(wheel)]
        subprocess.run([sys.executable, *words], check=True, capture_output=True)

    def uninstall(self, wheel: Path) -> None:
        with zipfile.ZipFile(wheel) as names:
            for name in names.namelist():
                (self.site / name).unlink(missing_ok=True)

    def probekit(self, *words: str) -> subprocess.CompletedProcess[str]:
        env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        return subprocess.run(
            [str(self.python), "-m", "probekit", *words],
            capture_output=True,
            text=True,
            env=env,
            cwd=self.site.parent,
        )


@pytest.fixture(scope="module")
def environment(wheels, tmp_path_factory) -> Environment:
    made = Environment(tmp_path_factory.mktemp("clean") / "venv")
    made.install(wheels["core"])
    return made


def test_core_alone_lists_what_it_has(environment):
    done = environment.probekit("list", "--json")
    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout)
    assert {"nmi", "fourier", "attention_distance"} <= {m["name"] for m in listed["metrics"]}
    assert {m["pack"] for m in listed["models"]} == {"probekit"}


def test_core_has_its_data_files(wheels):
    names = zipfile.ZipFile(wheels["core"]).namelist()
    assert "probekit/py.typed" in names
    assert any(n.endswith(".j2") for n in names)
    assert any(n.endswith(".tmpl") for n in names)
    assert not any(n.startswith(("tests/", "plugins/", "docs/")) for n in names)


@pytest.mark.parametrize("pack", [p for p in PACKS if p != "train"])
def test_a_pack_comes_and_goes(environment, wheels, pack):
    environment.install(wheels[pack])
    listed = json.loads(environment.probekit("list", "models", "--json").stdout)["models"]
    assert {m["pack"] for m in listed} == {"probekit", pack}
    environment.uninstall(wheels[pack])
    done = environment.probekit("inspect", pack)
    assert done.returncode in (2, 3)
    assert f"pip install vit-probekit-{pack}" in done.stderr
    assert environment.probekit("list", "metrics").returncode == 0


def test_a_third_partys_metric_and_models_as_a_package(environment, wheels, photos, tiny):
    environment.install(wheels["examples"])
    listed = json.loads(environment.probekit("list", "--json").stdout)
    assert "entropy" in {m["name"] for m in listed["metrics"]}
    assert "tv:b16" in {m["name"] for m in listed["models"]}
    out = environment.site.parent / "run"
    words = ("run", "--model", tiny, "--metrics", "entropy", "--dataset", f"folder:{photos}", "--limit", "4")
    done = environment.probekit(*words, "--out", str(out), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["cells"][0]["status"] == "done"
    environment.uninstall(wheels["examples"])
