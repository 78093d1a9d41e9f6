"""`probekit status`, `show`, `report`, `compare` and `verify` on run folders of every kind."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from run_folders import MAE, SMALL, SWIN, VIT, make_run

from probekit.cli import reading
from probekit.errors import UsageError
from probekit.store.cells import Outcome
from probekit.summaries import paired_difference

ROOT = Path(__file__).parent.parent
HOSTILE = "<script>\x1b[31malert(1)\u202e 🦊"
READERS = ("status", "show", "report", "compare", "verify")


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("PROBEKIT_PLUGINS", "none")


@pytest.fixture
def mixed(tmp_path):
    """Done, failed, does not apply, interrupted, not begun; two shards each."""
    return make_run(
        tmp_path / "run",
        {"moco:vit-b16": SMALL, "swin": SMALL},
        images=30,
        outcomes={
            ("moco:vit-b16", "nmi"): Outcome(
                "failed", "it raised " + "ValueError " * 12, "ask", "tb", "mypack", "1.2"
            ),
            ("swin", "fourier"): Outcome(
                "does not apply", "a grid of 2 x 2 tokens has no frequency", pack="probekit"
            ),
        },
        shards={("swin", "nmi"): 1, ("moco:vit-b16", "fourier"): 0},
    )


def fits(text: str) -> bool:
    """Lines that hold a path of this test may be longer: paths aren't broken."""
    return all(len(line) <= 80 or "pytest-" in line for line in text.splitlines())


# --- status


def test_status_says_how_far_every_cell_is(cli, mixed):
    code, out, _ = cli("status", mixed.path)
    assert code == 1  # one failed
    assert fits(out)
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "attention_distance done 30 images" in lines
    assert "nmi unfinished 1 of 2 shards" in lines
    assert "fourier unfinished not begun" in lines
    assert "fourier does not apply a grid of 2 x 2 tokens has no frequency" in " ".join(lines)
    assert any(line.startswith("nmi failed mypack 1.2: it raised ValueError") for line in lines)
    assert "2 done, 1 failed, 2 unfinished, 1 does not apply" in lines
    assert "2 models x 3 metrics x 1 dataset" in out


def test_status_json(cli, mixed):
    code, out, _ = cli("status", mixed.path, "--json")
    found = json.loads(out)
    assert code == 1
    assert found["counts"] == {"done": 2, "failed": 1, "does not apply": 1, "unfinished": 2}
    cells = {(c["model"], c["metric"]): c for c in found["cells"]}
    assert len(cells) == 6
    assert [cells["swin", "nmi"][k] for k in ("status", "shards", "shards_total")] == ["unfinished", 1, 2]
    assert cells["moco:vit-b16", "nmi"]["pack"] == "mypack"


def test_status_exits_0_when_nothing_failed(cli, tmp_path):
    run = make_run(tmp_path / "r", {"a": SMALL}, metrics=["nmi"], shards={("a", "nmi"): 1})
    assert cli("status", run.path)[0] == 0
    shutil.rmtree(run.path / "cells")
    code, out, _ = cli("status", run.path)
    assert code == 0 and "not begun" in out
    lines = out.splitlines()
    begin = "    probekit run --model a --metrics nmi --dataset folder:photos"
    assert lines[-2] == "what is unfinished is done by"
    assert lines[-1].startswith(begin) and lines[-1].endswith(f"--out {run.path}")


def test_metrics_with_options_have_shards_of_their_own(cli, tmp_path):
    names = ["nmi", "nmi:compat=cl-vs-mim"]
    run = make_run(
        tmp_path / "r", {"a": SMALL}, metrics=names, images=30, shards={("a", names[1]): 1, ("a", "nmi"): 0}
    )
    found = {c["metric"]: c["shards"] for c in json.loads(cli("status", run.path, "--json")[1])["cells"]}
    assert found == {"nmi": 0, "nmi:compat=cl-vs-mim": 1}


# --- show


def test_show_lists_what_there_is(cli, mixed):
    code, out, _ = cli("show", mixed.path)
    assert code == 0 and fits(out)
    for said in (
        "moco:vit-b16, swin",
        "folder:photos",
        "Fig. 3",
        "px",
        "attention_distance",
        "1 failed, 1 unfinished",
    ):
        assert said in out


