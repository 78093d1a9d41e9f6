"""Finding and loading plugins, each contained: a broken one becomes a `Problem`, never a crash.

Every plugin is imported alone and every hook called alone, through a pluggy manager of its own, so a
failure costs exactly the names that hook would have offered. Lookups are in `probekit.plugins.catalog`.

Environment: ``PROBEKIT_PLUGINS=a,b`` loads only those installed plugins; ``PROBEKIT_TRACE=1`` prints
each import and hook call with its milliseconds.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import re
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy
from pydantic import ValidationError

from probekit import hookspecs
from probekit.errors import PluginError, ProbekitError, UsageError
from probekit.hookspecs import API, GROUP
from probekit.names import nearest, parse_model, quoted
from probekit.specs import (
    CommandSpec,
    DatasetSpec,
    FindingSpec,
    MetricSpec,
    ModelSpec,
    ReportSpec,
    Spec,
)

BUILT_IN = "probekit"
DISTRIBUTION = "vit-probekit"
KINDS: dict[str, type[Spec]] = {
    "models": ModelSpec,
    "metrics": MetricSpec,
    "datasets": DatasetSpec,
    "reports": ReportSpec,
    "findings": FindingSpec,
    "commands": CommandSpec,
}
HOOKS = {f"probekit_{kind}": kind for kind in KINDS}


@dataclass(frozen=True)
class Problem:
    """What is wrong with a plugin.

    `stage` is where it went wrong: ``find``, ``import``, ``api``, ``hook`` (its name or arguments),
    ``call`` or ``specs``. `message` is one line.
    """

    plugin: str
    stage: str
    message: str
    version: str = ""
    error: BaseException | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        version = f" {self.version}" if self.version else ""
        return f"plugin {quoted(self.plugin)}{version}: {self.stage}: {self.message}"


Report = Callable[[Problem], None]


@dataclass
class Plugin:
    """One plugin and the specs it offers, as far as it loaded.

    `origin` is the entry point's module or the file; `distribution` is empty for a file.
    """

    name: str
    version: str
    origin: str
    distribution: str = ""
    api: int | None = None
    specs: dict[str, list[Spec]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    problems: list[Problem] = field(default_factory=list)

    def problem(self, stage: str, message: str, error: BaseException | None = None) -> None:
        self.problems.append(Problem(self.name, stage, message, self.version, error))


@dataclass(frozen=True)
class Installed:
    """An entry point of the group ``probekit``, found but not imported."""

    name: str
    version: str
    distribution: str
    entry_point: metadata.EntryPoint


@contextlib.contextmanager
def traced(what: str) -> Iterator[None]:
    """Prints how long `what` took when ``PROBEKIT_TRACE`` is set."""
    start = time.perf_counter()
    try:
        yield
    finally:
        if os.environ.get("PROBEKIT_TRACE", "0") not in ("", "0"):
            print(f"probekit: {1000 * (time.perf_counter() - start):8.1f} ms  {what}", file=sys.stderr)


@contextlib.contextmanager
def contained(on_error: Callable[[BaseException], None], what: str) -> Iterator[None]:
    """Runs code that isn't ours: any failure goes to `on_error`, except the user's own Ctrl-C.

    Not only `Exception`: a plugin that calls ``sys.exit`` while it is imported must not end the run.
    What it prints goes to stderr, because stdout may be somebody's JSON.
    """
    try:
        with traced(what), contextlib.redirect_stdout(sys.stderr):
            yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        on_error(error)


@contextlib.contextmanager
def blamed(who: str) -> Iterator[None]:
    """Runs code that isn't ours: what it raises by mistake becomes a `PluginError` about `who`.

    ``sys.exit`` is such a mistake; a lack of memory isn't.
    """
    try:
        yield
    except (ProbekitError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        raise PluginError(f"{who} failed: {describe(error)}", hint="--debug shows where") from error


def in_words(how: Callable[[Any], str], value: Any) -> str:
    """``str`` or ``repr`` of an object from a plugin, whose own method may be broken too."""
    try:
        return how(value)
    except Exception:
        return f"<{type(value).__name__}>"


def describe(error: BaseException) -> str:
    """An exception from a plugin's code as one line with its place."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in (error.title, *first["loc"]))
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        return f"{where}: {first['msg']}{more}"
    text = " ".join(in_words(str, error).split())
    text = f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    if error.__cause__ is not None:  # what we made a sentence of
        frames += traceback.extract_tb(error.__cause__.__traceback__)
    ours = (*(f"{Path(file).parent}{os.sep}" for file in (hookspecs.__file__, pluggy.__file__)), "<frozen")
    theirs = [frame for frame in frames if not frame.filename.startswith(ours)]
    if not theirs or isinstance(error, SyntaxError):
        return text
    return f"{text} ({Path(theirs[-1].filename).name}, line {theirs[-1].lineno})"


