"""Matrix products in einsum letters, and what they do to positions: products of tokens are scores."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probekit.watch.positions import Where, collapse

_ADDED_TO = frozenset({"baddbmm", "addmm"})
CONTRACT = frozenset({"matmul", "__matmul__", "__rmatmul__", "bmm", "mm", "einsum", "linear"}) | _ADDED_TO


@dataclass(frozen=True)
class Contraction:
    """A product of two tensors in einsum letters: `left`, `right` -> `out`, of arguments `a` and `b`."""

    left: str
    right: str
    out: str
    a: Tensor
    b: Tensor

    @property
    def summed(self) -> str:
        return "".join(c for c in self.left if c in self.right and c not in self.out)

    @property
    def shared(self) -> str:
        return "".join(c for c in self.out if c in self.left and c in self.right)

    @property
    def left_only(self) -> str:
        return "".join(c for c in self.out if c not in self.right)

    @property
    def right_only(self) -> str:
        return "".join(c for c in self.out if c not in self.left)


def contraction(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Contraction | None:
    """The einsum form of a matrix product, or None where the call isn't a product of two tensors."""
    if name == "einsum":
        operands = args[1:] if isinstance(args[1], Tensor) else args[1]
        if not isinstance(args[0], str) or len(operands) != 2:
            return None
        a, b = operands
        left, right, out = _subscripts(args[0], a.dim(), b.dim())
        return Contraction(left, right, out, a, b)
    if name == "linear":
        a, b = args[0], args[1] if len(args) > 1 else kwargs["weight"]
        lead = string.ascii_letters[: a.dim() - 1]
        return Contraction(lead + "Z", "YZ", lead + "Y", a, b)
    if name in _ADDED_TO:
        args = args[1:]
    a, b = args[:2] if len(args) > 1 else (args[0], kwargs.get("mat2", kwargs.get("other")))
    if name == "__rmatmul__":
        a, b = b, a
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or min(a.dim(), b.dim()) < 2:
        return None
    lead = string.ascii_lowercase[: max(a.dim(), b.dim()) - 2]
    left, right = (lead[len(lead) - (t.dim() - 2) :] for t in (a, b))
    return Contraction(left + "XZ", right + "ZY", lead + "XY", a, b)


def _subscripts(equation: str, a_dims: int, b_dims: int) -> tuple[str, str, str]:
    """Explicit letters of a two-operand einsum equation, the ellipsis spelled out."""
    equation = equation.replace(" ", "")
    inputs, arrow, out = equation.partition("->")
    left, right = inputs.split(",")
    free = [c for c in string.ascii_letters if c not in equation]
    extra = [dims - len(s.replace("...", "")) for s, dims in ((left, a_dims), (right, b_dims)) if "..." in s]
    dots = "".join(free[: max(extra, default=0)])
    if not arrow:
        letters = left.replace("...", "") + right.replace("...", "")
        out = "..." + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))

    def spell(text: str, dims: int) -> str:
        n = dims - len(text.replace("...", ""))
        return text.replace("...", dots[len(dots) - n :] if n else "")

    return spell(left, a_dims), spell(right, b_dims), out.replace("...", dots)


def _project(t: Tensor, letters: str, out: str, shape: torch.Size) -> Tensor:
    for axis in reversed(range(len(letters))):
        if letters[axis] not in out:
            t = collapse(t, axis)
    kept = [c for c in letters if c in out]
    t = t.permute([kept.index(c) for c in out if c in kept])
    for axis, c in enumerate(out):
        if c not in kept:
            t = t.unsqueeze(axis)
    return t.expand(shape)


def through_contraction(
    c: Contraction, a: Where | None, b: Where | None, out: Tensor, number: int
) -> Where | None:
    """Positions of a product: the rows' from the left, and, for scores between tokens, the keys' too."""
    if b is not None and b.keys is not None and (a is None or a.keys is None):
        return Where(tuple(_project(t, c.right, c.out, out.shape) for t in b.rows))
    if a is not None and a.keys is not None and b is not None:
        return Where(tuple(_project(t, c.left, c.out, out.shape) for t in a.rows))
    if a is not None and b is not None:
        rows = tuple(_project(t, c.left, c.out, out.shape) for t in a.rows)
        keys = tuple(_project(t, c.right, c.out, out.shape) for t in b.rows)
        return Where(rows, keys, number)
    source, letters = (a, c.left) if a is not None else (b, c.right)
    return source.map(lambda t: _project(t, letters, c.out, out.shape)) if source is not None else None
