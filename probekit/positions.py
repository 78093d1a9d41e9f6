"""Where does each token come from? Positions in the image, followed through the model's own operations.

Every tensor that descends from the image carries a `Where`: for each of its elements, the image it
belongs to and the (row, column) in input pixels of the centre of what it was computed from. Reshapes,
permutations, rolls, paddings, gathers and concatenations are replayed on the positions; a convolution
moves them by its stride; a linear map averages over what it mixes (patch merging). So windows, cyclic
shifts, shuffles, prefix tokens, real strides and pooled keys need no per-model code: they are read off.

Marks: NaN is a token that stands for no place (CLS, registers: it comes from a parameter), +inf is padding.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PAD = math.inf

REARRANGE = frozenset(
    """view reshape permute transpose flatten unflatten contiguous unbind chunk split split_with_sizes
    tensor_split __getitem__ squeeze unsqueeze expand expand_as roll narrow select movedim moveaxis swapaxes
    swapdims t repeat repeat_interleave tile broadcast_to view_as reshape_as flip gather index_select
    take_along_dim unfold rot90 hsplit vsplit dsplit diagonal adjoint""".split()
)
JOIN = frozenset({"cat", "concat", "concatenate", "stack", "hstack", "vstack"})
CONTRACT = frozenset({"matmul", "__matmul__", "__rmatmul__", "bmm", "mm", "baddbmm", "einsum", "linear"})
REDUCE = frozenset({"mean", "sum", "amax", "max", "amin", "min", "adaptive_avg_pool2d"})
POOL = frozenset({"avg_pool2d", "max_pool2d", "_max_pool2d", "max_pool2d_with_indices"})


@dataclass(frozen=True)
class Where:
    """Positions of every element of one tensor.

    rows:   (image, y, x), each shaped like the tensor (mostly stride-0 views)
    keys:   for a map of scores between tokens, the same of the token attended to; `rows` is the query's
    scores: the number of the call that made those scores
    """

    rows: tuple[Tensor, Tensor, Tensor]
    keys: tuple[Tensor, Tensor, Tensor] | None = None
    scores: int | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Where:
        keys = tuple(change(t) for t in self.keys) if self.keys else None
        return replace(self, rows=tuple(change(t) for t in self.rows), keys=keys)

    @property
    def shape(self) -> torch.Size:
        return self.rows[0].shape


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


def of_image(images: Tensor) -> Where:
    """Positions of the pixels of a batch of images (B, C, H, W): pixel centres."""
    n, _, height, width = images.shape
    device = images.device
    image = torch.arange(n, dtype=torch.float32, device=device).view(n, 1, 1, 1)
    y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5).view(1, 1, height, 1)
    x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5).view(1, 1, 1, width)
    return Where(tuple(t.expand(images.shape) for t in (image, y, x)))


def contraction(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Contraction | None:
    """The einsum form of a matrix product, or None where the call isn't a product of two tensors."""
    if name == "einsum":
        operands = args[1:] if len(args) > 2 else args[1]
        if not isinstance(args[0], str) or len(operands) != 2:
            return None
        a, b = operands
        left, right, out = _subscripts(args[0], a.dim(), b.dim())
        return Contraction(left, right, out, a, b)
    if name == "linear":
        a, b = args[0], args[1] if len(args) > 1 else kwargs["weight"]
        lead = string.ascii_letters[: a.dim() - 1]
        return Contraction(lead + "Z", "YZ", lead + "Y", a, b)
    a, b = args[-2:] if name == "baddbmm" else args[:2] if len(args) > 1 else (args[0], kwargs.get("mat2"))
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


def collapse(t: Tensor, dim: int) -> Tensor:
    """Positions along `dim` become one: their common value, else their mean (patch merging)."""
    if t.size(dim) == 1 or t.stride(dim) == 0:
        return t.select(dim, 0)
    first = t.select(dim, 0)
    same = (t == first.unsqueeze(dim)) | (t.isnan() & first.isnan().unsqueeze(dim))
    if bool(same.all()):
        return first
    return torch.round(t.mean(dim) * 1024) / 1024


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