def discover() -> tuple[list[Installed], list[Problem]]:
    """Installed plugins by name, nothing imported. ``PROBEKIT_PLUGINS`` narrows them."""
    problems: list[Problem] = []
    found: dict[tuple[str, str], Installed] = {}
    for distribution in metadata.distributions():
        try:
            if f"[{GROUP}]" not in (distribution.read_text("entry_points.txt") or ""):
                continue
            name, version = distribution.name, distribution.version or ""
            for point in distribution.entry_points.select(group=GROUP):
                # The same distribution further down the path is shadowed, as it is for `import`.
                found.setdefault((_normal(name), point.name), Installed(point.name, version, name, point))
        except Exception as error:
            where = Path(str(getattr(distribution, "_path", "?"))).name
            problems.append(
                Problem(where, "find", f"its metadata can't be read: {describe(error)}", "", error)
            )
    only = {name.strip() for name in os.environ.get("PROBEKIT_PLUGINS", "").split(",")} - {""}
    chosen = [item for item in found.values() if not only or item.name in only]
    for name in sorted(only - {item.name for item in chosen}):
        problems.append(Problem(name, "find", "named by PROBEKIT_PLUGINS, but not installed"))
    kept = []
    for name, count in sorted(Counter(item.name for item in chosen).items()):
        same = [item for item in chosen if item.name == name]
        owners = " and ".join(quoted(f"{item.distribution} {item.version}") for item in same)
        if count > 1:
            message = f"{owners} both call their plugin this, so neither is loaded; uninstall one"
        elif name == BUILT_IN or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.\-]*", name):
            message = f"{owners} can't call its plugin this: the name is taken or can't be typed"
        else:
            kept += same
            continue
        problems.append(Problem(name, "find", message, same[0].version))
    return kept, problems


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def load_built_in() -> Plugin:
    """Our own entries, through the same hooks as anybody's."""
    try:
        version = metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        version = "unknown"
    plugin = Plugin(BUILT_IN, version, "probekit.plugins.builtins", DISTRIBUTION)
    load(plugin, lambda: importlib.import_module("probekit.plugins.builtins"))
    return plugin


def load_installed(item: Installed) -> Plugin:
    """Imports an installed plugin and collects its specs."""
    plugin = Plugin(item.name, item.version, item.entry_point.value, item.distribution)
    load(plugin, item.entry_point.load)
    return plugin


def load(
    plugin: Plugin, importer: Callable[[], Any], without_hooks: Callable[[Any], None] | None = None
) -> None:
    """Imports a plugin and collects its specs and problems into `plugin`.

    `without_hooks` gets what was imported where it marks no hook; it must contain its own failures.
    """
    holder: list[Any] = []

    def failed(error: BaseException) -> None:
        plugin.problem("import", describe(error), error)

    with contained(failed, f"import {plugin.name}"):
        holder.append(importer())
    if not holder:
        return

    def unreadable(error: BaseException) -> None:
        plugin.problem("hook", f"its hooks can't be read: {describe(error)}", error)

    hooks: dict[str, Any] | None = None
    with contained(unreadable, f"read {plugin.name}"):
        plugin.api = getattr(holder[0], "PROBEKIT_API", None)
        hooks = _hooks(plugin, holder[0])
    if hooks is None:
        return
    if without_hooks and not hooks and not plugin.problems:
        without_hooks(holder[0])
    elif _api_fits(plugin):
        for name, function in hooks.items():
            _call(plugin, name, function)
    _drop_unusable(plugin)


def _api_fits(plugin: Plugin) -> bool:
    api = plugin.api
    if api is None:
        plugin.problem("api", f"it does not state PROBEKIT_API; add `PROBEKIT_API = {API}`")
    elif isinstance(api, bool) or not isinstance(api, int) or api < 1:
        plugin.problem(
            "api", f"PROBEKIT_API is {quoted(in_words(repr, api), 40)}, not a version number from 1 to {API}"
        )
        plugin.api = None
    elif api > API:
        message = f"it is written for API {api}, and this probekit offers {API}; upgrade {DISTRIBUTION}"
        plugin.problem("api", message)
    else:
        return True
    return False


