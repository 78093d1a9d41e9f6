"""The command line as a user meets it: start-up, exit codes, one sentence for every mistake."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TINY = f"{Path(__file__).parent / 'tiny.py'}:build"


def test_help_loads_nothing_heavy(command):
    code = "import sys; sys.argv = ['probekit', '--help']\nfrom probekit.cli.app import main\nmain()\n"
    code += "heavy = {'torch', 'numpy', 'xarray', 'h5py', 'timm', 'matplotlib'} & set(sys.modules)\n"
    code += "print('HEAVY', sorted(heavy))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout
    assert "Usage: probekit" in done.stdout


def test_import_loads_no_torch():
    code = "import sys, probekit; print('torch' in sys.modules, 'xarray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_public_names():
    import probekit

    assert len(probekit.__all__) <= 25
    assert all(getattr(probekit, name) is not None for name in probekit.__all__)
    assert set(probekit.__all__) <= set(dir(probekit))
    with pytest.raises(AttributeError):
        probekit.nonsense  # noqa: B018


def test_every_command_shows_examples(cli):
    code, out, _ = cli("--help")
    assert code == 0
    listed = out.partition("Commands:")[2]
    names = [line.split()[0] for line in listed.splitlines() if line.startswith("  ") and line[2] != " "]
    expected = {
        "run",
        "capture",
        "status",
        "show",
        "report",
        "compare",
        "verify",
        "inspect",
        "list",
        "plugins",
        "doctor",
    }
    assert expected <= set(names)
    for name in names:
        code, out, _ = cli(name, "--help")
        assert code == 0
        assert f"probekit {name}" in out
        assert "Example" in out, name


def test_a_run_and_its_json(command, photos, tmp_path):
    done = command(
        "run",
        "--model",
        TINY,
        "--metrics",
        "nmi",
        "--dataset",
        f"folder:{photos}",
        "--out",
        "r",
        "--json",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert [c["status"] for c in said["cells"]] == ["done"]
    assert (tmp_path / said["report"]).exists()


NOISY = """
from PIL import Image
from probekit import Dataset, Metric, hookimpl
from probekit.findings import Finding
from probekit.specs import DatasetSpec, FindingSpec, MetricSpec, ReportSpec
from tiny import build as tiny
PROBEKIT_API = 1
print("noise: module")
@hookimpl
def probekit_datasets(): return [DatasetSpec(name="greys", summary="s", target="noisy:Greys")]
@hookimpl
def probekit_metrics(): return [MetricSpec(name="loud", summary="s", target="noisy:Loud")]
@hookimpl
def probekit_reports(): return [ReportSpec(name="names", summary="s", target="noisy:render")]
@hookimpl
def probekit_findings(): return [FindingSpec(name="claim", summary="s", target="noisy:Claim")]
class Greys(Dataset):
    name, ids = "greys", ["a", "b"]
    def __init__(self, argument): print("noise: dataset")
    def image(self, index):
        print("noise: image")
        return Image.new("RGB", (32, 32), (90 * index,) * 3)
class Loud(Metric):
    name, needs, dims = "loud", {"attention"}, {"loud": ("head",)}
    def measure(self, layer):
        print("noise: metric")
        return {"loud": layer.attention.amax((-1, -2))}
class Claim(Finding):
    name, claim, metrics = "claim", "Loud.", ("loud",)
    def __init__(self): print("noise: finding")
def build():
    print("noise: builder")
    return tiny()
def render(run, path):
    print("noise: report")
    path.write_text("x")
    return path
