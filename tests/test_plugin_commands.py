"""Plugins' commands on the command line: one that is broken costs itself alone."""

from __future__ import annotations

import sys

import pytest

PLUGIN = """
from probekit.hookspecs import hookimpl
from probekit.specs import CommandSpec
PROBEKIT_API = 1
@hookimpl
def probekit_commands():
    targets = {"greet": "commands_target:greet", "fails": "commands_target:fails", "odd": "commands_target:odd",
               "group": "commands_target:group", "value": "commands_target:value",
               "nowhere": "no_such_module:command"}
    return [CommandSpec(name=name, summary=f"what {name} does", target=target)
            for name, target in targets.items()]
"""
TARGET = """
import typer
def greet(name: str = "you"): print(f"hello {name}")
def fails():
    return 1 / 0
def odd(x: "Missing"): pass
value = 3
group = typer.Typer()
@group.command()
def one(): raise typer.Exit(5)
@group.command()
def two(): raise RuntimeError("two broke")
"""


@pytest.fixture
def commands(cli, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine.py").write_text(PLUGIN)
    (tmp_path / "commands_target.py").write_text(TARGET)
    yield lambda *words: cli("--no-plugins", "--plugin", tmp_path / "mine.py", *words)
    sys.modules.pop("commands_target", None)


def test_help_lists_plugins_commands_without_importing_any(commands):
    code, out, _ = commands("--help")
    assert code == 0 and "what nowhere does" in out and "what greet does" in out
    assert out.index("  run ") < out.index("what greet does")
    assert "commands_target" not in sys.modules


def test_a_function_and_an_app_become_commands(commands):
    assert commands("greet", "--name", "me") == (0, "hello me\n", "")
    assert "completion" not in commands("greet", "--help")[1]
    assert commands("group", "one")[0] == 5
    assert commands("greet", "--nonsense")[0] == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("nowhere", "can't provide 'no_such_module:command'"),
        ("value", "command 'value' of 'mine' can't be made: TypeError: its target is a 'int'"),
        ("odd --help", "command 'odd' of 'mine' can't be made: NameError"),
        (
            "fails",
            "command 'fails' of 'mine' failed: ZeroDivisionError: division by zero (commands_target.py",
        ),
        ("group two", "command 'group' of 'mine' failed: RuntimeError: two broke (commands_target.py, line"),
    ],
)
def test_a_broken_command_is_a_sentence_that_names_its_pack(commands, words, said):
    code, _, err = commands(*words.split())
    assert code == 3 and said in err and "Traceback" not in err
    if "failed" in said:
        assert "Traceback" in commands("--debug", *words.split())[2]