def _hooks(plugin: Plugin, source: Any) -> dict[str, Any]:
    """The functions marked as hooks; one that looks like a hook but isn't marked is a problem."""
    manager = pluggy.PluginManager(GROUP)
    hooks = {}
    for name in dir(source):
        if manager.parse_hookimpl_opts(source, name) is not None:
            hooks[name] = getattr(source, name)
            continue
        looks_like_one = name.startswith("probekit_") and _nearest_hook(name)
        if looks_like_one and inspect.isroutine(inspect.getattr_static(source, name, None)):
            plugin.problem("hook", f"{quoted(name)} is not marked with `@hookimpl`, so it is not called")
    return hooks


def _nearest_hook(name: str) -> str | None:
    # Without the prefix, which would make any two names look alike.
    near = nearest(name.removeprefix("probekit_"), list(KINDS))
    return f"probekit_{near[0]}" if near else None


def _call(plugin: Plugin, name: str, function: Any) -> None:
    """Validates and calls one hook; whatever goes wrong is this hook's problem alone."""
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    alone = ModuleType(plugin.name)
    setattr(alone, name, function)
    try:
        manager.register(alone, plugin.name)
    except pluggy.PluginValidationError as error:
        reason = str(error).strip().splitlines()[-1]
        plugin.problem("hook", f"{quoted(name)} does not fit: {reason}", error)
        return
    caller = (manager.get_hookcallers(alone) or [])[0]
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        near = _nearest_hook(caller.name)
        hint = f"did you mean {quoted(near)}?" if near else f"the hooks are {', '.join(HOOKS)}"
        plugin.problem("hook", f"there is no hook {quoted(caller.name)}; {hint}", error)
        return
    if not caller.has_spec():  # marked optionalhook: for a newer probekit
        return
    kind = HOOKS[caller.name]

    def failed(error: BaseException) -> None:
        plugin.problem("call", f"{quoted(name)} failed: {describe(error)}", error)

    specs: list[Any] = []
    with contained(failed, f"{plugin.name}.{name}"):
        answers = caller()  # pluggy leaves a None out
        if not answers:
            raise TypeError("it returned None; it must return a list")
        if isinstance(answers[0], Spec):  # pydantic's models can be iterated over: field by field
            raise TypeError("it returned one spec; it must return a list")
        specs = list(answers[0])
    good = [spec for spec in specs if isinstance(spec, KINDS[kind])]
    if len(good) < len(specs):
        odd = next(spec for spec in specs if not isinstance(spec, KINDS[kind]))
        message = (
            f"{quoted(name)} returned {quoted(in_words(repr, odd), 60)}, which is no {KINDS[kind].__name__}"
        )
        plugin.problem("specs", message)
    plugin.specs[kind] += good


def _drop_unusable(plugin: Plugin) -> None:
    """Leaves out names that can't be typed, and those offered twice: choosing one would be a guess."""
    for kind, specs in plugin.specs.items():
        counts = Counter(full_name(spec) for spec in specs)
        for name in [name for name, count in counts.items() if count > 1]:
            what = "an empty name" if not name else quoted(name)
            plugin.problem("specs", f"{kind[:-1]} {what} is offered {counts[name]} times, so none is used")
        untypable = [name for name in counts if not _typable(name)]
        for name in untypable:
            plugin.problem("specs", f"{kind[:-1]} {quoted(name)} can't be typed as a name, so it is not used")
        plugin.specs[kind] = [
            spec for spec in specs if counts[full_name(spec)] == 1 and full_name(spec) not in untypable
        ]


def full_name(spec: Spec) -> str:
    """``NAME:VARIANT`` of a model, ``NAME`` of anything else."""
    return spec.full_name if isinstance(spec, ModelSpec) else spec.name


def _typable(name: str) -> bool:
    try:
        ref = parse_model(name)
    except UsageError:
        return False
    return name != "all" and ref.pack is None and not (ref.is_file or ref.options or ref.weights)


def resolve_target(target: str, owner: str = "the target", hint: str | None = None) -> Any:
    """Imports ``"module:attribute"``; any failure is a `PluginError` that names the owner and the target."""
    module_name, _, attribute = target.partition(":")
    caught: list[BaseException] = []
    with contained(caught.append, f"target {target}"):
        value: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            value = getattr(value, part)
        return value
    error = caught[0]
    if isinstance(error, ModuleNotFoundError) and error.name:
        itself = f"{module_name}.".startswith(f"{error.name}.")
        name = quoted(error.name)
        why = f"there is no module {name}" if itself else f"it needs {name}, which is not installed"
    else:
        why = describe(error)
    raise PluginError(f"{owner} can't provide {quoted(target)}: {why}", hint=hint) from error
