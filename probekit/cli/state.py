"""The options that hold for one invocation of the command line, and its catalog."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from probekit.plugins.catalog import Catalog
    from probekit.plugins.loading import Problem


@dataclass
class _State:
    plugins: tuple[str, ...] = ()
    no_plugins: bool = False
    debug: bool = False
    catalog: Catalog | None = None


_state = _State()


def configure(plugins: Sequence[str] = (), no_plugins: bool = False, debug: bool = False) -> None:
    """Sets what the command line was called with; the next `catalog` is a fresh one."""
    global _state
    _state = _State(tuple(plugins), no_plugins, debug)


def debug() -> bool:
    """Whether tracebacks are wanted."""
    return _state.debug


def catalog(announce: bool = True) -> Catalog:
    """This invocation's catalog, built once. Problems go to stderr, one line each, as they are met.

    announce: False for a command that shows the problems itself
    """
    if _state.catalog is None:
        from probekit.plugins.catalog import Catalog

        on_problem = _announce if announce else None
        _state.catalog = Catalog.load(_state.plugins, not _state.no_plugins, on_problem)
    return _state.catalog


def _announce(problem: Problem) -> None:
    print(f"warning: {problem}", file=sys.stderr)
    if _state.debug and problem.error is not None:
        traceback.print_exception(problem.error, file=sys.stderr)