def _regular(centres: Tensor) -> tuple[Tensor, Tensor] | None:
    """First centre and step of evenly spaced positions (.., n); padding at the ends is part of the row.

    None where they aren't regular.
    """
    n = centres.size(-1)
    place = torch.arange(n, device=centres.device, dtype=centres.dtype)
    inside = torch.nonzero(centres.isfinite().flatten(0, -2).all(0)).flatten()
    if not len(inside):
        return None
    a, b = int(inside[0]), int(inside[-1])
    step = (centres[..., b : b + 1] - centres[..., a : a + 1]) / max(b - a, 1)
    first = centres[..., a : a + 1] - a * step
    even = (centres - (first + step * place))[..., inside].abs().amax() < 0.02
    return (first, step) if bool(even) else None


def _axis(centres: Tensor, out: int, kernel: int, stride: int, pad: int, dilation: int) -> Tensor | None:
    """Centres of a sliding window along the last axis (.., n) -> (.., out); None where it isn't regular."""
    found = _regular(centres)
    if found is None:
        return None
    index = torch.arange(out, device=centres.device) * stride - pad + dilation * (kernel - 1) / 2
    return found[0] + found[1] * index


def through_sliding_window(
    where: Where, out: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any
) -> Where | None:
    """Positions behind a 2-D convolution or pooling of (B, C, h, w), from the arithmetic of its window."""
    (ky, kx), (sy, sx), (dy, dx) = (_pair(v) for v in (kernel, stride, dilation))
    py, px = (dy * (ky - 1) / 2, dx * (kx - 1) / 2) if padding == "same" else _pair(padding or 0)
    image, y, x = (t.select(1, 0) for t in where.rows)
    ys = _axis(y[:, :, 0], out.size(-2), ky, sy, py, dy)
    xs = _axis(x[:, 0, :], out.size(-1), kx, sx, px, dx)
    if ys is None or xs is None:
        return where if out.shape == where.shape else None
    shape = out.shape
    return Where(
        (
            _inner(image).expand(shape),
            ys.view(shape[0], 1, shape[2], 1).expand(shape),
            xs.view(shape[0], 1, 1, shape[3]).expand(shape),
        )
    )


def _inner(image: Tensor) -> Tensor:
    """Each map's image number, read off its middle: its borders may be padding. (B, h, w) -> (B, 1, 1, 1)"""
    h, w = image.shape[1] // 2, image.shape[2] // 2
    return image[:, h : h + 1, w : w + 1].unsqueeze(1)


def _pair(value: Any) -> tuple[Any, Any]:
    return (value, value) if not isinstance(value, (tuple, list)) else (value[0], value[-1])


def through_call(
    name: str, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], out: Any, lookup: Callable
) -> Any:
    """Positions of what any other call returned: a `Where`, a tuple of them for several outputs, or None.

    `lookup(tensor)` gives the `Where` of an input. None means the trail is lost here.
    """
    first = args[0] if args else None
    if name in JOIN:
        return _join(func, first, args, kwargs, lookup)
    where = lookup(first) if isinstance(first, Tensor) else None
    if where is not None and (name in REARRANGE or name == "__get__"):
        return _replay(func, where, args, kwargs)
    if where is not None and name == "pad":
        mode = args[2] if len(args) > 2 else kwargs.get("mode", "constant")
        if mode != "constant":
            return where.map(lambda t: F.pad(t, args[1], mode=mode))
        return where.map(lambda t: F.pad(t, args[1] if len(args) > 1 else kwargs["pad"], value=PAD))
    if where is not None and name in ("conv2d", *POOL) and len(where.shape) == 4:
        return through_sliding_window(
            where, out if isinstance(out, Tensor) else out[0], *_window(name, args, kwargs)
        )
    if where is not None and name in REDUCE:
        return _average(where, name, args, kwargs, out)
    if where is not None and name == "interpolate" and len(where.shape) == 4:
        return _resampled(where, out)
    if name == "__setitem__":
        return _assigned(args, where, lookup)
    if isinstance(out, Tensor):
        return _same_shape(args, kwargs, out, lookup)
    return None