def test_show_a_metric_layer_by_layer(cli, tmp_path):
    run = make_run(
        tmp_path / "r", {"moco:vit-b16": VIT, "simmim:vit-b16": VIT, "mae:vit-b16": VIT}, metrics=["nmi"]
    )
    code, out, _ = cli("show", run.path, "nmi")
    assert code == 0 and fits(out)
    ds = run.result("nmi", model="simmim")
    i = 4
    mean, low, high = (ds[f"nmi_curve{end}"].values[i] for end in ("", "_low", "_high"))
    assert f"{mean:#.4g} [{low:#.4g}, {high:#.4g}] +-{ds['nmi_head_sd'].values[i]:#.4g}" in out
    assert out.count("blocks.4.attn") >= 2  # more than one block of columns at 80
    assert "uniform" in out and "95 % percentile bootstrap" in out
    found = json.loads(cli("show", run.path, "nmi", "--model", "simmim", "--json")[1])["metrics"]
    (curve,) = found[0]["panels"][0]["curves"]
    assert curve["model"] == "simmim:vit-b16"
    assert [row["mean"] for row in curve["rows"]] == ds["nmi_curve"].values.tolist()
    assert [row["spread"] for row in curve["rows"]] == ds["nmi_head_sd"].values.tolist()


def test_show_parts_and_models_of_other_depth(cli, tmp_path):
    run = make_run(tmp_path / "r", {"mae": MAE, "swin": SWIN}, metrics=["nmi", "fourier"])
    out = cli("show", run.path, "fourier")[1]
    assert fits(out)
    rows = [line.split() for line in out.splitlines() if line.startswith("12 ")]
    assert [row[1:3] for row in rows][:2] == [["out", "encoder"], ["embed", "decoder"]]


def test_show_csv_is_the_reports(cli, tmp_path):
    run = make_run(tmp_path / "r", {"a": SMALL, "b": SMALL})
    out = cli("show", run.path, "nmi", "--model", "b", "--csv")[1]
    rows = list(csv.DictReader(io.StringIO(out)))
    assert {(r["model"], r["metric"]) for r in rows} == {("b", "nmi")}
    assert cli("report", run.path, "--format", "csv")[0] == 0
    everything = list(csv.DictReader(io.StringIO((run.path / "report.csv").read_text())))
    assert rows == [r for r in everything if r["model"] == "b" and r["metric"] == "nmi"]


def test_show_one_image_has_no_interval(cli, tmp_path):
    run = make_run(tmp_path / "r", {"a": SMALL}, images=1, metrics=["nmi"])
    out = cli("show", run.path, "nmi")[1]
    assert "nan" not in out.lower() and "[" not in out and "mean, no interval" in out
    json.loads(cli("show", run.path, "nmi", "--json")[1], parse_constant=pytest.fail)


@pytest.mark.parametrize(
    "words,code,message",
    [
        (["nmmi"], 2, "did you mean 'nmi'?"),
        (["nmi", "--model", "mocco"], 2, "did you mean"),
        (["nmi", "--dataset", "x"], 2, "it has folder:photos"),
        (["nmi"], 4, "'nmi' has no result yet: it raised"),
        (["nmi", "--csv", "--json"], 2, "can't both be printed"),
    ],
)
def test_show_what_isnt_there(cli, mixed, words, code, message):
    got, out, err = cli("show", mixed.path, *words)
    assert (got, out) == (code, "")
    assert message in err and err.startswith("error: ")


def test_a_damaged_result_doesnt_hide_the_others(cli, tmp_path):
    run = make_run(tmp_path / "r", {"a": SMALL, "b": SMALL}, metrics=["nmi"])
    file = run.folder("a", "folder:photos").result("nmi")
    file.write_bytes(file.read_bytes()[:-3])
    code, out, err = cli("show", run.path, "nmi")
    assert code == 0 and "blocks.0.attn" in out
    assert "note: nmi of a: " in err and "damaged" in err


def test_choose():
    known = ["moco:vit-b16", "moco:vit-s16", "simmim:vit-b16@random"]
    assert reading.choose("model", [], known) == known
    assert reading.choose("model", ["simmim", "moco:vit-s16"], known) == [known[2], known[1]]
    assert reading.choose("model", ["simmim:vit-b16"], known) == [known[2]]
    assert reading.choose("model", ["sim", "moco:vit-s"], known) == [known[2], known[1]]
    for name in ("moco", "moco:vit"):
        with pytest.raises(UsageError, match="could be 2 models"):
            reading.choose("model", [name], known)


# --- report


