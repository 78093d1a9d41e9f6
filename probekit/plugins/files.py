"""Python files used as they are: ``--plugin ./mine.py`` and models written as ``./file.py:build``."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import os
import re
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from probekit.errors import PluginError, UsageError
from probekit.names import quoted
from probekit.plugins.loading import BUILT_IN, Plugin, contained, describe, load
from probekit.specs import MetricSpec, Option


def load_file(path: str | Path) -> Plugin:
    """Loads ``--plugin FILE`` under its stem as the pack's name. Raises `UsageError` where there is none.

    A file without hooks offers the `probekit.Metric` classes it defines, and need not state an API.
    """
    path = Path(path).expanduser()
    if not path.is_file() or path.suffix != ".py":
        why = "is not a .py file" if path.exists() else "does not exist"
        hint = "--plugin takes a Python file; an installed plugin needs no option"
        raise UsageError(f"plugin file {quoted(path)} {why}", hint=hint)
    name = re.sub(r"[^A-Za-z0-9_.\-]", "_", path.stem).lstrip("_.-")
    if not name or name == BUILT_IN:
        raise UsageError(
            f"plugin file {quoted(path)} can't be called that", hint="rename it, its name is the plugin's"
        )
    plugin = Plugin(name, "", str(path))
    module = file_module(path)
    load(plugin, lambda: import_file(path), lambda source: _offer_metrics(plugin, source, path))
    for kind, specs in plugin.specs.items():
        # In a file, "mine:Entropy" and f"{__name__}:Entropy" mean the same.
        old = f"{path.stem}:"
        plugin.specs[kind] = [
            spec.model_copy(update={"target": f"{module}:{spec.target[len(old) :]}"})
            if spec.target.startswith(old)
            else spec
            for spec in specs
        ]
    return plugin


def file_module(path: Path) -> str:
    """The module name a file is imported under: two files with one stem stay apart."""
    stem = re.sub(r"\W", "_", path.stem, flags=re.ASCII)
    return f"probekit_file_{stem}_{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:8]}"


class _Source(SourceFileLoader):
    """Leaves no ``__pycache__`` beside the user's file, and never reads a stale one."""

    def get_code(self, fullname: str) -> Any:
        return compile(self.get_data(self.path), self.path, "exec", dont_inherit=True)


def import_file(path: Path) -> ModuleType:
    """Runs a file as a fresh module; raises whatever it raises."""
    name = file_module(path)
    spec = importlib.util.spec_from_loader(name, _Source(name, str(path.resolve())))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def import_model_file(path: Path, owner: str) -> None:
    """Imports the file of ``./file.py:build`` for `owner`; any failure is a `PluginError`."""
    failures: list[BaseException] = []
    with contained(failures.append, f"import {path.name}"):
        import_file(path)
    if failures:
        raise PluginError(f"{owner} can't be imported: {describe(failures[0])}") from failures[0]


def _offer_metrics(plugin: Plugin, module: ModuleType, path: Path) -> None:
    """One spec for every `Metric` class a file without hooks defines."""
    loaded = sys.modules.get("probekit.metric")  # a file that defines a Metric has imported it
    metric = loaded.Metric if loaded else None
    classes = [
        value
        for value in vars(module).values()
        if metric is not None
        and inspect.isclass(value)
        and issubclass(value, metric)
        and value.__module__ == module.__name__
        and hasattr(value, "name")
    ]
    if not classes:
        message = "it defines neither hooks marked with `@hookimpl` nor a probekit.Metric class with a name"
        plugin.problem("hook", message)
    for cls in classes:

        def failed(error: BaseException, cls: type = cls) -> None:
            plugin.problem("specs", f"class {quoted(cls.__name__)}: {describe(error)}", error)

        with contained(failed, f"{plugin.name}.{cls.__name__}"):
            summary = ((cls.__doc__ or "").strip().splitlines() or [f"from {path.name}"])[0][:200]
            target = f"{module.__name__}:{cls.__qualname__}"
            spec = MetricSpec(
                name=cls.name,
                summary=summary,
                target=target,
                options=_constructor_options(cls),
                figure=str(cls.figure) or None,
            )
            plugin.specs["metrics"].append(spec)


def _constructor_options(cls: type) -> dict[str, Option]:
    parameters = inspect.signature(cls).parameters.values()
    plain = (str, int, float, bool, type(None))
    return {p.name: Option(default=p.default) for p in parameters if isinstance(p.default, plain)}
