"""The documentation says what the code does: pages, headings, signatures, links, and code that runs."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer

from probekit import api, hookspecs, specs
from probekit.cli.app import app
from probekit.layer import Layer
from probekit.plugins import builtins
from probekit.plugins.loading import HOOKS
from probekit.watch.watcher import CAPTURES

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"(<!-- tested -->\n)?```(\w*)\n(.*?)```", re.DOTALL)


def text(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> Iterator[tuple[bool, str]]:
    """Fenced blocks, each with whether it is marked as tested."""
    for mark, kind, code in FENCE.findall(page.read_text(encoding="utf-8")):
        if kind == language:
            yield bool(mark), code


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def section(page: str, title: str) -> str:
    """The text under a heading, down to the next one of its level or a higher one."""
    marks = len(title) - len(title.lstrip("#"))
    lines = page.splitlines()
    start = lines.index(title)
    code = False
    for end in range(start + 1, len(lines)):
        code ^= lines[end].startswith("```")
        if not code and re.match(rf"#{{1,{marks}}} ", lines[end]):
            return "\n".join(lines[start:end])
    return "\n".join(lines[start:])


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    """Every built-in command with its full name. `registered`: without plugins' commands."""
    group = getattr(command, "commands", None)
    if path:
        yield " ".join(path), command
    for name, inner in (group or {}).items():
        yield from commands(inner, (*path, name))


COMMANDS = dict(commands(typer.main.get_command(app)))
METRICS = builtins.probekit_metrics()


# ------------------------------------------------------------------ metrics


@pytest.mark.parametrize("spec", METRICS, ids=lambda s: s.name)
def test_every_metric_has_a_page(spec):
    page = text(f"metrics/{spec.name}.md")
    assert page.startswith(f"# {spec.name}\n")
    formula = re.search(r"```text\n(.*?)```", section(page, "## Definition"), re.DOTALL)
    assert formula and "=" in formula[1]
    source = section(page, "## Source")
    assert "Park et al." in source if spec.figure else re.search(r"(19|20)\d\d", source)
    assert spec.figure is None or f"**{spec.figure}**" in source
    missing = section(page, "## What this does not show")
    assert missing.count("\n- ") >= 3
    assert f"metrics/{spec.name}.md" in text("index.md")
    assert f"docs/metrics/{spec.name}.md" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("spec", METRICS, ids=lambda s: s.name)
def test_metric_pages_name_options_values_and_baselines(spec):
    page = text(f"metrics/{spec.name}.md")
    options = section(page, "## Options") if spec.options else ""
    for name, option in spec.options.items():
        row = re.search(rf"^\| `{name}` \| (.*?) \| (.*) \|$", options, re.MULTILINE)
        assert row, f"option {name} has no row"
        default = str(option.default).lower() if isinstance(option.default, bool) else option.default
        assert row[1] == (f"`{default}`" if default else "empty")
        assert all(f"`{choice}`" in row[2] for choice in option.choices if choice != option.default)
    module, _, attribute = spec.target.partition(":")
    metric = getattr(importlib.import_module(module), attribute)()
    result = section(page, "## Result")
    for value, axes in metric.dims.items():
        assert re.search(rf"`{value}`.* \| {', '.join(('layer', *axes))} \|", result), value
        assert value == spec.name or metric.units[value] in result


# ------------------------------------------------------------------ plugins


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_its_signature(hook):
    function = getattr(hookspecs, hook)
    part = section(text("plugins.md"), f"### {hook}")
    signature = str(inspect.signature(function)).replace("'", "")
    assert f"```python\ndef {hook}{signature}\n```" in part
    kind = re.search(r"\[(\w+)\]", signature)[1]
    assert f"### {kind}" in text("plugins.md")


@pytest.mark.parametrize(
    "spec",
    [specs.ModelSpec, specs.MetricSpec, specs.DatasetSpec, specs.ReportSpec],
    ids=lambda s: s.__name__,
)
def test_every_field_of_a_spec_is_named(spec):
    page = text("plugins.md")
    shared = section(page, "## Specs").partition("###")[0]
    own = section(page, f"### {spec.__name__}")
    for field in spec.model_fields:
        assert f"`{field}`" in (shared if field in specs.Spec.model_fields else own), field


def test_every_field_a_metric_may_need_is_named():
    table = section(text("plugins.md"), "## Writing a metric")
    for field in CAPTURES:
        assert f"`{field}`" in table, field
        assert hasattr(Layer, field), field


