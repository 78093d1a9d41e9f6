"""Everything that can be chosen by name: lookups over the specs that `probekit.plugins.loading` loads.

Built-ins are looked up first, so a name of ours costs no import of anybody's plugin and keeps its
meaning whatever is installed; a plugin's entry of the same name stays reachable as ``pack/name``. Two
plugins that offer one name both exist as ``pack/name``, and the bare name is an error that lists them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from probekit.errors import UsageError
from probekit.names import (
    DatasetRef,
    MetricRef,
    ModelRef,
    expand,
    guess_value,
    is_broad,
    option_text,
    parse_dataset,
    parse_metric,
    parse_model,
    parse_plain,
    quoted,
    read_options,
    split,
)
from probekit.plugins import files as files
from probekit.plugins import loading as loading
from probekit.plugins.loading import BUILT_IN, KINDS, Plugin, Problem, Report
from probekit.plugins.lookup_errors import choose_variant, require_one_pack, unknown
from probekit.specs import ModelSpec

Ref = ModelRef | MetricRef | DatasetRef


@dataclass(frozen=True)
class Entry:
    """A spec and whose it is. From a lookup, also what was asked for.

    ref:     the canonical reference, the variant filled in; None in listings
    options: every option of the spec, as given or by default, in the default's type
    """

    spec: Any
    pack: str
    version: str
    ref: Ref | None = None
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        """``NAME:VARIANT`` of a model, ``NAME`` of anything else."""
        return loading.full_name(self.spec)

    @property
    def qualified(self) -> str:
        """A name that means this entry whatever else is installed."""
        return f"{self.pack}/{self.name}"

    @property
    def owner(self) -> str:
        """Pack and version, for messages."""
        return f"{self.pack} {self.version}".strip()

    @property
    def built_in(self) -> bool:
        return self.pack == BUILT_IN

    @property
    def variant(self) -> str:
        """The variant to build: the spec's, or the free text after ``timm:`` and ``hf:``."""
        return self.ref.variant if isinstance(self.ref, ModelRef) else getattr(self.spec, "variant", "")


def source_of(entry: Entry, target: Any) -> dict[str, str]:
    """What comes from a file has no version to rely on: what it does is the file's content.

    target: the class or function that the entry names
    """
    if entry.version:
        return {}
    try:
        file = inspect.getfile(inspect.unwrap(target))
    except TypeError:  # an object that can be called: where it stands
        file = sys.modules[entry.spec.target.partition(":")[0]].__file__ or ""
    return {"source": hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]}


