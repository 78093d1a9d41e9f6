"""For people who write plugins: a package to start from, and a check of one that exists."""

from __future__ import annotations

import inspect
import keyword
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from probekit.errors import PluginError, UsageError
from probekit.hookspecs import API
from probekit.names import did_you_mean, quoted
from probekit.plugins.catalog import Catalog
from probekit.plugins.files import load_file
from probekit.plugins.loading import (
    BUILT_IN,
    KINDS,
    Plugin,
    contained,
    describe,
    discover,
    full_name,
    load_built_in,
    load_installed,
    resolve_target,
)
from probekit.specs import MetricSpec, ModelSpec, Spec

TEMPLATES = Path(__file__).with_name("templates")
PREFIX = "vit-probekit-"
KINDS_TO_WRITE = tuple(sorted(path.name for path in TEMPLATES.iterdir() if path.is_dir()))


def write_package(kind: str, name: str, folder: Path, taken: list[str]) -> Path:
    """Writes an installable package into a new folder below `folder` and returns that folder.

    taken: names that are built in, which a new plugin can't have
    Raises `UsageError` for a name that can't be used and a folder that is there.
    """
    if kind not in KINDS_TO_WRITE:
        raise UsageError(
            f"there is no template for {quoted(kind)}", hint=f"there is one for: {', '.join(KINDS_TO_WRITE)}"
        )
    plain = name.removeprefix(PREFIX)
    identifier = plain.replace("-", "_")
    if not re.fullmatch(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*", plain) or keyword.iskeyword(identifier):
        raise UsageError(
            f"{quoted(name)} can't be the name of a {kind}",
            hint="small letters, digits and '_', for example 'entropy' or 'head_rank'",
        )
    if identifier in taken or plain in taken or plain == "all":
        raise UsageError(f"{kind} {quoted(plain)} is probekit's own", hint="choose another name")
    words = identifier.split("_")
    distribution = PREFIX + "-".join(words)
    package = distribution.replace("-", "_")
    root = folder / distribution
    values = {
        "api": API,
        "name": identifier,
        "pack": "-".join(words),
        "title": " ".join(words).capitalize(),
        "class_name": "".join(word.capitalize() for word in words),
        "distribution": distribution,
        "package": package,
    }
    places = {
        "pyproject.toml": root,
        "README.md": root,
        f"test_{kind}.py": root / "tests",
        "plugin.py": root / package,
        f"{kind}.py": root / package,
    }
    try:
        root.mkdir(parents=True)
        for file, place in places.items():
            text = (TEMPLATES / kind / f"{file}.tmpl").read_text(encoding="utf-8")
            place.mkdir(exist_ok=True)
            place.joinpath(file).write_text(Template(text).substitute(values), encoding="utf-8")
        root.joinpath(package, "__init__.py").write_text(f'"""The {kind} {identifier} for probekit."""\n')
    except FileExistsError as error:
        raise UsageError(f"{quoted(root)} is already there", hint="choose another --dir") from error
    except OSError as error:
        raise UsageError(
            f"{quoted(root)} can't be written: {error.strerror}", hint="choose another --dir"
        ) from error
    return root


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `level` is ``ok``, ``warn`` or ``fail``."""

    level: str
    what: str
    detail: str = ""


def find_plugin(name: str) -> tuple[Plugin, bool]:
    """Loads an installed plugin by its name, or a ``.py`` file; also whether that imported torch."""
    before = "torch" in sys.modules
    if name.endswith(".py"):
        plugin = load_file(name)
    elif name == BUILT_IN:
        plugin = load_built_in()
    else:
        installed, problems = discover()
        plain = name.removeprefix(PREFIX)
        item = next((item for item in installed if item.name in (name, plain)), None)
        if item is None:
            for problem in problems:
                if problem.plugin in (name, plain):
                    raise PluginError(str(problem))
            near = did_you_mean(plain, [item.name for item in installed])
            hint = f"{near or 'it is a name shown by'} `probekit plugins`, or a file such as './mine.py'"
            raise UsageError(f"no plugin {quoted(name)} is installed", hint=hint.replace("? `", "? see `"))
        plugin = load_installed(item)
    return plugin, "torch" in sys.modules and not before


def check_plugin(plugin: Plugin, loaded_torch: bool = False) -> list[Check]:
    """Everything that can be found out without a model: loading, specs, targets, metrics run once."""
    offers = ", ".join(f"{len(specs)} {kind}" for kind, specs in plugin.specs.items() if specs)
    checks = [Check("fail", problem.stage, problem.message) for problem in plugin.problems]
    if not checks:
        level = "ok" if offers else "warn"
        checks.append(Check(level, "loads", f"offers {offers}" if offers else "it offers nothing"))
    if loaded_torch and not plugin.origin.endswith(".py"):
        detail = "listing it imports torch; import heavy things in the target's module"
        checks.append(Check("warn", "loads", detail))
    catalog = Catalog.load([plugin.origin] if plugin.origin.endswith(".py") else [])
    for kind in KINDS:
        for spec in plugin.specs[kind]:
            checks += _check_spec(catalog, kind[:-1], spec)
    return checks


def _check_spec(catalog: Catalog, what: str, spec: Spec) -> Iterator[Check]:
    name = f"{what} {full_name(spec)}"
    for key, option in spec.options.items():
        if not key.isidentifier() or not key.isascii():
            yield Check("fail", name, f"option {quoted(key)} can't be a keyword argument")
        if option.choices and option.default not in option.choices:
            yield Check("fail", name, f"option {quoted(key)} has a default that is not among its choices")
    targets = [spec.target]
    if isinstance(spec, ModelSpec) and spec.weights and spec.weights.layout.convert:
        targets.append(spec.weights.layout.convert)
    for target in targets:
        try:
            value = resolve_target(target, "it")
        except PluginError as error:
            yield Check("fail", name, error.message)
            continue
        if isinstance(spec, MetricSpec):
            yield from _check_metric(name, spec, value, catalog)
        elif callable(value) or what == "finding":
            yield Check("ok", name, target)
        else:
            yield Check("fail", name, f"{quoted(target)} is {type(value).__name__}, which can't be called")


def _check_metric(name: str, spec: MetricSpec, cls: Any, catalog: Catalog) -> Iterator[Check]:
    wrong = list(_wrong_attributes(spec, cls))
    if wrong:
        yield from (Check("fail", name, text) for text in wrong)
        return
    failures: list[BaseException] = []
    with contained(failures.append, f"make {name}"):
        cls(**{key: option.default for key, option in spec.options.items()})
    if failures:
        yield Check("fail", name, f"it can't be made from its options: {describe(failures[0])}")
        return
    with contained(failures.append, f"run {name}"):
        from probekit.testing import check_metric

        check_metric(cls, catalog)
    if not failures:
        yield Check("ok", name, "measures and summarises")
    elif isinstance(failures[0], ImportError) and failures[0].name == "probekit.testing":
        yield Check("warn", name, "not run: this probekit comes without its conformance kit")
    else:
        yield Check("fail", name, describe(failures[0]))


def _wrong_attributes(spec: MetricSpec, cls: Any) -> Iterator[str]:
    from probekit.metric import Metric

    if not inspect.isclass(cls) or not issubclass(cls, Metric):
        yield f"{quoted(spec.target)} is not a subclass of probekit.Metric"
        return
    if getattr(cls, "name", None) != spec.name:
        yield f"the class calls itself {quoted(getattr(cls, 'name', None))}, its spec {quoted(spec.name)}"
    if not isinstance(cls.version, int) or isinstance(cls.version, bool) or cls.version < 1:
        yield f"version is {cls.version!r}, not a whole number from 1"
    if cls.measure is Metric.measure:
        if cls.summarize is Metric.summarize:
            yield "it has no `measure`"
        return  # it draws on another metric's traces: see `probekit.testing.check_metric`
    needs = getattr(cls, "needs", None)
    if not isinstance(needs, set | frozenset) or not all(isinstance(field, str) for field in needs):
        yield 'needs is not a set of field names such as {"attention"}'
    elif not needs:
        yield "needs is empty, so there is nothing to measure"
    dims = getattr(cls, "dims", None)
    if not isinstance(dims, dict) or not dims:
        yield 'dims is not a dict such as {"nmi": ("head",)}'
    elif not all(isinstance(axes, tuple) and all(isinstance(a, str) for a in axes) for axes in dims.values()):
        yield "dims has a value that is not a tuple of names"
    elif cls.summarize is Metric.summarize and (unknown := set(cls.units) - set(dims)):
        yield f"units names {quoted(sorted(unknown)[0])}, which dims doesn't"