def test_example_packs_in_the_page_work(tmp_path):
    """The metric pack and the model pack of the page, written to files, load without a problem."""
    from probekit.plugins.catalog import Catalog

    code = [block for _, block in blocks(DOCS / "plugins.md", "python") if block.startswith("# ")]
    assert len(code) == 4
    for block in code:
        path = tmp_path / re.match(r"# ([\w/]+\.py)", block)[1]
        path.parent.mkdir(exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(block, encoding="utf-8")
    plugins = [tmp_path / "vit_probekit_entropy" / "plugin.py", tmp_path / "probekit_mine" / "plugin.py"]
    renamed = [path.rename(path.with_name(f"{path.parent.name}_plugin.py")) for path in plugins]
    catalog = Catalog.load(renamed, enabled=False)
    assert catalog.problems == []
    spec = catalog.model("mine:encoder=teacher").spec
    assert [one.name for one in spec.weights.suiting({"encoder": "teacher"})] == [
        "pre-training checkpoint (teacher)"
    ]
    assert catalog.metric("entropy").spec.target == "vit_probekit_entropy.metric:Entropy"


# ------------------------------------------------------------------ command line


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_is_in_the_page(name):
    page = text("cli.md")
    title = f"### {name}" if " " in name else f"## {name}"
    part = section(page, title)
    assert f"`probekit {name}" in part
    for parameter in COMMANDS[name].params:
        for option in [o for o in parameter.opts if o.startswith("--")]:
            everywhere = section(page, "# Command line").partition("\n## ")[0]
            assert re.search(rf"{option}[`\] ]", part) or f"`{option}`" in everywhere, option


def test_the_page_has_no_command_or_option_that_is_not_there():
    page = text("cli.md")
    known = {option for command in COMMANDS.values() for p in command.params for option in p.opts}
    known |= {o for p in typer.main.get_command(app).params for o in p.opts}
    said = set(re.findall(r"`(--[a-z-]+)", page))
    assert said - known - {"--help"} == set()
    assert {name for name in re.findall(r"`probekit ([a-z]+)", page)} <= {n.split()[0] for n in COMMANDS}


def command_lines() -> list[tuple[str, str]]:
    """(page, line) of every ``probekit`` line in an unlabelled block, comments and continuations resolved."""
    found = []
    for page in PAGES:
        for _, code in blocks(page, ""):
            for line in code.replace("\\\n", " ").splitlines():
                line = line.partition("#")[0].removeprefix("$ ").strip()
                if line.startswith("probekit ") and "..." not in line:
                    found.append((page.name, line))
    return found


@pytest.mark.parametrize(("page", "line"), command_lines())
def test_command_lines_parse(page, line):
    """Known commands, known options, known names; nothing is run."""
    import shlex

    from probekit.plugins.catalog import Catalog

    words = shlex.split(line)[1:]
    name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
    assert name in COMMANDS, line
    options = {option: p for p in COMMANDS[name].params for option in p.opts}
    plugins = []
    catalog_words: list[tuple[str, str]] = []
    rest = iter(words[len(name.split()) :])
    for word in rest:
        if word == "--plugin":
            plugins.append(ROOT / next(rest))
        elif word.startswith("-"):
            assert word in options, f"{word} in {line}"
            value = None if getattr(options[word], "is_flag", False) else next(rest)
            kinds = {"--model": "models", "-m": "models", "--metrics": "metrics", "--dataset": "datasets"}
            if word in kinds and name == "run":
                catalog_words.append((kinds[word], value))
    catalog = Catalog.load(plugins)
    for kind, value in catalog_words:
        if not value.startswith("./"):
            assert catalog.select(kind, [value])


# ------------------------------------------------------------------ pages


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert ROOT in file.parents, target
        assert not anchor or anchor in anchors(file), target


def test_every_page_can_be_reached():
    for page in DOCS.rglob("*.md"):
        if page.name != "index.md":
            assert f"]({page.relative_to(DOCS)})" in text("index.md")
    for example in (ROOT / "examples").glob("*.py"):
        assert f"]({example.name})" in (ROOT / "examples" / "README.md").read_text(encoding="utf-8")


def test_the_readme_opens_with_the_two_commands():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first = next(blocks(ROOT / "README.md", ""))[1]
    assert [line.partition("#")[0].strip() for line in first.splitlines()] == ["make demo", "make test"]
    assert "Python 3.11" in readme.partition("```")[0]
    assert len(readme.splitlines()) < 200
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^demo:", makefile, re.MULTILINE) and re.search(r"^test:", makefile, re.MULTILINE)


def test_the_readme_shows_the_example_as_it_is():
    code = next(c for _, c in blocks(ROOT / "README.md", "python") if "class Entropy" in c)
    example = (ROOT / "examples" / "entropy.py").read_text(encoding="utf-8")
    lines = [line for line in code.splitlines() if line.strip()]
    assert [line for line in lines if line not in example.splitlines()] == []


def test_marked_code_runs():
    """README's hand-written ViT, probed; what its comments say is true."""
    marked = [code for mark, code in blocks(ROOT / "README.md", "python") if mark]
    assert len(marked) == 1
    names: dict = {}
    exec(compile(marked[0], "README.md", "exec"), names)
    results = names["results"]
    assert results["nmi"]["nmi"].dims == ("layer", "head")
    assert results["nmi"]["nmi"].shape == (3, 2)
    assert results["fourier"]["fourier"].dims == ("layer", "frequency")
    assert results["fourier"].sizes["layer"] == 7


def test_python_blocks_are_python():
    for page in PAGES:
        for _, code in blocks(page, "python"):
            if not re.match(r"def \w+\(.*\) -> [\w\[\]]+\n$", code):
                compile(code, str(page), "exec")


def test_the_python_page_has_the_public_names_and_signatures():
    import probekit

    page = text("python.md")
    assert [name for name in probekit.__all__ if f"`{name}`" not in page] == []
    for name in ("run", "probe"):
        part = section(page, f"## {name}")
        said = re.search(rf"probekit\.{name}\((.*?)\)\n```", part, re.DOTALL)[1]
        inside = [
            re.match(r"\**(\w+)", p.strip())[1] for p in re.split(r",(?![^(]*\))", said) if p.strip() != "*"
        ]
        assert inside == list(inspect.signature(getattr(api, name)).parameters)


def test_no_page_names_this_machine():
    for page in PAGES:
        content = page.read_text(encoding="utf-8")
        assert not re.search(r"/(work|root|home|tmp)/", content), page
        assert "pypi.org" not in content and "index-url" not in content, page
