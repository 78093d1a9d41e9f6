"""The catalog over real installed distributions: dist-info folders and modules written to disk."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import probekit.plugins.builtins
from probekit.errors import PluginError, UsageError
from probekit.plugins import builtins, loading
from probekit.plugins.catalog import Catalog
from probekit.plugins.loading import KINDS, Problem
from probekit.plugins.lookup_errors import OFFICIAL

HEAD = """
from probekit.hookspecs import hookimpl
from probekit.specs import *
from probekit.specs import CommandSpec, DatasetSpec, FindingSpec, MetricSpec, ModelSpec, Option, ReportSpec
PROBEKIT_API = 1
"""

BUILT_IN = [spec.name for spec in builtins.probekit_metrics()]
ON_REQUEST = {spec.name for spec in builtins.probekit_metrics() if spec.on_request}


def metric(name: str, target: str = "json:dumps", **more: object) -> str:
    extra = "".join(f", {key}={value!r}" for key, value in more.items())
    return f"MetricSpec(name={name!r}, summary='s', target={target!r}{extra})"


def metrics_hook(*specs: str) -> str:
    return f"@hookimpl\ndef probekit_metrics():\n    return [{', '.join(specs)}]\n"


def models_hook(*specs: str) -> str:
    texts = [f"ModelSpec(summary='s', target='json:dumps', {spec})" for spec in specs]
    return f"@hookimpl\ndef probekit_models():\n    return [{', '.join(texts)}]\n"


@pytest.fixture
def site(tmp_path, monkeypatch):
    """`site(name, body)` installs a plugin for the length of a test."""
    root = tmp_path / "site"
    root.mkdir()
    monkeypatch.syspath_prepend(str(root))
    monkeypatch.delenv("PROBEKIT_PLUGINS", raising=False)
    installed = loading.metadata.distributions  # packs of this environment would be offered too
    monkeypatch.setattr(
        loading.metadata,
        "distributions",
        lambda: [d for d in installed() if str(d.locate_file("")).startswith(str(tmp_path))],
    )
    before = set(sys.modules)

    def install(
        name: str, body: str, *, version="1.2", head=HEAD, entry=None, distribution=None, module=None
    ):
        module = module or f"{name}_plugin_module"
        (root / f"{module}.py").write_text(head + textwrap.dedent(body))
        distribution = distribution or f"dist-{name}"
        info = root / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        info.joinpath("METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        )
        info.joinpath("entry_points.txt").write_text(f"[probekit]\n{name} = {entry or module}\n")
        importlib.invalidate_caches()
        return root

    install.root = root
    yield install
    for name in set(sys.modules) - before:
        if str(root) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def problems_of(catalog: Catalog, name: str) -> list[Problem]:
    catalog._load_others()
    return [problem for problem in catalog.problems if problem.plugin == name]


# --- built-ins


def test_built_ins_load_without_a_problem():
    catalog = Catalog.load(enabled=False)
    assert catalog.problems == []
    assert [e.name for e in catalog.metrics] == BUILT_IN
    assert {e.name for e in catalog.models} == {"timm", "hf"}
    assert "folder" in [e.name for e in catalog.datasets]
    assert [e.name for e in catalog.reports][:2] == ["html", "csv"]
    assert {e.pack for kind in KINDS for e in catalog.entries(kind)} == {"probekit"}
    assert {"Fig. 2", "Fig. 3", "Fig. 4", "Fig. 9", "Fig. 11"} <= {e.spec.figure for e in catalog.metrics}
    assert all(
        hasattr(getattr(probekit.plugins.builtins, f"probekit_{k}"), "probekit_impl")
        for k in ("models", "metrics")
    )


def test_a_built_in_name_imports_no_plugin(site):
    site("loud", "raise RuntimeError('imported')")
    catalog = Catalog.load()
    (
        catalog.metric("nmi"),
        catalog.dataset("folder:/x"),
        catalog.report("html"),
        catalog.model("timm:vit@random"),
    )
    assert [e.name for e in catalog.select("metrics", ["nmi", "fourier"])] == ["nmi", "fourier"]
    assert catalog.problems == [] and "loud_plugin_module" not in sys.modules
    catalog.select("metrics", ["all"])
    assert [p.plugin for p in catalog.problems] == ["loud"]


# --- containment


@pytest.mark.parametrize(
    ("body", "stage", "says"),
    [
        ("class Mute(Exception):\n    def __str__(self): return 1 / 0\nraise Mute", "import", "Mute: <Mute>"),
        ("import no_such_module_xyz", "import", "no_such_module_xyz"),
        ("1 / 0", "import", "ZeroDivisionError: division by zero (bad_plugin_module.py, line 6)"),
        ("def broken(:", "import", "SyntaxError"),
        ("raise SystemExit(3)", "import", "SystemExit: 3"),
        ("class Odd(BaseException): pass\nraise Odd('x')", "import", "Odd: x"),
        ("del PROBEKIT_API", "api", "does not state PROBEKIT_API"),
        ("PROBEKIT_API = 99", "api", "written for API 99, and this probekit offers 1"),
        ("PROBEKIT_API = 'one'", "api", "not a version number"),
        ("PROBEKIT_API = True", "api", "not a version number"),
        ("PROBEKIT_API = 0", "api", "not a version number"),
        ("@hookimpl\ndef probekit_metric(): return []", "hook", "did you mean 'probekit_metrics'?"),
        ("@hookimpl\ndef probekit_zzz(): return []", "hook", "the hooks are probekit_models"),
        ("def probekit_metrics(): return []", "hook", "not marked with `@hookimpl`"),
        ("def probekit_metric(): return []", "hook", "not marked with `@hookimpl`"),
        ("@hookimpl\ndef probekit_metrics(config): return []", "hook", "'config'"),
        ("@hookimpl\ndef probekit_metrics(): return 1 / 0", "call", "ZeroDivisionError"),
        ("@hookimpl\ndef probekit_metrics(): raise SystemExit", "call", "SystemExit"),
        ("@hookimpl\ndef probekit_metrics(): pass", "call", "returned None"),
        (
            f"@hookimpl\ndef probekit_metrics(): return {metric('x')}",
            "call",
            "TypeError: it returned one spec; it must return a list",
        ),
        ("@hookimpl\ndef probekit_metrics(): return 3", "call", "not iterable"),
        ("@hookimpl\ndef probekit_metrics():\n    yield 1 / 0", "call", "ZeroDivisionError"),
        ("@hookimpl\ndef probekit_metrics(): return 'nmi'", "specs", "is no MetricSpec"),
        (
            "@hookimpl\ndef probekit_metrics(): return [ReportSpec(name='r', summary='s', target='a:b')]",
            "specs",
            "is no MetricSpec",
        ),
        (metrics_hook(metric("bad name")), "call", "MetricSpec.name"),
        (metrics_hook(metric("x", target="no-colon")), "call", "MetricSpec.target"),
        (metrics_hook(metric("x", nonsense=1)), "call", "MetricSpec.nonsense"),
        (metrics_hook(metric("x"), metric("x")), "specs", "metric 'x' is offered 2 times"),
        (models_hook("name='x', variant='a'", "name='x', variant='a'"), "specs", "'x:a' is offered 2 times"),
        (models_hook("name='x', variant='a:b'"), "specs", "can't be typed"),
        (metrics_hook(metric("all")), "specs", "can't be typed"),
    ],
)
def test_a_broken_plugin_is_a_problem_and_the_rest_go_on(site, body, stage, says):
    site("bad", body)
    site("good", metrics_hook(metric("entropy")))
    seen = []
    catalog = Catalog.load(on_problem=seen.append)
    assert [e.name for e in catalog.metrics] == [*BUILT_IN, "entropy"]
    (problem,) = problems_of(catalog, "bad")
    assert seen == [problem] == catalog.problems
    assert (problem.stage, problem.version) == (stage, "1.2")
    assert says in problem.message and "\n" not in str(problem)
    assert str(problem).startswith("plugin 'bad' 1.2: ")
    with pytest.raises(UsageError) as caught:
        catalog.metric("zzzzz")
    assert "'bad'" in caught.value.hint  # it may have offered the name
    with pytest.raises(PluginError) as caught:
        catalog.metric("bad/zzzzz")
    assert stage in caught.value.message and caught.value.exit_code == 3


def test_one_bad_hook_costs_only_its_own_names(site):
    bad = (
        "@hookimpl\ndef probekit_models(config): return []\n@hookimpl\ndef probekit_reports(): return 1 / 0\n"
    )
    mixed = f"@hookimpl\ndef probekit_metrics():\n    return [{metric('entropy')}, None]\n"
    site("half", bad + mixed)
    catalog = Catalog.load()
    assert catalog.metric("entropy").pack == "half"
    assert [p.stage for p in catalog.problems] == ["specs", "hook", "call"]


def test_keyboard_interrupt_is_the_users(site):
    site("slow", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        _ = Catalog.load().metrics


def test_a_plugin_that_prints_keeps_stdout_clean(site, capsys):
    site("chatty", "print('hello')\n@hookimpl\ndef probekit_metrics():\n    print('hook')\n    return []\n")
    catalog = Catalog.load()
    _ = catalog.metrics
    out, err = capsys.readouterr()
    assert out == "" and "hello" in err and "hook" in err


def test_unreadable_metadata_is_a_problem(site):
    site("good", metrics_hook(metric("entropy")))
    info = site.root / "torn-1.0.dist-info"
    info.mkdir()
    info.joinpath("entry_points.txt").write_bytes(b"[probekit]\nthis is no entry\n\xff\xfe")
    catalog = Catalog.load()
    assert catalog.metric("entropy").pack == "good"
    assert [p.stage for p in catalog.problems] == ["find"]
    assert "torn-1.0.dist-info" in str(catalog.problems[0])


def test_a_plugin_may_be_an_object(site):
    body = f"""
    class Plugin:
        PROBEKIT_API = 1
        @hookimpl
        def probekit_metrics(self):
            return [{metric("entropy")}]
    plugin = Plugin()
    """
    site("thing", body, entry="thing_plugin_module:plugin")
    catalog = Catalog.load()
    assert catalog.metric("entropy").pack == "thing" and catalog.problems == []


def test_an_optional_hook_of_a_newer_probekit_is_left_alone(site):
    site("new", "@hookimpl(optionalhook=True)\ndef probekit_teapots(): return 1 / 0\n")
    catalog = Catalog.load()
    assert problems_of(catalog, "new") == []


def test_two_distributions_with_one_plugin_name(site):
    site("same", metrics_hook(metric("a")), distribution="one", module="one_mod")
    site("same", metrics_hook(metric("b")), distribution="two", module="two_mod")
    catalog = Catalog.load()
    assert len(catalog.metrics) == len(BUILT_IN)
    (problem,) = catalog.problems
    assert "'one 1.2'" in problem.message and "'two 1.2'" in problem.message
    assert "one_mod" not in sys.modules


def test_the_name_probekit_is_taken(site):
    site("probekit", metrics_hook(metric("nmi")), module="impostor")
    catalog = Catalog.load()
    assert len(catalog.metrics) == len(BUILT_IN) and catalog.metric("probekit/nmi").spec.target.startswith(
        "probekit."
    )
    assert "taken" in catalog.problems[0].message


# --- names claimed twice


def test_two_plugins_offer_one_name(site):
    site("aaa", metrics_hook(metric("entropy")))
    site("bbb", metrics_hook(metric("entropy")))
    catalog = Catalog.load()
    assert catalog.metric("aaa/entropy").pack == "aaa" and catalog.metric("bbb/entropy").pack == "bbb"
    with pytest.raises(UsageError) as caught:
        catalog.metric("entropy")
    assert "'aaa' and 'bbb'" in caught.value.message
    assert "'aaa/entropy'" in caught.value.hint and "'bbb/entropy'" in caught.value.hint
    assert catalog.names("metrics")[-2:] == ["aaa/entropy", "bbb/entropy"]
    assert [(e.pack, str(e.ref)) for e in catalog.select("metrics", ["*/entropy"])] == [
        ("aaa", "aaa/entropy"),
        ("bbb", "bbb/entropy"),
    ]
    (note,) = catalog.notes("metrics")
    assert "'aaa/entropy' or 'bbb/entropy'" in note
    assert catalog.problems == []


def test_a_built_in_keeps_its_bare_name(site):
    site("mine", metrics_hook(metric("nmi"), metric("entropy")))
    catalog = Catalog.load()
    assert catalog.metric("nmi").built_in
    assert catalog.metric("mine/nmi").pack == "mine"
    assert str(catalog.metric("mine/nmi").ref) == "mine/nmi"
    assert str(catalog.metric("mine/entropy").ref) == "entropy"  # the pack is not needed
    shared = [name for name in BUILT_IN if name not in ON_REQUEST]
    assert catalog.names("metrics") == [*shared, "mine/nmi", "entropy"]
    assert catalog.notes("metrics") == ["'nmi' is probekit's own; a plugin's is 'mine/nmi'"]


def test_models_are_ambiguous_by_variant(site):
    site("aaa", models_hook("name='vit', variant='s'", "name='vit', variant='b'"))
    site("bbb", models_hook("name='vit', variant='b'", "name='timm', variant='vit_x'"))
    catalog = Catalog.load()
    assert catalog.model("vit:s").pack == "aaa"
    for text in ("vit:b@random", "vit"):
        with pytest.raises(UsageError) as caught:
            catalog.model(text)
        assert f"'aaa/{text}' or 'bbb/{text}'" in caught.value.hint
    assert catalog.model("timm:vit_x").built_in
    assert catalog.model("bbb/timm:vit_x").pack == "bbb"
    assert "'timm:vit_x' is probekit's own; a plugin's is 'bbb/timm:vit_x'" in catalog.notes("models")
    assert catalog.names("models") == ["vit:s", "aaa/vit:b", "bbb/vit:b", "bbb/timm:vit_x"]


# --- models


@pytest.fixture
def moco(site):
    site(
        "moco",
        models_hook(
            "name='moco', default=True, published_as='vit-b16'",
            "name='moco', variant='vit-s16'",
            "name='moco', variant='vit-b16', options={'encoder': Option(default='base', "
            "choices=('base', 'momentum')), 'depth': Option(default=12), 'rate': Option(default=0.5), "
            "'fast': Option(default=False), 'tag': Option()}",
            "name='plain', variant='only'",
            "name='free', any_variant=True",
            "name='free', variant='special'",
            "name='pair', variant='a'",
            "name='pair', variant='b'",
        ),
    )
    return Catalog.load()


def test_families_and_variants(moco):
    assert moco.model("moco").spec.published_as == "vit-b16"
    assert moco.model("moco:vit-s16@random").ref.weights == "random"
    assert str(moco.model("plain").ref) == "plain:only" and moco.model("plain").variant == "only"
    assert moco.model("free:anything/at.all").variant == "anything/at.all"
    assert moco.model("free:special").spec.variant == "special"
    assert moco.model("free:other").spec.any_variant
    assert "free" not in moco.names("models") and "free:special" in moco.names("models")


@pytest.mark.parametrize(
    ("text", "says", "hint"),
    [
        ("pair", "'pair' needs a variant", "'pair:a', 'pair:b'"),
        ("pair@random", "'pair' needs a variant", "'pair:a@random'"),
        ("free", "'free' needs a variant", "it has"),
        ("timm", "'timm' needs a variant", "'timm:NAME'"),
        ("moco:vit-b61", "no variant 'vit-b61'", "did you mean 'moco:vit-b16'"),
        ("moc", "unknown model 'moc'", "did you mean 'moco'?"),
        ("plain:onyl", "no variant 'onyl'", "'plain:only'"),
        ("nopack/moco", "no plugin 'nopack'", "`probekit list models`"),
        ("mocoo/moco", "no plugin 'mocoo'", "'moco'"),
        ("moco/mae", "plugin 'moco' offers no model 'mae'", "list models"),
        ("moco:vit-b16:encodr=base", "no option 'encodr'", "'encoder'"),
        ("moco:vit-s16:x=1", "no option 'x'", "no options"),
        ("moco:vit-b16:encoder=x", "can't be 'x'", "'base', 'momentum'"),
        ("moco:vit-b16:depth=1.5", "can't be '1.5'", "whole number"),
        ("moco:vit-b16:depth=", "can't be ''", "whole number"),
        ("moco:vit-b16:rate=fast", "can't be 'fast'", "a number"),
        ("moco:vit-b16:rate=nan", "can't be 'nan'", "a number"),
        ("moco:vit-b16:fast=2", "can't be '2'", "true or false"),
    ],
)
def test_model_errors(moco, text, says, hint):
    with pytest.raises(UsageError) as caught:
        moco.model(text)
    assert says in caught.value.message and "\n" not in caught.value.message
    if text != "free":
        assert hint in caught.value.hint


def test_options_have_the_defaults_type(moco):
    entry = moco.model("moco:vit-b16:encoder=momentum:depth=3:rate=2:fast=Yes:tag=x")
    assert entry.options == {"encoder": "momentum", "depth": 3, "rate": 2.0, "fast": True, "tag": "x"}
    assert type(entry.options["rate"]) is float and entry.options["fast"] is True
    plain = moco.model("moco:vit-b16")
    assert plain.options == {"encoder": "base", "depth": 12, "rate": 0.5, "fast": False, "tag": None}
    spelt = moco.model("moco:vit-b16:encoder=base:depth=12:fast=false")
    assert spelt.ref == plain.ref and spelt.options == plain.options
    assert moco.model("moco:vit-b16:rate=0.50:fast=ON").ref == moco.model("moco:vit-b16:fast=true").ref


def test_selecting_models(moco):
    chosen = moco.select("models", ["moco:vit-*@random", "moco:vit-b16@random,timm:x"])
    assert [str(e.ref) for e in chosen] == ["moco:vit-s16@random", "moco:vit-b16@random", "timm:x"]
    assert [e.name for e in moco.select("models", ["all,!moco*"])] == [
        "plain:only",
        "free:special",
        "pair:a",
        "pair:b",
    ]
    assert moco.select("models", []) == []
    with pytest.raises(UsageError, match="no model is named"):
        moco.select("models", [","])


def test_official_packs_are_named_when_missing(monkeypatch):
    monkeypatch.setenv("PROBEKIT_PLUGINS", "none-of-them")
    catalog = Catalog.load()
    for text in [*OFFICIAL, "simmim:vit-b16@random", "simmim/simmim:vit-b16"]:
        with pytest.raises(UsageError) as caught:
            catalog.model(text)
        name = text.partition(":")[0].partition("/")[0]
        assert f"`pip install vit-probekit-{name}`" in caught.value.hint
    with pytest.raises(UsageError) as caught:
        catalog.model("simim")
    assert "did you mean 'simmim' or 'timm'? `pip install vit-probekit-simmim`" in caught.value.hint


def test_a_broken_pack_answers_for_its_model(site):
    site("moco", "1 / 0")
    with pytest.raises(PluginError) as caught:
        Catalog.load().model("moco:vit-b16")
    assert "ZeroDivisionError" in caught.value.message and "plugins check moco" in caught.value.hint


def test_a_function_of_ones_own(site, tmp_path):
    site.root.joinpath("mypkg").mkdir()
    site.root.joinpath("mypkg/__init__.py").write_text("")
    site.root.joinpath("mypkg/nets.py").write_text("def build(variant, **options): return variant, options\n")
    importlib.invalidate_caches()
    catalog = Catalog.load()
    entry = catalog.model("mypkg.nets:build:depth=3:flag=true:rate=.5:name=x@random")
    assert entry.options == {"depth": 3, "flag": True, "rate": 0.5, "name": "x"}
    assert catalog.resolve_target(entry)("v") == ("v", {})
    with pytest.raises(UsageError, match="unknown model"):
        catalog.model("nosuchpkg.nets:build")
    with pytest.raises(PluginError, match="nothing"):
        catalog.resolve_target(catalog.model("mypkg.nets:nothing"))

    file = tmp_path / "my net.py"
    file.write_text("def build(variant): return 'built'\n")
    entry = catalog.model(f"{file}:build")
    assert catalog.resolve_target(entry)("") == "built"
    assert not file.parent.joinpath("__pycache__").exists()
    file.write_text("def build(variant): return 'again'\n")
    again = Catalog.load()
    assert again.resolve_target(again.model(f"{file}:build"))("") == "again"
    with pytest.raises(UsageError, match="does not exist"):
        catalog.model("./no_such_file.py:build")
    file.write_text("1 / 0")
    broken = Catalog.load()
    with pytest.raises(PluginError, match="can't be imported: ZeroDivisionError"):
        broken.resolve_target(broken.model(f"{file}:build"))


# --- metrics, datasets, reports


def test_metric_options():
    catalog = Catalog.load(enabled=False)
    entry = catalog.metric("attention_distance:compat=cl-vs-mim:renormalise=no")
    assert entry.options == {"compat": "cl-vs-mim", "renormalise": False}
    assert str(catalog.metric("nmi:compat=").ref) == "nmi"
    assert len(catalog.select("metrics", ["nmi", "nmi:compat=", "nmi:compat=cl-vs-mim"])) == 2
    with pytest.raises(UsageError, match="can't be 'official'"):
        catalog.metric("nmi:compat=official")
    with pytest.raises(UsageError, match="unknown metric 'nmj'") as caught:
        catalog.metric("nmj")
    assert "did you mean 'nmi'?" in caught.value.hint and "--no-plugins" in caught.value.hint


def test_datasets_and_reports(site, tmp_path, monkeypatch):
    site(
        "shapes",
        "@hookimpl\ndef probekit_datasets(): return [DatasetSpec(name='st', summary='s', target='a:b')]",
    )
    catalog = Catalog.load()
    assert catalog.dataset("folder:/a:b").ref.argument == "/a:b"
    assert catalog.dataset("st").pack == "shapes"
    assert catalog.names("datasets") == ["st"]
    with pytest.raises(UsageError, match="needs PATH") as caught:
        catalog.dataset("folder")
    assert "'folder:PATH'" in caught.value.hint
    with pytest.raises(UsageError, match="takes nothing after its name"):
        catalog.dataset("st:x")
    monkeypatch.chdir(tmp_path)
    Path("val").mkdir()
    with pytest.raises(UsageError, match="unknown dataset 'val'") as caught:
        catalog.dataset("val")
    assert "'folder:val'" in caught.value.hint
    assert catalog.report("html").spec.suffix == ".html"
    for name in ("htm", "html:x", "", "a/b/c"):
        with pytest.raises(UsageError):
            catalog.report(name)
    with pytest.raises(UsageError, match="unknown finding 'x'"):
        catalog.finding("x")


# --- targets


def test_targets_are_contained(site):
    site(
        "bad",
        metrics_hook(
            metric("absent", "no_such_package_xyz.m:X"),
            metric("needs", "needs_more:X"),
            metric("noattr", "json:nothing"),
            metric("exits", "exits_on_import:X"),
            metric("fine", "json:JSONDecoder.decode"),
        ),
    )
    site.root.joinpath("needs_more.py").write_text("import no_such_dependency_xyz\n")
    site.root.joinpath("exits_on_import.py").write_text("raise SystemExit(1)\n")
    importlib.invalidate_caches()
    catalog = Catalog.load()
    assert catalog.problems == []  # nothing is imported to list or look up
    for name, says in {
        "absent": "there is no module 'no_such_package_xyz'",
        "needs": "it needs 'no_such_dependency_xyz', which is not installed",
        "noattr": "'json' has no attribute 'nothing'",
        "exits": "SystemExit: 1",
    }.items():
        entry = catalog.metric(name)
        for target in (entry, entry.spec.target):
            with pytest.raises(PluginError) as caught:
                catalog.resolve_target(target)
            assert says in caught.value.message and f"'{entry.spec.target}'" in caught.value.message
            assert "plugin 'bad' 1.2" in caught.value.message
    import json

    assert catalog.resolve_target("json:JSONDecoder.decode") is json.JSONDecoder.decode
    assert catalog.resolve_target(catalog.metric("fine")) is json.JSONDecoder.decode
    with pytest.raises(PluginError, match="the target can't provide 'json:zzz'"):
        catalog.resolve_target("json:zzz")


# --- files, switches


def test_plugin_file_with_hooks(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        HEAD + metrics_hook(metric("mine_a", "mine:A"), metric("mine_b", "json:dumps")) + "class A: pass\n"
    )
    catalog = Catalog.load([file], enabled=False)
    entry = catalog.metric("mine_a")
    assert entry.pack == "mine" and catalog.resolve_target(entry).__name__ == "A"
    assert not (tmp_path / "__pycache__").exists()


def test_plugin_file_with_metric_classes_only(tmp_path):
    file = tmp_path / "my-metrics.py"
    file.write_text(
        "from probekit.metric import Metric\n"
        "class _Shared(Metric): pass\n"
        "class Entropy(_Shared):\n"
        "    '''How flat the rows are.\n\n    More.'''\n"
        "    name = 'entropy'\n"
        "    def __init__(self, base=2, log='e', odd=(), **more): super().__init__(base=base)\n"
        "class Bad(Metric):\n    name = 'not a name'\n"
    )
    catalog = Catalog.load([file], enabled=False)
    entry = catalog.metric("entropy:base=3")
    assert entry.spec.summary == "How flat the rows are." and entry.options == {"base": 3, "log": "e"}
    cls = catalog.resolve_target(entry)
    assert cls.__name__ == "Entropy" and cls(**entry.options).options == {"base": 3}
    (problem,) = catalog.problems
    assert (problem.plugin, problem.stage) == ("my-metrics", "specs") and "'Bad'" in problem.message


def test_plugin_files_that_are_no_good(tmp_path):
    (tmp_path / "empty.py").write_text("x = 1\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "noapi.py").write_text(HEAD.replace("PROBEKIT_API = 1", "") + metrics_hook())
    catalog = Catalog.load([tmp_path / f"{name}.py" for name in ("empty", "broken", "noapi")], enabled=False)
    assert [(p.plugin, p.stage) for p in catalog.problems] == [
        ("empty", "hook"),
        ("broken", "import"),
        ("noapi", "api"),
    ]
    (tmp_path / "probekit.py").write_text("")
    (tmp_path / "text.txt").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "empty.py").write_text("")
    for bad in (["absent.py"], ["text.txt"], ["."], ["probekit.py"], ["empty.py", "other/empty.py"]):
        with pytest.raises(UsageError):
            Catalog.load([tmp_path / name for name in bad])


def test_a_file_takes_an_installed_plugins_place(site, tmp_path):
    site("mine", metrics_hook(metric("old")))
    file = tmp_path / "mine.py"
    file.write_text(HEAD + metrics_hook(metric("new")))
    catalog = Catalog.load([file])
    assert [e.name for e in catalog.metrics][len(BUILT_IN) :] == ["new"]
    assert "takes its place" in catalog.problems[0].message


def test_switches(site, monkeypatch, capsys):
    site("aaa", metrics_hook(metric("a")))
    site("bbb", metrics_hook(metric("b")))
    assert len(Catalog.load(enabled=False).metrics) == len(BUILT_IN)
    monkeypatch.setenv("PROBEKIT_PLUGINS", "bbb, ccc")
    monkeypatch.setenv("PROBEKIT_TRACE", "1")
    catalog = Catalog.load()
    assert [e.name for e in catalog.metrics][len(BUILT_IN) :] == ["b"]
    assert "aaa_plugin_module" not in sys.modules
    assert [str(p) for p in catalog.problems] == [
        "plugin 'ccc': find: named by PROBEKIT_PLUGINS, but not installed"
    ]
    err = capsys.readouterr().err
    assert " ms  import bbb\n" in err and " ms  bbb.probekit_metrics\n" in err
    with pytest.raises(UsageError) as caught:
        catalog.metric("a")
    assert "PROBEKIT_PLUGINS" in caught.value.hint


def test_listing_a_thousand_names_is_light(site):
    for number in range(30):
        names = [metric(f"m{number}-{i}", "torch:nn") for i in range(34)]
        site(f"p{number}", metrics_hook(*names))
    code = (
        f"import sys; BUILT_IN = {len(BUILT_IN)}\n"
        "from probekit.plugins.catalog import Catalog\n"
        "catalog = Catalog.load(); assert len(catalog.labelled('metrics')) == 1020 + BUILT_IN, catalog.problems\n"
        "assert not catalog.problems and not catalog.notes('metrics')\n"
        "print([m for m in ('torch', 'numpy', 'xarray', 'h5py', 'rich') if m in sys.modules])\n"
    )
    root = Path(probekit.plugins.builtins.__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": f"{site.root}{os.pathsep}{root}"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
