"""``probekit list`` and ``probekit plugins``: what can be chosen by name, and whose it is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from probekit.cli import state

if TYPE_CHECKING:
    from rich.table import Table

    from probekit.plugins.catalog import Catalog, Entry
    from probekit.plugins.loading import Plugin, Problem

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
plugins_app = typer.Typer(no_args_is_help=False)


def register(app: typer.Typer) -> None:
    """Adds ``list`` and ``plugins`` to the command line."""
    app.command("list")(list_command)
    app.add_typer(plugins_app, name="plugins")


def list_command(
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar="[models|metrics|datasets|reports|findings|commands]",
            help="Only this kind; everything without it.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """What you can choose by name.

    \b
    Examples:
      probekit list
      probekit list metrics
      probekit list models --json
    """
    from probekit.errors import UsageError
    from probekit.names import did_you_mean, quoted
    from probekit.plugins.loading import KINDS

    if kind is not None and kind not in KINDS:
        hint = did_you_mean(kind, list(KINDS)) or f"there are {', '.join(KINDS)}"
        raise UsageError(f"{quoted(kind)} can't be listed", hint=hint)
    catalog = state.catalog()
    kinds = [kind] if kind else [kind for kind in KINDS if catalog.entries(kind)]
    notes = [note for each in kinds for note in catalog.notes(each)]
    if as_json:
        listed: dict[str, Any] = {each: _entries_json(catalog, each) for each in ([kind] if kind else KINDS)}
        _print_json({**listed, "notes": notes, "problems": _problems_json(catalog.problems)})
        return
    for each in kinds:
        labelled = catalog.labelled(each)
        if not labelled:
            typer.echo(f"no {each} yet; `probekit plugins` shows what is installed")
        else:
            _show(_entry_table(each, labelled))
    for note in notes:
        typer.echo(f"note: {note}")
    if broken := sorted({problem.plugin for problem in catalog.problems}):
        typer.echo(f"note: something is wrong with {', '.join(broken)}; see `probekit plugins`")


def _entries_json(catalog: Catalog, kind: str) -> list[dict[str, Any]]:
    return [
        {
            **entry.spec.model_dump(mode="json"),
            "name": label,
            "qualified": entry.qualified,
            "pack": entry.pack,
            "version": entry.version,
            "built_in": entry.built_in,
        }
        for label, entry in catalog.labelled(kind)
    ]


def _problems_json(problems: Sequence[Problem]) -> list[dict[str, str]]:
    return [{key: getattr(p, key) for key in ("plugin", "version", "stage", "message")} for p in problems]


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _entry_table(kind: str, labelled: Sequence[tuple[str, Entry]]) -> Table:
    extra = {"models": "objective", "metrics": "figure"}.get(kind)
    ours = all(entry.built_in for _, entry in labelled)
    table = _table(f"{kind} ({len(labelled)})", extra, None if ours else "from", "")
    for label, entry in labelled:
        spec = entry.spec
        name = f"{label}:{spec.argument}".replace(":[", "[:") if getattr(spec, "argument", None) else label
        name = f"{label}:NAME" if getattr(spec, "any_variant", False) else name
        lines = [spec.summary]
        if getattr(spec, "published_as", None):
            lines.append(f"the published model is {spec.name}:{spec.published_as}")
        if spec.options:
            lines.append(f"options: {', '.join(spec.options)}")
        cells = [name]
        if extra:
            cells.append(getattr(spec, extra) or "")
        if not ours:
            cells.append(entry.pack)
        _row(table, *cells, "\n".join(lines))
    return table


def _table(title: str, *columns: str | None) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), title_justify="left", expand=False)
    table.add_column(title, style="bold", overflow="fold", max_width=38)
    for column in columns:
        if column is not None:
            table.add_column(column, overflow="fold", no_wrap=False)
    return table


def _row(table: Table, *cells: str) -> None:
    from rich.text import Text

    # Text, not str: a plugin's summary is data, not rich's markup, nor the terminal's.
    table.add_row(*(Text(re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", "?", cell)) for cell in cells))


def _show(table: Table) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print(table)
    console.print()


# --- plugins


@plugins_app.callback(invoke_without_command=True)
def plugins(context: typer.Context, as_json: Json = False) -> None:
    """Plugins: which are loaded, what they offer, what is wrong with them.

    \b
    Examples:
      probekit plugins
      probekit plugins --json
      probekit plugins new metric entropy
      probekit plugins check entropy
    """
    if context.invoked_subcommand is not None:
        return
    catalog = state.catalog(announce=False)
    loaded = catalog.plugins
    if as_json:
        _print_json(
            {"plugins": [_plugin_json(p) for p in loaded], "problems": _problems_json(catalog.problems)}
        )
        return
    table = _table(f"plugins ({len(loaded)})", "version", "API", "offers", "from")
    for plugin in loaded:
        offers = [f"{len(specs)} {kind if len(specs) > 1 else kind[:-1]}" for kind, specs in _offers(plugin)]
        api = "" if plugin.api is None else str(plugin.api)
        _row(
            table,
            plugin.name,
            plugin.version,
            api,
            ", ".join(offers) or "nothing",
            plugin.distribution or plugin.origin,
        )
    _show(table)
    for problem in catalog.problems:
        typer.echo(f"problem: {problem}")
    if not catalog.enabled:
        typer.echo("note: installed plugins are off (--no-plugins)")


def _offers(plugin: Plugin) -> list[tuple[str, list[Any]]]:
    return [(kind, specs) for kind, specs in plugin.specs.items() if specs]


def _plugin_json(plugin: Plugin) -> dict[str, Any]:
    from probekit.plugins.loading import full_name

    return {
        "name": plugin.name,
        "version": plugin.version,
        "api": plugin.api,
        "distribution": plugin.distribution,
        "origin": plugin.origin,
        "offers": {kind: [full_name(spec) for spec in specs] for kind, specs in _offers(plugin)},
        "problems": _problems_json(plugin.problems),
    }


@plugins_app.command("new")
def new(
    kind: Annotated[str, typer.Argument(metavar="metric", help="What to write.")],
    name: Annotated[str, typer.Argument(help="Its name, for example 'entropy'.")],
    folder: Annotated[Path, typer.Option("--dir", help="Where the package's folder is made.")] = Path("."),
    as_json: Json = False,
) -> None:
    """Write an installable package with a metric of ten lines and a test that passes.

    \b
    Examples:
      probekit plugins new metric entropy
      probekit plugins new metric head_rank --dir ~/code
    """
    from probekit.cli.plugin_author import write_package
    from probekit.plugins.loading import load_built_in

    taken = [spec.name for spec in load_built_in().specs.get(f"{kind}s", [])]
    root = write_package(kind, name, folder.expanduser(), taken)
    if as_json:
        _print_json(
            {
                "folder": str(root),
                "files": sorted(str(p.relative_to(root)) for p in root.rglob("*.*") if p.is_file()),
            }
        )
        return
    typer.echo(f"{root} is written; now:")
    typer.echo(f"  pip install -e '{root}[test]'")
    typer.echo(f"  pytest {root}")
    typer.echo(f"  probekit plugins check {root.name.removeprefix('vit-probekit-')}")


@plugins_app.command("check")
def check(
    plugin: Annotated[str, typer.Argument(help="An installed plugin's name, or a .py file.")],
    as_json: Json = False,
) -> None:
    """Check a plugin: it loads, its specs are valid, every target imports, every metric runs.

    \b
    Examples:
      probekit plugins check moco
      probekit plugins check ./mine.py
    """
    from probekit.cli.plugin_author import check_plugin, find_plugin
    from probekit.errors import PluginError
    from probekit.names import quoted

    found, loaded_torch = find_plugin(plugin)
    checks = check_plugin(found, loaded_torch)
    failed = sum(each.level == "fail" for each in checks)
    if as_json:
        _print_json(
            {"plugin": found.name, "version": found.version, "checks": [asdict(each) for each in checks]}
        )
    else:
        for each in checks:
            typer.echo(
                f"{each.level:4}  {each.what}: {each.detail}"
                if each.detail
                else f"{each.level:4}  {each.what}"
            )
    if failed:
        raise PluginError(f"plugin {quoted(found.name)} fails {failed} of {len(checks)} checks")


@plugins_app.command("install")
def install(names: Annotated[list[str], typer.Argument(help="Packs ('moco'), or what pip takes.")]) -> None:
    """Install packs with pip: 'moco' is vit-probekit-moco.

    \b
    Examples:
      probekit plugins install moco simmim
      probekit plugins install ./vit-probekit-entropy
    """
    _pip("install", [_requirement(name) for name in names])


@plugins_app.command("uninstall")
def uninstall(
    names: Annotated[list[str], typer.Argument(help="Plugins as `probekit plugins` shows them.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
) -> None:
    """Uninstall plugins with pip; a broken one too.

    \b
    Examples:
      probekit plugins uninstall moco
      probekit plugins uninstall moco simmim --yes
    """
    from probekit.plugins.loading import discover

    owners = {item.name: item.distribution for item in discover()[0]}  # nothing is imported
    distributions = [owners.get(name) or _requirement(name) for name in names]
    if not yes:
        typer.confirm(f"Uninstall {', '.join(distributions)}?", abort=True)
    _pip("uninstall", ["--yes", *distributions])


def _requirement(name: str) -> str:
    """A short name is a pack of ours: anybody could own the bare word on the package index."""
    from probekit.errors import UsageError
    from probekit.names import quoted

    short = re.fullmatch(r"([A-Za-z0-9]+(?:[-_.][A-Za-z0-9]+)*)((?:\[.*\])?\s*(?:[=<>!~].*)?)", name)
    if name.startswith("-") or not name.strip():
        raise UsageError(f"{quoted(name)} is no pack", hint="options of pip are for `python -m pip` itself")
    if short is None or name.lower().startswith("vit-probekit") or name.endswith((".whl", ".gz", ".zip")):
        return name
    return f"vit-probekit-{name}"


def _pip(verb: str, arguments: Sequence[str]) -> None:
    from probekit.errors import PluginError

    command = [sys.executable, "-m", "pip", verb, *arguments]
    typer.echo(f"python -m pip {' '.join(command[3:])}", err=True)
    status = subprocess.run(command, check=False).returncode
    if status:
        raise PluginError(f"pip ended with status {status}", hint="its own message stands above")
