"""Every error probekit raises on purpose: one sentence, a way out, an exit code."""

from __future__ import annotations


class ProbekitError(Exception):
    """One lower-case sentence with names in quotes, and, where there is one, the way out.

    `hint` is a command or an action. The command line prints both and exits with `exit_code`;
    it shows a traceback only with ``--debug``.
    """

    exit_code = 2
    contained = True
    """Whether one cell of a run can fail with it while the others go on."""

    def __init__(self, message: str, *, hint: str | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class UsageError(ProbekitError):
    """A name, option or grid that can't be understood. Exit code 2."""


class PluginError(ProbekitError):
    """A plugin that is broken, missing or breaks its contract. Exit code 3."""

    exit_code = 3


class WeightsError(ProbekitError):
    """A checkpoint that is absent, damaged, unsafe, or of another architecture. Exit code 4."""

    exit_code = 4


class DataError(ProbekitError):
    """A dataset or image that can't be used. Exit code 4."""

    exit_code = 4


class StoreError(ProbekitError):
    """A run folder, shard or result that is damaged, locked, full or too new. Exit code 4."""

    exit_code = 4
    contained = False


class WatchError(ProbekitError):
    """A model whose attention can't be captured so that the numbers can be trusted. Exit code 4."""

    exit_code = 4


class MetricError(ProbekitError):
    """A metric that returned something other than it declares. Fails its own cells only."""

    exit_code = 1


class DoesNotApply(ProbekitError):
    """Raised by a metric for a layer or cell it has no meaning for; the message is the reason."""

    exit_code = 1
