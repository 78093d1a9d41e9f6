"""What a run or a capture says while it goes on. Without torch: the command line listens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from probekit.errors import ProbekitError
    from probekit.store.cells import Outcome


@dataclass(frozen=True)
class Event:
    """Something to show while a run goes on.

    kind: cell (a cell begins: `total` images over all its passes, `done` already there), pass (`text` says
          which: ``all``, ``train``, ``all~VARIATION``), images (`done` more), bad-image, warning, summary
          (of `metric` begins), metric (ended, with `outcome`), cell-failed (with `error`), cell-done
    """

    kind: str
    model: str = ""
    dataset: str = ""
    metric: str = ""
    text: str = ""
    total: int = 0
    done: int = 0
    outcome: Outcome | None = None
    error: ProbekitError | None = None


Listener = Callable[[Event], None]


def nobody(event: Event) -> None:
    """Hears everything and does nothing."""