"""


def test_what_others_code_prints_is_not_in_the_json(cli, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    file, folder = tmp_path / "noisy.py", tmp_path / "r"
    file.write_text(NOISY)
    run = ("run", "--model", f"{file}:build", "--metrics", "loud", "--dataset", "greys", "--out", folder)
    for words, prints in (
        ((*run, "--dry-run"), ("builder", "dataset", "image", "metric")),
        (run, ("builder", "dataset", "image", "metric")),
        (("inspect", f"{file}:build"), ("builder",)),
        (("report", folder, "--format", "names"), ("report",)),
        (("findings", folder), ("finding",)),
    ):
        _, out, err = cli("--no-plugins", "--plugin", file, *words, "--json")
        assert isinstance(json.loads(out), dict), words
        assert [name for name in prints if f"noise: {name}" not in err] == [], (words, err)


def test_lines_fit_in_80_columns(command, photos, tmp_path):
    words = (
        "run",
        "--model",
        TINY,
        "--metrics",
        "attention_distance,nmi,fourier",
        "--dataset",
        f"folder:{photos}",
        "--out",
        "r",
    )
    done = command(*words, cwd=tmp_path, env={"COLUMNS": "80"})
    assert done.returncode == 0, done.stderr
    assert "3 cells done" in done.stdout
    assert "r/report.html" in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()) <= 80


def test_dry_run_writes_nothing(command, photos, tmp_path):
    words = (
        "run",
        "--model",
        TINY,
        "--metrics",
        "nmi,fourier",
        "--dataset",
        f"folder:{photos}",
        "--out",
        "r",
    )
    done = command(*words, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "40 of 40 images to measure: nmi, fourier" in done.stdout
    assert not (tmp_path / "r").exists()
    command(*words, cwd=tmp_path)
    done = command(*words, "--dry-run", "--json", cwd=tmp_path)
    cell = json.loads(done.stdout)["cells"][0]
    assert cell["remaining"] == 0
    assert cell["skipped"] == ["nmi", "fourier"]


def test_without_out_the_same_grid_goes_on_in_its_folder(command, photos, tmp_path):
    words = ("run", "--model", TINY, "--metrics", "nmi", "--dataset", f"folder:{photos}", "--limit", "4")
    first = command(*words, cwd=tmp_path)
    second = command(*words, cwd=tmp_path)
    other = command(*words[:-1], "5", cwd=tmp_path)
    assert [first.returncode, second.returncode, other.returncode] == [0, 0, 0]
    assert "(continued)" in second.stdout
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_cells_that_were_not_asked_for_come_with_the_command_that_does_them(cli, photos, tmp_path):
    folder, other = tmp_path / "r", TINY.replace(":build", ":other")
    words = ("--dataset", f"folder:{photos}", "--limit", "4", "--out", folder)
    _, out, _ = cli("run", "--model", TINY, "--metrics", "nmi", *words)
    assert "unfinished" not in out
    _, out, _ = cli("run", "--model", other, "--metrics", "fourier", *words)
    assert "2 cells unfinished" in out
    command = out.splitlines()[-1].split()
    assert cli("status", folder)[1].splitlines()[-1].split() == command
    assert command[0] == "probekit" and cli(*command[1:])[0] == 0
    assert "4 done" in cli("status", folder)[1]


@pytest.mark.parametrize("suffix", ["yaml", "toml"])
def test_grid_files(command, photos, tmp_path, suffix):
    grid = {
        "yaml": f"models: ['{TINY}']\nmetrics: [fourier, {{nmi: {{compat: cl-vs-mim}}}}]\ndatasets: ['folder:{photos}']\nlimit: 4\n",
        "toml": f"models = ['{TINY}']\nmetrics = ['fourier', {{nmi = {{compat = 'cl-vs-mim'}}}}]\ndatasets = ['folder:{photos}']\nlimit = 4\n",
    }[suffix]
    (tmp_path / f"grid.{suffix}").write_text(grid)
    done = command("run", f"grid.{suffix}", "--out", "r", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [c["metric"] for c in json.loads(done.stdout)["cells"]] == ["fourier", "nmi:compat=cl-vs-mim"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("run --model simim@random --dataset folder:{photos}", 2, "unknown model 'simim'"),
        ("run --model {tiny} --metrics nmj --dataset folder:{photos}", 2, "unknown metric 'nmj'"),
        ("run --model {tiny} --dataset foldr:{photos}", 2, "unknown dataset 'foldr'"),
        ("run --model {tiny} --dataset folder:/nowhere", 4, "/nowhere"),
        ("run --dataset folder:{photos}", 2, "says nothing about 'models'"),
        ("run nowhere.yaml", 2, "'nowhere.yaml' does not exist"),
        ("run --model {tiny} --dataset folder:{photos} --limit 0", 2, "'limit' can't be 0"),
        ("run --model {tiny} --dataset folder:{photos} --device gpu", 2, "device 'gpu'"),
        ("run --model {tiny} --dataset folder:{photos} --metrics nmi:compat=x", 2, "compat"),
        ("run --model {tiny_bare} --dataset folder:{photos} --out r", 4, "no attention between tokens"),
        ("run --model {tiny}@/nowhere.pth --dataset folder:{photos} --out r", 4, "/nowhere.pth"),
        ("inspect simim", 2, "unknown model 'simim'"),
        ("status nowhere", 4, "'nowhere' does not exist"),
        ("shwo x", 2, "unknown command 'shwo'"),
        ("run --wrong", 2, "--wrong"),
    ],
)
def test_mistakes_get_one_sentence(cli, photos, tmp_path, monkeypatch, words, code, said):
    monkeypatch.chdir(tmp_path)
    bare = TINY.replace(":build", ":without_attention")
    got, _, err = cli(*words.format(photos=photos, tiny=TINY, tiny_bare=bare).split())
    assert got == code, err
    assert said in err
    assert "Traceback" not in err


def test_near_names_are_hinted(cli, photos):
    _, _, err = cli("run", "--model", TINY, "--metrics", "nmj", "--dataset", f"folder:{photos}")
    assert "did you mean 'nmi'" in err


def test_a_plugin_file_runs(command, photos, tmp_path):
    example = os.path.join(os.path.dirname(__file__), "..", "examples", "entropy.py")
    words = (
        "run",
        "--plugin",
        example,
        "--model",
        TINY,
        "--metrics",
        "entropy",
        "--dataset",
        f"folder:{photos}",
    )
    done = command(*words, "--out", "r", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [c["status"] for c in json.loads(done.stdout)["cells"]] == ["done"]


def test_failed_cells_give_exit_code_1(cli, photos, tmp_path):
    plugin = tmp_path / "bad.py"
    plugin.write_text(
        "from probekit import Metric\n"
        "class Bad(Metric):\n"
        "    name = 'bad'; needs = {'attention'}; dims = {'bad': ()}\n"
        "    def measure(self, layer): raise ValueError('boo')\n"
    )
    words = (
        "run",
        "--plugin",
        plugin,
        "--model",
        TINY,
        "--metrics",
        "bad,nmi",
        "--dataset",
        f"folder:{photos}",
    )
    code, out, err = cli(*words, "--limit", "4", "--out", tmp_path / "r")
    assert code == 1
    assert "1 cell done" in out and "1 cell failed" in out
    assert "boo" in out + err


def test_ctrl_c_is_no_traceback(photos, tmp_path):
    (tmp_path / "slow.py").write_text(
        "import time\nfrom probekit import Metric\n"
        "class Slow(Metric):\n"
        "    name = 'slow'; needs = {'attention'}; dims = {'slow': ()}\n"
        "    def measure(self, layer):\n        time.sleep(0.2)\n        return {'slow': layer.attention.mean((1, 2, 3))}\n"
    )
    words = [
        sys.executable,
        "-m",
        "probekit",
        "run",
        "--plugin",
        "slow.py",
        "--model",
        TINY,
        "--metrics",
        "slow",
    ]
    words += ["--dataset", f"folder:{photos}", "--out", "r", "--batch-size", "1"]
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("r/cells/*/*/cell.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in err
    assert "Traceback" not in err


def test_inspect(cli):
    code, out, err = cli("inspect", TINY, "--json")
    assert code == 0, err
    said = json.loads(out)
    assert [layer["heads"] for layer in said["layers"]] == [2, 2, 2]
    assert said["layers"][0]["prefix"] == 1
    assert said["layers"][0]["grid"] == [4, 4]
    assert said["layers"][0]["stride"] == [8.0, 8.0]
    code, out, _ = cli("inspect", TINY)
    assert "blocks.0-2.attn" in out
    assert max(len(line) for line in out.splitlines()) <= 110


FAILING = """
import sys
from probekit import Model
from torch import nn