def _window(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
    if name == "conv2d":
        get = (
            dict(zip(("input", "weight", "bias", "stride", "padding", "dilation"), args, strict=False))
            | kwargs
        )
        return get["weight"].shape[-2:], get.get("stride", 1), get.get("padding", 0), get.get("dilation", 1)
    get = dict(zip(("input", "kernel_size", "stride", "padding"), args, strict=False)) | kwargs
    stride = get.get("stride") or get["kernel_size"]
    return get["kernel_size"], stride, get.get("padding", 0), 1


def _replay(func: Callable, where: Where, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if getattr(func, "__name__", "") == "view":
        func = torch.Tensor.reshape  # positions are stride-0 views, which `view` may refuse
    channels = (*where.rows, *(where.keys or ()))
    parts = [func(t, *args[1:], **kwargs) for t in channels]
    if isinstance(parts[0], Tensor):
        return _pack(where, parts)
    if isinstance(parts[0], (tuple, list)):
        return tuple(_pack(where, column) for column in zip(*parts, strict=True))
    return None


def _pack(where: Where, channels: Sequence[Tensor]) -> Where:
    return replace(where, rows=tuple(channels[:3]), keys=tuple(channels[3:]) if where.keys else None)


def _join(
    func: Callable, tensors: Any, args: Sequence[Any], kwargs: dict[str, Any], lookup: Callable
) -> Where | None:
    if tensors is None:
        tensors, args = kwargs["tensors"], (None,)
        kwargs = {k: v for k, v in kwargs.items() if k != "tensors"}
    found = [lookup(t) for t in tensors]
    known = next((w for w in found if w is not None), None)
    if known is None:
        return None

    def channel(pick: Callable[[Where], Tensor]) -> Tensor:
        blank = [torch.full((), math.nan, device=pick(known).device).expand(t.shape) for t in tensors]
        return func(
            [pick(w) if w is not None else b for w, b in zip(found, blank, strict=True)], *args[1:], **kwargs
        )

    rows = tuple(channel(lambda w, i=i: w.rows[i]) for i in range(3))
    if known.keys is None or any(w is not None and w.keys is None for w in found):
        return Where(rows)
    return Where(rows, tuple(channel(lambda w, i=i: w.keys[i]) for i in range(3)), known.scores)


def _average(where: Where, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Where | None:
    out = out if isinstance(out, Tensor) else out[0]
    if name == "adaptive_avg_pool2d":
        return where.map(lambda t: F.adaptive_avg_pool2d(t.contiguous(), out.shape[-2:]))
    dims = args[1] if len(args) > 1 else kwargs.get("dim")
    if dims is None or isinstance(dims, Tensor):
        return None
    keep = (args[2] if len(args) > 2 else kwargs.get("keepdim")) or False
    return where.map(lambda t: t.mean(dims, keepdim=keep))


def _resampled(where: Where, out: Tensor) -> Where | None:
    """Positions behind an interpolation of (B, C, h, w): pixel areas are rescaled."""
    image, y, x = (t.select(1, 0) for t in where.rows)
    axes = []
    for centres, size in ((y[:, :, 0], out.size(-2)), (x[:, 0, :], out.size(-1))):
        found = _regular(centres)
        if found is None:
            return None
        ratio = centres.size(-1) / size
        axes.append(found[0] + found[1] * ((torch.arange(size, device=out.device) + 0.5) * ratio - 0.5))
    ys, xs = axes
    b, _, h, w = out.shape
    return Where(tuple(t.expand(out.shape) for t in (_inner(image), ys.view(b, 1, h, 1), xs.view(b, 1, 1, w))))


def _assigned(args: Sequence[Any], where: Where | None, lookup: Callable) -> Where | None:
    """Positions of a tensor after ``tensor[index] = value``: its own, or those of what is written into it."""
    target, index, value = args
    if where is not None:
        return where
    source = lookup(value) if isinstance(value, Tensor) else None
    if source is None:
        return None

    def write(t: Tensor) -> Tensor:
        blank = torch.full(target.shape, math.nan, device=t.device)
        blank[index] = t
        return blank

    return source.map(write)


def _same_shape(args: Sequence[Any], kwargs: dict[str, Any], out: Tensor, lookup: Callable) -> Where | None:
    """An elementwise call, or a norm: the positions of the operand that has the result's shape."""
    smaller = None
    for value in (*args, *kwargs.values()):
        where = lookup(value) if isinstance(value, Tensor) else None
        if where is None:
            continue
        if where.shape == out.shape:
            return where
        smaller = smaller or where
    if smaller is None:
        return None
    try:
        return smaller.map(lambda t: t.expand(out.shape))
    except RuntimeError:
        return None