class Catalog:
    """Lookups by name; `Catalog.load` makes one.

    Problems are collected in `problems` as plugins load, and handed to `on_problem` one by one.
    """

    def __init__(self, enabled: bool = True, on_problem: Report | None = None):
        self.enabled = enabled
        self._on_problem = on_problem
        self._others_loaded = False
        self._files: dict[str, Path | None] = {}  # model files by module name; None: already imported
        self._plugins: list[Plugin] = []
        self._problems: list[Problem] = []

    @classmethod
    def load(
        cls, plugins: Sequence[str | Path] = (), enabled: bool = True, on_problem: Report | None = None
    ) -> Catalog:
        """Built-ins and the files of ``--plugin`` now, installed plugins when a name needs them.

        With `enabled` false (``--no-plugins``) installed plugins are never loaded; files still are.
        Raises `UsageError` for a file that isn't there; one that is broken becomes a problem.
        """
        catalog = cls(enabled, on_problem)
        catalog._add(loading.load_built_in())
        for path in plugins:
            plugin = files.load_file(path)
            if catalog._plugin(plugin.name):
                hint = "rename one: a file's name is its plugin's name"
                raise UsageError(f"two plugin files are called {quoted(plugin.name)}", hint=hint)
            catalog._files[files.file_module(Path(path).expanduser())] = None
            catalog._add(plugin)
        return catalog

    # --- loading

    def _report(self, problem: Problem) -> None:
        self._problems.append(problem)
        if self._on_problem:
            self._on_problem(problem)

    def _add(self, plugin: Plugin) -> None:
        self._plugins.append(plugin)
        for problem in plugin.problems:
            self._report(problem)

    def _plugin(self, name: str) -> Plugin | None:
        return next((plugin for plugin in self._plugins if plugin.name == name), None)

    def _load_others(self) -> None:
        if self._others_loaded or not self.enabled:
            return
        self._others_loaded = True
        installed, problems = loading.discover()
        for problem in problems:
            self._report(problem)
        for item in installed:
            if file := self._plugin(item.name):
                message = f"the file {quoted(file.origin)} takes its place"
                self._report(Problem(item.name, "find", message, item.version))
            else:
                self._add(loading.load_installed(item))

    @property
    def problems(self) -> list[Problem]:
        """What went wrong so far; reading it loads nothing."""
        return list(self._problems)

    @property
    def plugins(self) -> list[Plugin]:
        """Every plugin, built-ins first."""
        self._load_others()
        return list(self._plugins)

    # --- listings

    def entries(self, kind: str) -> list[Entry]:
        """All entries of a kind (`probekit.plugins.loading.KINDS`), built-ins first."""
        self._load_others()
        return list(self._loaded(kind))

    def _loaded(self, kind: str) -> Iterator[Entry]:
        for plugin in self._plugins:
            for spec in plugin.specs[kind]:
                yield Entry(spec, plugin.name, plugin.version)

    @property
    def models(self) -> list[Entry]:
        return self.entries("models")

    @property
    def metrics(self) -> list[Entry]:
        return self.entries("metrics")

    @property
    def datasets(self) -> list[Entry]:
        return self.entries("datasets")

    @property
    def reports(self) -> list[Entry]:
        return self.entries("reports")

    @property
    def findings(self) -> list[Entry]:
        return self.entries("findings")

    @property
    def commands(self) -> list[Entry]:
        return self.entries("commands")

    def labelled(self, kind: str) -> list[tuple[str, Entry]]:
        """Entries with the shortest name that means each: bare, or ``pack/name`` where others claim it."""
        families = self._families(kind)
        return [
            (entry.name if entry.built_in or not _rivals(entry, families) else entry.qualified, entry)
            for entry in self.entries(kind)
        ]

    def _families(self, kind: str) -> dict[str, list[Entry]]:
        families: dict[str, list[Entry]] = {}
        for entry in self.entries(kind):
            families.setdefault(entry.spec.name, []).append(entry)
        return families

    def notes(self, kind: str) -> list[str]:
        """A sentence for every bare name that several claim."""
        families = self._families(kind)
        shared: dict[str, list[Entry]] = {}
        for entry in self.entries(kind):
            if not entry.built_in and _rivals(entry, families):
                shared.setdefault(entry.name, []).append(entry)
        sentences = []
        for name, entries in shared.items():
            theirs = " or ".join(quoted(entry.qualified) for entry in entries)
            if any(rival.built_in for rival in _rivals(entries[0], families)):
                sentences.append(f"{quoted(name)} is probekit's own; a plugin's is {theirs}")
            else:
                sentences.append(f"{quoted(name)} is offered more than once; say {theirs}")
        return sentences

    def names(self, kind: str) -> list[str]:
        """What ``all`` and globs choose from: entries that need nothing more, and not only on request."""
        return [
            label
            for label, entry in self.labelled(kind)
            if not any(getattr(entry.spec, a, None) for a in ("any_variant", "argument", "on_request"))
        ]

    def select(self, kind: str, selectors: Sequence[str]) -> list[Entry]:
        """Entries that selectors choose (see `probekit.names.expand`), each once, in the order asked for.

        ``all``, globs and ``!name`` load installed plugins; plain names only where they aren't built in.
        """
        parts = split(selectors)
        if selectors and not parts:
            raise UsageError(f"no {kind[:-1]} is named", hint="'all' chooses every one")
        if any(is_broad(part) for part in parts):
            parts = expand(parts, self.names(kind), keep_unknown=True)
        chosen: dict[tuple[str, str], Entry] = {}
        for part in parts:
            entry = self.lookup(kind, part)
            chosen.setdefault((entry.pack, str(entry.ref)), entry)
        return list(chosen.values())

    # --- lookups

    def lookup(self, kind: str, text: str) -> Entry:
        """`model`, `metric`, ... by the kind's name."""
        special = {"models": self.model, "metrics": self.metric, "datasets": self.dataset}
        return special[kind](text) if kind in special else self._simple(kind, text)

    def model(self, ref: str | ModelRef) -> Entry:
        """A model's entry, with the variant and the options filled in.

        Raises `UsageError` for what can't be found, is ambiguous or has no such option, `PluginError`
        where the plugin that should have it is broken.
        """
        ref = parse_model(ref) if isinstance(ref, str) else ref
        if ref.is_file:
            return self._from_file(ref)
        found = self._candidates("models", ref.pack, lambda spec: _is_variant(spec, ref))
        if not found:
            family = self._candidates("models", ref.pack, lambda spec: spec.name == ref.name)
            if family:
                message = f"model {quoted(ref.name)} has no variant {quoted(ref.variant)}"
                raise choose_variant(message, ref, family)
            if ref.is_module and ref.pack is None and _importable(ref.name):
                return _free_model(ref, ref.name, f"{ref.name}:{ref.variant}")
            raise unknown(self, "models", ref)
        require_one_pack("model", ref, found)
        if ref.variant:  # an exact entry goes before an any_variant one of the same pack
            entry = next((e for e in found if e.spec.variant == ref.variant), found[0])
        else:
            defaults = [e for e in found if e.spec.default] or found
            entry = defaults[0]
            if len(defaults) > 1 or entry.spec.any_variant:
                raise choose_variant(f"model {quoted(ref.name)} needs a variant", ref, found)
        filled = dataclasses.replace(ref, variant=ref.variant or entry.spec.variant)
        return self._chosen("models", entry, filled)

    def metric(self, ref: str | MetricRef) -> Entry:
        """A metric's entry with its options filled in. Raises as `model` does."""
        ref = parse_metric(ref) if isinstance(ref, str) else ref
        return self._chosen("metrics", self._named("metrics", ref), ref)

    def dataset(self, ref: str | DatasetRef) -> Entry:
        """A dataset's entry; its argument is ``entry.ref.argument``. Raises as `model` does."""
        ref = parse_dataset(ref) if isinstance(ref, str) else ref
        entry = self._named("datasets", ref)
        wants, bare = entry.spec.argument, dataclasses.replace(ref, argument=None)
        if wants and not wants.startswith("[") and ref.argument is None:
            raise UsageError(
                f"dataset {quoted(bare)} needs {wants}", hint=f"write {quoted(f'{bare}:{wants}')}"
            )
        if ref.argument is not None and not wants:
            message = f"dataset {quoted(bare)} takes nothing after its name, got {quoted(ref.argument)}"
            raise UsageError(message, hint=f"write {quoted(bare)}")
        return self._chosen("datasets", entry, ref)

    def report(self, name: str) -> Entry:
        return self._simple("reports", name)

    def finding(self, name: str) -> Entry:
        return self._simple("findings", name)

    def command(self, name: str) -> Entry:
        return self._simple("commands", name)

    def _simple(self, kind: str, name: str) -> Entry:
        ref = parse_plain(kind[:-1], name)
        return self._chosen(kind, self._named(kind, ref), ref)

    def _named(self, kind: str, ref: Any) -> Entry:
        found = self._candidates(kind, ref.pack, lambda spec: spec.name == ref.name)
        if not found:
            raise unknown(self, kind, ref)
        require_one_pack(kind[:-1], ref, found)
        return found[0]

    def _candidates(self, kind: str, pack: str | None, fits: Callable[[Any], bool]) -> list[Entry]:
        if pack in (None, BUILT_IN):
            found = [entry for entry in self._loaded(kind) if entry.built_in and fits(entry.spec)]
            if found or pack == BUILT_IN:
                return found
        self._load_others()
        return [e for e in self._loaded(kind) if not e.built_in and fits(e.spec) and pack in (None, e.pack)]

    def _chosen(self, kind: str, entry: Entry, ref: Any) -> Entry:
        given = getattr(ref, "options", {})
        options = read_options(entry.spec.options, given, f"{kind[:-1]} {quoted(entry.name)}")
        pack = ref.pack
        if pack == BUILT_IN or (pack and not _rivals(entry, self._families(kind))):
            pack = None
        changes: dict[str, Any] = {"pack": pack}
        if given:  # a default that is spelt out is the same choice
            kept = {key: options[key] for key in given if options[key] != entry.spec.options[key].default}
            changes["options"] = {key: option_text(value) for key, value in kept.items()}
        return dataclasses.replace(entry, ref=dataclasses.replace(ref, **changes), options=options)

    def _from_file(self, ref: ModelRef) -> Entry:
        path = Path(ref.name).expanduser()
        if not path.is_file():
            message = f"model file {quoted(ref.name)} does not exist"
            raise UsageError(message, hint="a model in a file is './file.py:function'")
        module = files.file_module(path)
        self._files.setdefault(module, path)
        return _free_model(
            ref,
            re.sub(r"[^A-Za-z0-9_.\-]", "_", path.stem).lstrip("_.-") or "file",
            f"{module}:{ref.variant}",
        )

    def resolve_target(self, target: str | Entry) -> Any:
        """Imports a target, given as an entry or as ``"module:attribute"``.

        Raises `PluginError` naming pack, version and target.
        """
        entry = target if isinstance(target, Entry) else None
        if entry is None:
            entry = next((e for kind in KINDS for e in self._loaded(kind) if e.spec.target == target), None)
        text = entry.spec.target if entry else str(target)
        owner, hint = "the target", None
        if entry and entry.pack:
            owner = f"plugin {quoted(entry.pack)} {entry.version}".rstrip()
            hint = (
                None if entry.built_in else f"`probekit plugins check {entry.pack}` shows all that is wrong"
            )
        elif entry:
            owner = f"model {quoted(entry.ref)}"
        module = text.partition(":")[0]
        if path := self._files.get(module):
            files.import_model_file(path, owner)
            self._files[module] = None
        return loading.resolve_target(text, owner, hint)


def _rivals(entry: Entry, families: Mapping[str, list[Entry]]) -> list[Entry]:
    """Other plugins' entries that the entry's bare name could mean."""

    def claims(other: Entry) -> bool:
        anything = [getattr(e.spec, "any_variant", False) for e in (entry, other)]
        return other.name == entry.name or any(anything)

    return [e for e in families.get(entry.spec.name, []) if e.pack != entry.pack and claims(e)]


def _is_variant(spec: ModelSpec, ref: ModelRef) -> bool:
    return spec.name == ref.name and (not ref.variant or spec.any_variant or spec.variant == ref.variant)


def _free_model(ref: ModelRef, name: str, target: str) -> Entry:
    """A function of the user's own, which declares nothing: its options are taken as they look."""
    spec = ModelSpec(name=name, variant=ref.variant, target=target, summary="a function of your own")
    return Entry(spec, "", "", ref, {key: guess_value(value) for key, value in ref.options.items()})


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name.partition(".")[0]) is not None
    except (ImportError, ValueError):
        return False