def test_report_writes_the_page_and_the_table(cli, tmp_path):
    run = make_run(tmp_path / "r", {"a": SMALL}, metrics=["nmi"])
    code, out, _ = cli("report", run.path)
    assert code == 0 and out.strip() == str(run.path / "report.html")
    page = (run.path / "report.html").read_bytes()
    assert page.startswith(b"<!doctype html>")
    code, out, _ = cli("report", run.path, "--out", tmp_path / "deep" / "x.html", "--json")
    assert json.loads(out) == {"report": str(tmp_path / "deep" / "x.html"), "format": "html"}
    assert (tmp_path / "deep" / "x.html").read_bytes() == page
    assert cli("report", run.path, "-f", "csv", "-o", tmp_path)[0] == 0
    assert (tmp_path / "report.csv").read_text().startswith("model,dataset,metric,")


def test_report_opens_a_browser_when_asked(cli, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or True)
    run = make_run(tmp_path / "a run", {"a": SMALL}, metrics=["nmi"])
    cli("report", run.path)
    assert opened == []
    cli("report", run.path, "--open")
    assert opened == [(run.path / "report.html").as_uri()]


def test_report_of_a_plugin(cli, tmp_path):
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from probekit.hookspecs import hookimpl\nfrom probekit.specs import ReportSpec\nPROBEKIT_API = 1\n"
        "@hookimpl\ndef probekit_reports():\n"
        "    return [ReportSpec(name='list', summary='names', target='mine:render', suffix='.txt'),\n"
        "            ReportSpec(name='broken', summary='breaks', target='mine:breaks'),\n"
        "            ReportSpec(name='leaves', summary='exits', target='mine:leaves'),\n"
        "            ReportSpec(name='lazy', summary='writes nothing', target='mine:lazy'),\n"
        "            ReportSpec(name='mute', summary='says nothing', target='mine:mute')]\n"
        "def render(run, path):\n    path.write_text(' '.join(run.models))\n    return path\n"
        "def breaks(run, path):\n    raise KeyError('x')\n"
        "def leaves(run, path):\n    raise SystemExit(0)\n"
        "def lazy(run, path):\n    return path\n"
        "def mute(run, path):\n    pass\n"
    )
    run = make_run(tmp_path / "r", {"a": SMALL}, metrics=["nmi"])
    code, out, _ = cli("--plugin", plugin, "report", run.path, "--format", "list")
    assert code == 0 and out.strip().endswith("report-list.txt")
    assert (run.path / "report-list.txt").read_text() == "a"
    code, _, err = cli("--plugin", plugin, "report", run.path, "--format", "broken")
    assert code == 3 and "report 'broken' of 'mine" in err and "KeyError: 'x' (mine.py, line" in err
    code, _, err = cli("--plugin", plugin, "report", run.path, "--format", "leaves")
    assert code == 3 and "report 'leaves' of 'mine' failed: SystemExit" in err
    code, _, err = cli("--plugin", plugin, "report", run.path, "--format", "lazy")
    assert code == 3 and "report 'lazy' of 'mine' says it wrote" in err
    code, _, err = cli("--plugin", plugin, "report", run.path, "--format", "mute")
    assert code == 3 and "report 'mute' of 'mine' returned a 'NoneType', not the path" in err
    code, _, err = cli("report", run.path, "--format", "htm")
    assert code == 2 and "did you mean 'html'?" in err


# --- compare


def test_compare_two_models_of_a_run(cli, tmp_path):
    run = make_run(tmp_path / "r", {"a": VIT, "b": VIT, "c": VIT}, metrics=["nmi", "fourier"])
    code, out, err = cli("compare", run.path)
    assert code == 2 and "say which two models" in err
    code, out, _ = cli("compare", run.path, "-m", "a", "-m", "c", "--json")
    found = {each["metric"]: each for each in json.loads(out)}
    assert code == 0 and set(found) == {"nmi", "fourier"}
    for metric, how in (("nmi", "mean"), ("fourier", "last")):
        expected = paired_difference(
            run.traces(metric, model="a"), run.traces(metric, model="c"), metric, curve=how
        )
        rows = found[metric]["rows"]
        for key, name in (("a", "a"), ("difference", "difference"), ("low", "difference_low")):
            assert [row[key] for row in rows] == expected[f"{metric}_{name}"].values.tolist()
        assert found[metric]["overall"]["difference"] == float(expected[f"{metric}_overall"])
        assert found[metric]["images"] == 20
        ds = [run.result(metric, model=m)[f"{metric}_curve"].values for m in "ac"]
        assert np.allclose([r["difference"] for r in rows], ds[0] - ds[1])
    code, out, _ = cli("compare", run.path, "-m", "a", "-m", "c", "--metric", "nmi")
    assert code == 0 and fits(out) and "20 images in common (A has 20, B has 20)" in out
    row = found["nmi"]["rows"][2]
    shown = f"{row['difference']:#.4g} [{row['low']:#.4g}, {row['high']:#.4g}]"
    line = next(line for line in out.splitlines() if shown in line)
    assert line.endswith("*") == (row["low"] > 0 or row["high"] < 0)


