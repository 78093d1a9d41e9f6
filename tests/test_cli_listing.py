"""`probekit list` and `probekit plugins`, through Typer."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import typer
from typer.testing import CliRunner

import probekit.specs
from probekit.cli import listing, state
from probekit.errors import PluginError, UsageError
from probekit.plugins import builtins

ROOT = Path(probekit.specs.__file__).parents[1]

app = typer.Typer()
listing.register(app)
runner = CliRunner()

GOOD = """
from probekit.hookspecs import hookimpl
from probekit.specs import MetricSpec, ModelSpec, Option
PROBEKIT_API = 1
@hookimpl
def probekit_metrics():
    return [
        MetricSpec(name="entropy", summary="[bold]flat[/bold] \\x1b[31mrows", target="good:Entropy",
                   options={"log": Option(default="e")}),
        MetricSpec(name="nmi", summary="another", target="good:Entropy"),
    ]
@hookimpl
def probekit_models():
    return [ModelSpec(name="net", default=True, published_as="b", summary="small", target="good:build"),
            ModelSpec(name="net", variant="b", objective="MIM", summary="large " * 30, target="good:build")]
"""
METRIC = """
from probekit.metric import Metric
class Entropy(Metric):
    name = "entropy"
    needs = {"attention"}
    dims = {"entropy": ("head",)}
    def __init__(self, log="e"): super().__init__(log=log)
    def measure(self, layer): return {}
