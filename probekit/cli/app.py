"""The ``probekit`` command. Heavy imports are inside commands: ``--help`` loads neither torch nor numpy."""

from __future__ import annotations

import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from probekit.cli import capturing, finding, listing, looking, reading, running, state
from probekit.errors import PluginError, ProbekitError, UsageError

_FLAGS = ("--no-plugins", "--debug")


class _Commands(TyperGroup):
    """Built-in commands, then those of plugins, which are looked up only when one is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        own = super().list_commands(ctx)
        return [*own, *(n for n in (e.name for e in state.catalog().commands) if n not in own)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        own = super().get_command(ctx, cmd_name)
        return own if own is not None else _plugin_command(cmd_name)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Plugins' commands by what their specs say: a target may be heavy to import, or broken."""
        shown = dict(self.commands)
        for entry in state.catalog().commands:
            shown.setdefault(entry.name, TyperCommand(entry.name, help=entry.spec.summary))
        TyperGroup(commands=shown).format_commands(ctx, formatter)


def _plugin_command(name: str) -> Any:
    catalog = state.catalog()
    if not any(e.name == name or e.qualified == name for e in catalog.commands):
        known = [c.name or c.callback.__name__ for c in app.registered_commands] + [
            e.name for e in catalog.commands
        ]
        from probekit.names import did_you_mean

        hint = did_you_mean(name, known) or "`probekit --help` lists the commands"
        raise UsageError(f"unknown command '{name}'", hint=hint)
    from probekit.plugins.loading import contained, describe

    entry = catalog.command(name)
    who = f"command '{name}' of '{entry.owner}'"
    target = catalog.resolve_target(entry)
    caught: list[BaseException] = []
    with contained(caught.append, who):
        command = _command_of(name, target)
    if caught:
        hint = f"`probekit plugins check {entry.pack}` shows all that is wrong"
        raise PluginError(f"{who} can't be made: {describe(caught[0])}", hint=hint) from caught[0]
    run = command.invoke

    def invoke(ctx: Any) -> Any:
        try:
            return run(ctx)
        except Exception as error:
            ours = isinstance(error, (ProbekitError, typer.Exit, typer.Abort, BrokenPipeError))
            if ours or _is_usage(error):
                raise
            raise PluginError(f"{who} failed: {describe(error)}", hint="--debug shows where") from error

    command.invoke = invoke
    return command


def _command_of(name: str, target: Any) -> Any:
    """click's command of a `typer.Typer` or a function."""
    if not callable(target):
        raise TypeError(f"its target is a '{type(target).__name__}', which can't be called")
    if not isinstance(target, typer.Typer):
        wrapped = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
        wrapped.command(name)(target)
        target = wrapped
    return typer.main.get_command(target)


app = typer.Typer(
    name="probekit",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from probekit import __version__

        typer.echo(f"probekit {__version__}")
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    plugin: Annotated[
        list[str] | None,
        typer.Option("--plugin", metavar="FILE", help="Also load this Python file as a plugin."),
    ] = None,
    no_plugins: Annotated[bool, typer.Option("--no-plugins", help="Load no installed plugin.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """What did this Vision Transformer learn?

    \b
    Examples:
      probekit run --model moco:vit-b16 --model simmim:vit-b16 --metrics all --dataset folder:photos
      probekit inspect timm:swin_tiny_patch4_window7_224@random
      probekit list models

    --plugin, --no-plugins and --debug may stand anywhere in the command line.
    """


for _group in (running, capturing, reading, finding, looking, listing):
    _group.register(app)


def _take_options(arguments: list[str]) -> tuple[list[str], list[str], dict[str, bool]]:
    """Options that hold for every command, from wherever they stand before ``--``."""
    rest: list[str] = []
    plugins: list[str] = []
    flags = dict.fromkeys(_FLAGS, False)
    words = iter(arguments)
    for word in words:
        if word == "--":
            rest += [word, *words]
        elif word in flags:
            flags[word] = True
        elif word.startswith("--plugin="):
            plugins.append(word.partition("=")[2])
        elif word == "--plugin":
            plugins.append(next(words, ""))
        else:
            rest.append(word)
    return rest, plugins, flags


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code: 0 done, 1 failed cells, 2 usage, 3 plugin, 4 weights or
    data, 130 interrupted."""
    rest, plugins, flags = _take_options(sys.argv[1:] if arguments is None else list(arguments))
    state.configure(plugins, flags["--no-plugins"], flags["--debug"])
    command = typer.main.get_command(app)
    try:
        result = command.main(rest, prog_name="probekit", standalone_mode=False)
        code = result if isinstance(result, int) else 0
        return _interrupted() if code == 130 else code  # typer makes this of Ctrl-C
    except ProbekitError as error:
        if state.debug():
            traceback.print_exc()
        print_error(error)
        return error.exit_code
    except typer.Exit as end:
        return end.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except BrokenPipeError:
        sys.stderr.close()  # a reader such as `head` left; nothing more can be said
        return 0
    except Exception as error:
        if _is_usage(error):
            error.show()
            return error.exit_code
        raise


def _is_usage(error: Exception) -> bool:
    """Whether it is one of click's own usage errors, whose module depends on typer's version."""
    return hasattr(error, "show") and hasattr(error, "exit_code")


def _interrupted() -> int:
    print("interrupted: the same command goes on from here", file=sys.stderr)
    return 130


def print_error(error: ProbekitError) -> None:
    """``error: one sentence`` and ``  hint: the way out`` on stderr."""
    print(f"error: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"  hint: {error.hint}", file=sys.stderr)


def run_main() -> None:
    """The console script."""
    sys.exit(main())