def test_compare_two_runs(cli, tmp_path):
    one = make_run(tmp_path / "one", {"a": VIT, "b": VIT}, metrics=["nmi"])
    two = make_run(tmp_path / "two", {"b": VIT, "a": VIT}, metrics=["nmi", "fourier"])
    found = json.loads(cli("compare", one.path, two.path, "--json")[1])
    assert [(f["metric"], f["a"]["model"], f["b"]["model"]) for f in found] == [
        ("nmi", "a", "a"),
        ("nmi", "b", "b"),
    ]
    same = json.loads(cli("compare", one.path, one.path, "-m", "a", "--json")[1] or "[]")
    assert all(row["difference"] == row["low"] == row["high"] == 0 for row in same[0]["rows"])
    out = cli("compare", one.path, two.path, "-m", "a")[1]
    assert fits(out) and str(two.path)[:20] in out


def test_compare_other_depths_gives_the_overall_difference(cli, tmp_path):
    run = make_run(tmp_path / "r", {"a": VIT, "s": SMALL}, metrics=["nmi"])
    (found,) = json.loads(cli("compare", run.path, "--json")[1])
    assert found["rows"] == [] and np.isfinite(found["overall"]["difference"])
    assert "only the mean over all is compared" in found["notes"][0]
    assert "all, mean" in cli("compare", run.path)[1]


def rewrite(run, **changes):
    for model in run.models:
        for dataset in run.datasets:
            folder = run.folder(model, dataset)
            about = dict(folder.read())
            about["identity"] = {**about["identity"], **changes}
            folder.write(about)
    return run


def test_compare_refuses_other_images(cli, tmp_path):
    one = make_run(tmp_path / "one", {"a": SMALL}, metrics=["nmi"])
    other = make_run(tmp_path / "other", {"a": SMALL}, metrics=["nmi"], prefix="picture")
    code, _, err = cli("compare", one.path, rewrite(other, images="ff").path)
    assert code == 2 and "different images: they have none in common" in err
    changed = rewrite(make_run(tmp_path / "changed", {"a": SMALL}, metrics=["nmi"]), images="ee")
    code, _, err = cli("compare", one.path, changed.path)
    assert code == 2 and "same names, other contents" in err
    elsewhere = make_run(tmp_path / "e", {"a": SMALL}, metrics=["nmi"], datasets=["folder:x"], images=9)
    code, _, err = cli("compare", one.path, rewrite(elsewhere, images="dd").path)
    assert code == 2 and "share only file names" in err
    fewer = make_run(tmp_path / "f", {"a": SMALL}, metrics=["nmi"], images=9, fingerprint="cc")
    code, out, _ = cli("compare", one.path, fewer.path)
    assert code == 0 and "9 images in common (A has 20, B has 9)" in out and "taken to be the" in out


def test_compare_what_isnt_there(cli, mixed, tmp_path):
    code, _, err = cli("compare", mixed.path, "--metric", "nmi")
    assert code == 2 and "nothing can be compared: 'nmi' of 'moco:vit-b16' is failed" in err
    other = make_run(tmp_path / "o", {"x": SMALL, "y": SMALL}, metrics=["nmi"])
    code, _, err = cli("compare", mixed.path, other.path)
    assert code == 2 and "no model in common" in err


# --- verify


def test_verify_a_whole_run(cli, mixed):
    code, out, _ = cli("verify", mixed.path)
    assert code == 0
    assert out.startswith("whole: 5 shards, 2 results, ") and "2 cells unfinished" in out
    found = json.loads(cli("verify", mixed.path, "--json")[1])
    assert found["damaged"] == [] and (found["shards"], found["results"]) == (5, 2)
    files = [p for p in mixed.path.rglob("*") if p.is_file()]
    assert found["shards"] + found["results"] + found["others"] == len(files)