def build(variant, **options): return variant
"""


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("PROBEKIT_PLUGINS", "none")  # whatever packs this environment has
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    state.configure(no_plugins=True)
    yield
    state.configure()


@pytest.fixture
def good(tmp_path):
    file = tmp_path / "good.py"
    file.write_text(GOOD + METRIC)
    state.configure(plugins=[str(file)], no_plugins=True)
    return file


def run(*arguments: str, **more):
    """The output; errors that the command line would print are raised."""
    result = runner.invoke(app, list(arguments), **more)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


# --- list


def test_list_shows_the_built_ins():
    out = run("list")
    for text in (
        "models (2)",
        f"metrics ({len(builtins.probekit_metrics())})",
        f"datasets ({len(builtins.probekit_datasets())})",
        "reports (4)",
        "folder:PATH",
        "timm:NAME",
        "Fig. 3",
    ):
        assert text in out
    assert "commands (" not in out and "note:" not in out
    assert all(len(line) <= 80 for line in out.splitlines())


def test_list_reads_well_at_80_columns(good):
    out = run("list", "models")
    assert all(len(line.rstrip()) <= 80 for line in out.splitlines())
    assert "the published model is net:b" in out and re.search(r"net:b +MIM +good +large", out)
    out = run("list", "metrics")
    assert "[bold]flat[/bold] ?[31mrows" in out  # neither markup nor a terminal's escape
    assert "options: log" in out and "good/nmi" in out
    assert "note: 'nmi' is probekit's own; a plugin's is 'good/nmi'" in out


def test_list_json(good):
    listed = json.loads(run("list", "--json"))
    assert {"models", "metrics", "datasets", "reports", "findings", "commands", "notes", "problems"} == set(
        listed
    )
    metrics = {entry["name"]: entry for entry in listed["metrics"]}
    built_in = [spec.name for spec in builtins.probekit_metrics()]
    assert list(metrics) == [*built_in, "entropy", "good/nmi"]
    assert metrics["nmi"]["built_in"] and metrics["good/nmi"]["qualified"] == "good/nmi"
    assert metrics["fourier"]["options"]["dc"]["choices"] == ["include", "exclude"]
    assert listed["models"][-1]["objective"] == "MIM"
    only = json.loads(run("list", "findings", "--json"))
    assert only == {"findings": listed["findings"], "notes": listed["notes"][:0], "problems": []}


def test_list_of_nothing_and_of_nonsense():
    assert "no commands yet" in run("list", "commands")
    with pytest.raises(UsageError, match="'metric' can't be listed") as caught:
        run("list", "metric")
    assert "'metrics'" in caught.value.hint


def test_problems_go_to_stderr_and_json_stays_clean(tmp_path):
    (tmp_path / "bad.py").write_text("print('noise')\n1 / 0\n")
    state.configure(plugins=["bad.py"], no_plugins=True)
    result = runner.invoke(app, ["list", "metrics", "--json"])
    assert json.loads(result.stdout)["problems"][0]["stage"] == "import"
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 1 and "plugin 'bad': import: ZeroDivisionError" in warnings[0]
    assert "Traceback" not in result.stderr
    assert "note: something is wrong with bad" in run("list", "metrics")
    state.configure(plugins=["bad.py"], no_plugins=True, debug=True)
    assert "Traceback" in runner.invoke(app, ["list"]).stderr and state.debug()


def test_the_catalog_is_built_once(good):
    assert state.catalog() is state.catalog()
    before = state.catalog()
    state.configure(plugins=[str(good)])
    assert state.catalog() is not before


# --- plugins


def test_plugins_lists_offers_and_problems(good, tmp_path):
    (tmp_path / "bad.py").write_text(
        "PROBEKIT_API = 99\nfrom probekit.hookspecs import hookimpl\n@hookimpl\n"
        "def probekit_metrics(): return []\n"
    )
    state.configure(plugins=[str(good), "bad.py"], no_plugins=True)
    result = runner.invoke(app, ["plugins"])
    assert re.search(r"good +1 +2 models, 2 metrics", result.stdout), result.stdout
    assert "problem: plugin 'bad': api: it is written for API 99" in result.stdout
    assert "warning" not in result.stderr  # said once
    assert "--no-plugins" in result.stdout
    found = json.loads(run("plugins", "--json"))
    assert [p["name"] for p in found["plugins"]] == ["probekit", "good", "bad"]
    assert found["plugins"][1]["offers"]["models"] == ["net", "net:b"]
    assert found["problems"][0]["plugin"] == "bad" == found["plugins"][2]["name"]


def test_check_passes_and_runs_the_metric(good, monkeypatch):
    kit = ModuleType("probekit.testing")
    ran = []
    kit.check_metric = lambda metric, catalog: ran.append(metric)
    monkeypatch.setitem(sys.modules, "probekit.testing", kit)
    good.write_text(GOOD.replace('name="nmi"', 'name="entropy2"') + METRIC)
    with pytest.raises(PluginError, match="plugin 'good' fails 1 of 5 checks"):
        run("plugins", "check", str(good))
    result = runner.invoke(app, ["plugins", "check", str(good), "--json"])
    checks = json.loads(result.stdout)["checks"]
    assert [c["level"] for c in checks] == ["ok", "ok", "ok", "ok", "fail"]
    assert "the class calls itself 'entropy', its spec 'entropy2'" in checks[-1]["detail"]
    assert {cls.__name__ for cls in ran} == {"Entropy"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (('needs = {"attention"}', "needs = 'attention'"), "needs is not a set"),
        (('needs = {"attention"}', "needs = set()"), "needs is empty"),
        (('("head",)', '"head"'), "not a tuple"),
        (("    dims = ", "    dim = "), "dims is not a dict"),
        (("    name =", "    version = 0\n    name ="), "version is 0"),
        (("    name =", "    units = {'x': 'nat'}\n    name ="), "'x'"),
        (("    def measure", "    def mesure"), "no `measure`"),
        (("(Metric)", ""), "not a subclass"),
        (('log="e"): super', "): super"), "can't be made from its options"),
        (("class Entropy", "class Other"), "can't provide"),
        (("return {}", "raise KeyError(1)"), "it raised KeyError: 1 (good.py, line 23)"),
        (("return {}", "return {}\n    def __init__(self, **o): raise SystemExit"), "SystemExit"),
        (("def build", "def bild"), "can't provide"),
        (("def build(variant, **options): return variant", "build = 3"), "which can't be called"),
        (("PROBEKIT_API = 1", ""), "does not state PROBEKIT_API"),
    ],
)
def test_check_finds_what_is_wrong(tmp_path, change, says):
    text = GOOD + METRIC
    assert change[0] in text
    file = tmp_path / "good.py"
    file.write_text(text.replace(*change))
    result = runner.invoke(app, ["plugins", "check", str(file)])
    assert isinstance(result.exception, PluginError)
    assert any(line.startswith("fail") and says in line for line in result.stdout.splitlines()), result.stdout


def test_check_of_a_file_knows_the_metric_that_another_of_it_draws_on(tmp_path):
    (tmp_path / "pair.py").write_text(
        "import xarray as xr\n"
        "from probekit import Metric\n"
        "from probekit.summaries import layer_coordinates, result_attributes\n"
        "class Peak(Metric):\n"
        "    name, needs, dims = 'peak', {'attention'}, {'peak': ('head',)}\n"
        "    def measure(self, layer): return {'peak': layer.attention.amax(-1).mean(-1)}\n"
        "class Drawn(Metric):\n"
        "    name, source = 'drawn', 'peak'\n"
        "    def summarize(self, traces):\n"
        "        means = [float(traces['peak'][:, i].mean()) for i in range(len(traces.rows))]\n"
        "        about = layer_coordinates(traces.rows), result_attributes(self, traces)\n"
        "        return xr.Dataset({'drawn': ('layer', means)}, *about)\n"
    )
    said = run("plugins", "check", str(tmp_path / "pair.py"))
    assert "ok    metric drawn: measures and summarises" in said


def test_check_without_the_conformance_kit_says_so(good, monkeypatch):
    monkeypatch.setitem(sys.modules, "probekit.testing", None)
    good.write_text(
        GOOD.replace('name="nmi"', 'name="entropy"').replace(
            'MetricSpec(name="entropy", summary="another', '0 and MetricSpec(name="x", summary="y'
        )
    )
    text = "from probekit.metric import Metric\n" + METRIC
    good.write_text(text)
    assert "warn  metric entropy: not run" in run("plugins", "check", str(good))


def test_check_of_nothing():
    with pytest.raises(UsageError, match="no plugin 'zzz' is installed"):
        run("plugins", "check", "zzz")
    count = len(builtins.probekit_metrics())
    assert f"offers 2 models, {count} metrics" in runner.invoke(app, ["plugins", "check", "probekit"]).stdout


# --- new


def test_new_metric_is_a_package_that_works(tmp_path, monkeypatch):
    out = run("plugins", "new", "metric", "head-rank", "--dir", "code")
    root = tmp_path / "code" / "vit-probekit-head-rank"
    assert str(Path("code/vit-probekit-head-rank")) in out
    assert {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()} == {
        "pyproject.toml",
        "README.md",
        "tests/test_metric.py",
        "vit_probekit_head_rank/__init__.py",
        "vit_probekit_head_rank/plugin.py",
        "vit_probekit_head_rank/metric.py",
    }
    assert not any("$" in p.read_text() for p in root.rglob("*") if p.is_file())
    body = (root / "vit_probekit_head_rank/metric.py").read_text()
    assert sum(bool(line.strip()) for line in body[body.index("class ") :].splitlines()) <= 12

    # Installed for real, then found by its entry point, and its own test is run.
    site = tmp_path / "site"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
    ]
    done = subprocess.run(
        [*pip, "--target", str(site), str(root)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    import probekit

    if not hasattr(probekit, "Metric"):
        pytest.skip("the package's public names are not there yet")
    path = os.pathsep.join([str(site), str(ROOT)])
    env = {**os.environ, "PYTHONPATH": path, "PROBEKIT_PLUGINS": "head-rank", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "known",
        str(root / "tests"),
    ]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    code = (
        "import sys; from probekit.plugins.catalog import Catalog\n"
        "catalog = Catalog.load(); entry = catalog.metric('head_rank')\n"
        "assert not catalog.problems, catalog.problems\n"
        "assert 'torch' not in sys.modules\n"
        "print(entry.pack, entry.version, catalog.resolve_target(entry).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["head-rank", "0.1.0", "HeadRank"], done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("metric", "nmi"), "'nmi' is probekit's own"),
        (("metric", "attention-distance"), "probekit's own"),
        (("metric", "Entropy"), "can't be the name"),
        (("metric", "class"), "can't be the name"),
        (("metric", "../x"), "can't be the name"),
        (("metric", ""), "can't be the name"),
        (("modle", "x"), "no template for 'modle'"),
    ],
)
def test_new_refuses(arguments, says, tmp_path):
    with pytest.raises(UsageError, match=re.escape(says)):
        run("plugins", "new", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_new_leaves_what_is_there_alone(tmp_path):
    made = json.loads(run("plugins", "new", "metric", "entropy", "--json"))
    assert "pyproject.toml" in made["files"]
    (tmp_path / made["folder"] / "pyproject.toml").write_text("mine")
    with pytest.raises(UsageError, match="already there"):
        run("plugins", "new", "metric", "entropy")
    assert (tmp_path / made["folder"] / "pyproject.toml").read_text() == "mine"


# --- install, uninstall


@pytest.fixture
def pip(monkeypatch):
    calls = []

    def fake(command, **_):
        calls.append(command)
        return subprocess.CompletedProcess(command, int("fails" in str(command)))

    monkeypatch.setattr(listing.subprocess, "run", fake)
    return calls


def test_install_maps_short_names(pip):
    run("plugins", "install", "moco", "simmim==1.0", "vit-probekit-mae", "./here", "dist/x-1.0.whl")
    (command,) = pip
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert command[4:] == [
        "vit-probekit-moco",
        "vit-probekit-simmim==1.0",
        "vit-probekit-mae",
        "./here",
        "dist/x-1.0.whl",
    ]
    with pytest.raises(PluginError, match="status 1"):
        run("plugins", "install", "fails")
    with pytest.raises(UsageError, match="'-rfile' is no pack"):
        run("plugins", "install", "--", "-rfile")


def test_uninstall_asks_and_knows_broken_plugins(pip, tmp_path, monkeypatch):
    info = tmp_path / "strange-1.0.dist-info"
    info.mkdir()
    info.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: strange\nVersion: 1.0\n")
    info.joinpath("entry_points.txt").write_text("[probekit]\nodd = no_such_module_xyz\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("PROBEKIT_PLUGINS")
    importlib.invalidate_caches()
    assert runner.invoke(app, ["plugins", "uninstall", "odd"], input="n\n").exit_code != 0
    assert pip == []
    run("plugins", "uninstall", "odd", "moco", input="y\n")
    run("plugins", "uninstall", "moco", "--yes")
    assert [command[3:] for command in pip] == [
        ["uninstall", "--yes", "strange", "vit-probekit-moco"],
        ["uninstall", "--yes", "vit-probekit-moco"],
    ]


# --- start-up


def test_listing_needs_neither_torch_nor_numpy():
    code = (
        "import sys, typer\n"
        "from probekit.cli.listing import register\n"
        "app = typer.Typer(); register(app)\n"
        "early = [m for m in ('pydantic', 'pluggy') if m in sys.modules]\n"
        "try: app(['list'])\n"
        "except SystemExit as end: assert not end.code\n"
        "print(early, [m for m in ('torch', 'numpy', 'xarray', 'h5py') if m in sys.modules])\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "[] []", done.stdout + done.stderr


def test_every_command_has_help_with_an_example():
    for command in (
        ["list"],
        ["plugins"],
        *(["plugins", c] for c in ("new", "check", "install", "uninstall")),
    ):
        out = run(*command, "--help")
        assert f"probekit {' '.join(command)}" in out, out
