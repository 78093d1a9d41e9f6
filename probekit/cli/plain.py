"""Plain text for terminals: tables that keep to the width, texts of others made harmless."""

from __future__ import annotations

import json
import math
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from typing import Any

import typer


def width() -> int:
    return shutil.get_terminal_size((80, 24)).columns


def tame(text: object) -> str:
    """A text from a run or plugin on one line: nothing in it may steer the terminal or turn text around."""
    return "".join(
        " " if c in "\t\n\r" else "?" if unicodedata.category(c)[0] == "C" else c for c in str(text)
    )


def wrapped(text: str, indent: int) -> list[str]:
    """Lines of at most the terminal's width, all `indent` in."""
    space = max(20, width() - indent)
    lines = textwrap.wrap(tame(text), space, break_on_hyphens=False) or [""]
    return [" " * indent + line for line in lines]


def number(value: float) -> str:
    """Four significant digits; a dash for what isn't there."""
    return "-" if math.isnan(value) else f"{value:#.4g}".rstrip(".")


def interval(mean: float, low: float, high: float) -> str:
    """``96.21 [94.07, 98.29]``, without the brackets where there is no interval."""
    text = number(mean)
    return text if math.isnan(low) or math.isnan(high) else f"{text} [{number(low)}, {number(high)}]"


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]], fixed: int, right: int) -> None:
    """Columns in blocks that keep to the terminal's width; the first `fixed` columns begin every block.

    right: this column and the later ones are aligned to the right
    """
    columns = [[tame(cell) for cell in column] for column in zip(heads, *rows, strict=True)]
    sizes = [max(map(_cells, column)) for column in columns]
    begin = list(range(fixed))
    rest = list(range(fixed, len(columns)))
    while True:
        taken = list(begin)
        while rest and (len(taken) == fixed or _total(sizes, [*taken, rest[0]]) <= width()):
            taken.append(rest.pop(0))
        for line in range(len(rows) + 1):
            cells = [_padded(columns[c][line], sizes[c], c >= right) for c in taken]
            typer.echo("  ".join(cells).rstrip())
        if not rest:
            return
        typer.echo()


def json_alone(as_json: bool) -> AbstractContextManager[Any]:
    """Around others' code in a command with ``--json``: what it prints goes to stderr."""
    return redirect_stdout(sys.stderr) if as_json else nullcontext()


def print_json(value: Any) -> None:
    typer.echo(json.dumps(without_nan(value), indent=2, ensure_ascii=False, allow_nan=False))


def without_nan(value: Any) -> Any:
    """The same with None for NaN and infinity, and text that UTF-8 can hold: JSON has nothing else."""
    if isinstance(value, dict):
        return {without_nan(key): without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def count(n: int, noun: str) -> str:
    """``1 image``, ``2 images``"""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _total(sizes: Sequence[int], taken: Sequence[int]) -> int:
    return sum(sizes[c] for c in taken) + 2 * (len(taken) - 1)


def _cells(text: str) -> int:
    """Columns of a terminal that a text takes."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text
    )


def _padded(text: str, size: int, right: bool) -> str:
    space = " " * (size - _cells(text))
    return space + text if right else text + space
