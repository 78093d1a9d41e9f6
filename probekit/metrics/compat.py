"""The option ``compat`` of the paper's metrics: numbers as its published code gives them."""

from __future__ import annotations

from probekit.errors import UsageError

OFFICIAL = "cl-vs-mim"
"""github.com/naver-ai/cl-vs-mim, the code of Park et al., ICLR 2023."""


def official(compat: str) -> bool:
    """Whether `compat` asks for the published code's formula. Raises `UsageError` for an unknown value."""
    if compat not in ("", OFFICIAL):
        raise UsageError(f"compat is '' or '{OFFICIAL}', not '{compat}'", hint=f"use compat={OFFICIAL}")
    return bool(compat)
