"""The option ``compat`` of the paper's metrics: numbers as its published code gives them."""

from __future__ import annotations

from typing import Any

from probekit.errors import UsageError

OFFICIAL = "cl-vs-mim"
"""github.com/naver-ai/cl-vs-mim, the code of Park et al., ICLR 2023."""


def official(compat: str) -> bool:
    """Whether `compat` asks for the published code's formula. Raises `UsageError` for an unknown value."""
    if compat not in ("", OFFICIAL):
        raise UsageError(f"compat is '' or '{OFFICIAL}', not '{compat}'", hint=f"use compat={OFFICIAL}")
    return bool(compat)


def refuse_beside(compat: str, option: str, value: Any, published: Any) -> None:
    """Raises `UsageError` for an option that makes the published code's formula another one."""
    if official(compat) and value != published:
        raise UsageError(
            f"{option}={value!r} is not what '{compat}' does", hint="drop one of the two options"
        )