def fails(): return Model(nn.Linear(2, 2), forward=lambda module, images: 1 / 0)
def leaves(): return Model(nn.Linear(2, 2), forward=lambda module, images: sys.exit(0))
def exits(): sys.exit(0)
def text(): return Model(nn.Linear(2, 2), preprocessing="imagenet")
"""


@pytest.mark.parametrize(
    ("builder", "said"),
    [
        ("fails", "raised ZeroDivisionError: division by zero (failing.py, line 6)"),
        ("leaves", "raised SystemExit: 0"),
        ("exits", "failed to build: SystemExit: 0"),
        ("text", "has a 'str' as its 'preprocessing'"),
    ],
)
def test_a_model_whose_code_fails_is_one_sentence_for_every_command(cli, photos, tmp_path, builder, said):
    (tmp_path / "failing.py").write_text(FAILING)
    model = f"{tmp_path / 'failing.py'}:{builder}@random"
    images = ["--dataset", f"folder:{photos}", "--limit", 2, "--out"]
    for words in (
        ["inspect", model],
        ["capture", model, *images, tmp_path / "c"],
        ["run", "--model", model, "--metrics", "nmi", *images, tmp_path / "r"],
    ):
        code, _, err = cli(*words)
        assert code == 3 and "Traceback" not in err
        assert f"'{model}'" in err and said in " ".join(err.split())


def test_doctor(cli):
    code, out, _ = cli("doctor", "--json")
    said = {c["check"]: c for c in json.loads(out)}
    assert said["torch"]["ok"] and said["plugin probekit"]["ok"]
    assert code in (0, 1)