def test_verify_finds_every_damaged_file(cli, tmp_path):
    run = make_run(tmp_path / "r", {"a": SMALL, "b": SMALL}, images=40)
    a, b = (run.folder(m, "folder:photos") for m in "ab")
    flipped = a.trace("nmi", 1) / "shard-00000.h5"
    data = bytearray(flipped.read_bytes())
    data[-100] ^= 1
    flipped.write_bytes(data)
    cut = b.result("fourier")
    cut.write_bytes(cut.read_bytes()[:200])
    gone = a.trace("fourier", 1) / "shard-00001.h5"
    gone.unlink()
    lost = a.result("attention_distance")
    lost.unlink()
    broken = b.trace("nmi", 1) / "rows.json"
    broken.write_text("{")
    foreign = b.trace("attention_distance", 1) / "shard-00002.h5"
    shutil.copy(a.trace("attention_distance", 1) / "shard-00002.h5", foreign)
    code, out, _ = cli("verify", run.path, "--json")
    found = {f["file"]: f for f in json.loads(out)["damaged"]}
    assert code == 4
    assert set(found) == {str(p.relative_to(run.path)) for p in (flipped, cut, gone, lost, broken, foreign)}
    assert "checksum" in found[str(flipped.relative_to(run.path))]["problem"]
    assert "another 'cell'" in found[str(foreign.relative_to(run.path))]["problem"]
    assert "delete it" in found[str(cut.relative_to(run.path))]["remedy"]
    code, out, _ = cli("verify", run.path)
    assert code == 4 and out.count("what to do: ") == 6
    assert "damaged or missing: 6 files" in out


def test_a_newer_file_is_not_called_damaged(cli, tmp_path):
    run = make_run(tmp_path / "r", {"a": SMALL}, metrics=["nmi"])
    cell = run.folder("a", "folder:photos").path / "cell.json"
    cell.write_text(cell.read_text().replace('"format_version": 1', '"format_version": 99'))
    code, _, err = cli("verify", run.path)
    assert code == 4 and "newer probekit" in err


# --- all of them


@pytest.mark.parametrize("command", READERS)
def test_bad_folders(cli, tmp_path, command):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    for folder, said in (("absent", "does not exist"), ("empty", "no run folder"), ("broken", "is damaged")):
        code, out, err = cli(command, tmp_path / folder)
        assert (code, out) == (4, "")
        assert err.startswith("error: ") and said in err and "Traceback" not in err


@pytest.mark.parametrize("command", READERS)
def test_help_has_an_example(cli, command):
    code, out, _ = cli(command, "--help")
    assert code == 0 and f"probekit {command} runs/" in out and "--json" in out


def test_hostile_names_cant_steer_the_terminal(cli, tmp_path):
    models = {HOSTILE: SMALL, f"{HOSTILE}@random": SMALL}
    outcomes = {(HOSTILE, "fourier"): Outcome("failed", HOSTILE, HOSTILE, "", HOSTILE, "1")}
    run = make_run(tmp_path / "r", models, datasets=[f"folder:\udcff{HOSTILE}"], outcomes=outcomes)
    words = [("status",), ("show",), ("show", "nmi"), ("compare",), ("verify",), ("report",)]
    for command, *rest in words:
        _, out, err = cli(command, run.path, *rest)
        assert out and not {"\x1b", "\u202e", "\udcff"} & set(out + err), command
        if command != "report":
            _, out, _ = cli(command, run.path, *rest, "--json")
            json.loads(out)
    assert "🦊" in cli("status", run.path)[1]


def test_no_torch(tmp_path):
    run = make_run(tmp_path / "r", {"a": SMALL, "b": SMALL}, metrics=["nmi"])
    code = (
        "import sys\nfrom probekit.cli.app import main\n"
        "for words in ('status', 'show', 'show nmi', 'compare', 'verify', 'report', 'report -f csv'):\n"
        "    words = words.split()\n"
        "    assert main([words[0], sys.argv[1], *words[1:]]) == 0, words\n"
        "    assert 'torch' not in sys.modules, words\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PROBEKIT_PLUGINS": "none"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(run.path)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_registering_loads_nothing_heavy():
    code = (
        "import sys, typer\nfrom probekit.cli import reading\nreading.register(typer.Typer())\n"
        "print(sorted({'torch', 'numpy', 'xarray', 'h5py', 'matplotlib', 'jinja2'} & set(sys.modules)))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
