"""Where does each token come from? Positions in the image, followed through the model's own operations.

Every tensor that descends from the image carries a `Where`: for each of its elements, the image it
belongs to and the (row, column) in input pixels of the centre of what it was computed from. Reshapes,
permutations, rolls, paddings, gathers and concatenations are replayed on the positions; a convolution
moves them by its stride; a linear map averages over what it mixes (patch merging). So windows, cyclic
shifts, shuffles, prefix tokens, real strides and pooled keys need no per-model code: they are read off.

Marks: a token that stands for no place (CLS, registers: it comes from a parameter) has NaN for all three.
Padding belongs to no image: its image number is +inf, its place is where the grid would go on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PAD = math.inf

_REARRANGE = """view reshape permute transpose flatten unflatten contiguous unbind chunk split
split_with_sizes tensor_split __getitem__ squeeze unsqueeze expand expand_as roll narrow select movedim
moveaxis swapaxes swapdims t repeat repeat_interleave tile broadcast_to view_as reshape_as flip gather
index_select take_along_dim unfold rot90 hsplit vsplit dsplit diagonal adjoint pixel_shuffle
pixel_unshuffle channel_shuffle"""
REARRANGE = frozenset(_REARRANGE.split())
CHOOSE = frozenset({"__getitem__", "gather", "index_select", "take_along_dim"})
JOIN = frozenset({"cat", "concat", "concatenate", "stack", "hstack", "vstack"})
REDUCE = frozenset({"mean", "sum", "amax", "max", "amin", "min", "adaptive_avg_pool2d"})
POOL = frozenset({"avg_pool2d", "max_pool2d", "_max_pool2d", "max_pool2d_with_indices"})


@dataclass(frozen=True)
class Where:
    """Positions of every element of one tensor.

    rows:   (image, y, x), each shaped like the tensor (mostly stride-0 views)
    keys:   for a map of scores between tokens, the same of the token attended to; `rows` is the query's
    scores: the number of the call that made those scores
    turned: the scores were made as k q^T
    """

    rows: tuple[Tensor, Tensor, Tensor]
    keys: tuple[Tensor, Tensor, Tensor] | None = None
    scores: int | None = None
    turned: bool = False

    def map(self, change: Callable[[Tensor], Tensor]) -> Where:
        keys = tuple(change(t) for t in self.keys) if self.keys else None
        return replace(self, rows=tuple(change(t) for t in self.rows), keys=keys)

    @property
    def shape(self) -> torch.Size:
        return self.rows[0].shape


def of_image(images: Tensor) -> Where:
    """Positions of the pixels of a batch of images (B, C, H, W): pixel centres."""
    n, _, height, width = images.shape
    device = images.device
    image = torch.arange(n, dtype=torch.float32, device=device).view(n, 1, 1, 1)
    y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5).view(1, 1, height, 1)
    x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5).view(1, 1, 1, width)
    return Where(tuple(t.expand(images.shape) for t in (image, y, x)))


def collapse(t: Tensor, dim: int) -> Tensor:
    """Positions along `dim` become one: their common value, else their mean (patch merging).

    What is padding doesn't count, unless all is.
    """
    if t.size(dim) == 1 or t.stride(dim) == 0:
        return t.select(dim, 0)
    first = t.select(dim, 0)
    same = (t == first.unsqueeze(dim)) | (t.isnan() & first.isnan().unsqueeze(dim))
    if bool(same.all()):
        return first
    padding = t.isposinf()
    mean = t.masked_fill(padding, 0).sum(dim) / (~padding).sum(dim)
    mean = torch.where(padding.all(dim), PAD, mean)
    return torch.round(mean * 1024) / 1024


def nowhere(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The positions of a tensor that has none, such as learned queries: no place at all."""
    return (torch.full((), math.nan, device=t.device).expand(t.shape),) * 3


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
    if isinstance(padding, str):
        padding = (dy * (ky - 1) / 2, dx * (kx - 1) / 2) if padding == "same" else 0
    py, px = _pair(padding or 0)
    image, y, x = (t.select(1, 0) for t in where.rows)
    lines = _lines(y, x)
    if lines is not None:
        down, across, turned = lines
        down = _axis(down, out.size(-2), ky, sy, py, dy)
        across = _axis(across, out.size(-1), kx, sx, px, dx)
        lines = (down, across, turned) if down is not None and across is not None else None
    if lines is not None:
        found = _on_grid(image, lines, out.shape)
        alone = _beside_padding(image, out.shape, ((ky, kx), (sy, sx), (py, px), (dy, dx)))
        if alone is None:
            return found
        number, y, x = found.rows
        return Where((torch.where(alone, PAD, number[:, :1]).expand(out.shape), y, x))
    if out.shape[-2:] == where.shape[-2:] and (sy, sx) == (1, 1):  # not a grid, but each stays in its place
        return Where(tuple(t.unsqueeze(1).expand(out.shape) for t in (image, y, x)))
    return None


def _lines(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor, bool] | None:
    """Centres down and across a map of places (B, h, w), and whether it is a transposed image's.

    (B, h) rows' y and (B, w) columns' x; the other way round where y runs across the map. None where the
    places aren't a grid: each of its rows has one y, each column one x.
    """
    height, width = y.shape[1:]
    for turned, (a, b) in ((False, (y, x)), (True, (x, y))):
        if _constant(a, 2) and _constant(b, 1):
            return a[:, :, width // 2], b[:, height // 2, :], turned
    return None


def _constant(t: Tensor, dim: int) -> bool:
    """Whether places are the same all along `dim`, as far as they are known."""
    if t.size(dim) == 1 or t.stride(dim) == 0:
        return True
    unknown = ~t.isfinite()
    spread = t.masked_fill(unknown, -math.inf).amax(dim) - t.masked_fill(unknown, math.inf).amin(dim)
    return bool(spread.amax() < 0.02)


def _on_grid(image: Tensor, lines: tuple[Tensor, Tensor, bool], shape: torch.Size) -> Where:
    """Positions of (B, C, h, w) maps from the centres of `_lines`."""
    down, across = lines[0][:, None, :, None], lines[1][:, None, None, :]
    places = (across, down) if lines[2] else (down, across)
    return Where(tuple(t.expand(shape) for t in (_number(image), *places)))


def _number(image: Tensor) -> Tensor:
    """Each map's image number, whatever part of it is padding. (B, h, w) -> (B, 1, 1, 1)"""
    return image.amin((1, 2)).view(-1, 1, 1, 1)


def _beside_padding(image: Tensor, shape: torch.Size, window: tuple[Any, ...]) -> Tensor | None:
    """Which places of (B, 1, h, w) come from padding alone; None where there is no padding, or in doubt."""
    padding = image.isposinf()
    if not bool(padding.any()):
        return None
    try:
        real = F.max_pool2d((~padding).float().unsqueeze(1), *window)
    except (RuntimeError, TypeError):
        return None
    return real == 0 if real.shape[-2:] == shape[-2:] else None


def _pair(value: Any) -> tuple[Any, Any]:
    return (value, value) if not isinstance(value, (tuple, list)) else (value[0], value[-1])


def through_call(
    name: str,
    func: Callable,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    out: Any,
    lookup: Callable,
    tracked: Callable,
) -> Any:
    """Positions of what any other call returned: a `Where`, a tuple of them for several outputs, or None.

    `lookup(tensor)` gives the `Where` of an input, `tracked(tensor)` whether it descends from the image at
    all. None means the trail is lost here.
    """
    first = args[0] if args else None
    if name in JOIN:
        return _join(func, first, args, kwargs, lookup, tracked)
    where = lookup(first) if isinstance(first, Tensor) else None
    if where is not None and func is F.unfold:
        return _unfolded(where, *args[1:], **kwargs)
    if where is not None and (name in REARRANGE or name == "__get__"):
        if name in CHOOSE and any(tracked(t) for t in tensors_in((*args[1:], *kwargs.values()))):
            return None  # chosen by what is in the image (token pruning): another image has other places
        return _replay(func, where, args, kwargs)
    if where is not None and name == "pad":
        mode = args[2] if len(args) > 2 else kwargs.get("mode", "constant")
        amounts = args[1] if len(args) > 1 else kwargs["pad"]
        return (
            where.map(lambda t: F.pad(t, amounts, mode=mode))
            if mode != "constant"
            else _padded(where, amounts)
        )
    if where is not None and name == "conv1d":
        t = where.map(lambda t: t.select(1, 0).unsqueeze(1))
        return t.map(lambda t: t.expand(out.shape)) if out.size(-1) == where.shape[-1] else None
    if where is not None and where.keys is not None and name == "conv2d":  # heads are mixed
        if out.shape[-2:] != where.shape[-2:]:
            return None
        return where.map(lambda t: t.narrow(1, 0, 1).expand(out.shape))
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


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Every tensor in nested lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


def _padded(where: Where, amounts: Sequence[int]) -> Where:
    """Positions after padding with a constant: the grid goes on, but in no image."""
    sides = [(len(where.shape) - 1 - i // 2, amounts[i], amounts[i + 1]) for i in range(0, len(amounts), 2)]

    def go_on(t: Tensor) -> Tensor:
        for axis, before, after in sides:
            if not before and not after:
                continue
            n = t.size(axis)
            small = t[tuple(slice(0, 1) if t.stride(a) == 0 else slice(None) for a in range(t.dim()))]
            small = small.expand([n if a == axis else small.size(a) for a in range(t.dim())]).movedim(
                axis, -1
            )
            found = _regular(small)
            if found is None:
                pad = [0, 0] * (t.dim() - 1 - axis) + [before, after]
                t = F.pad(t, pad, value=PAD)
                continue
            place = torch.arange(-before, n + after, device=t.device, dtype=t.dtype)
            longer = (found[0] + found[1] * place).movedim(-1, axis)
            t = longer.expand([n + before + after if a == axis else t.size(a) for a in range(t.dim())])
        return t

    def change(channels: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        image, y, x = channels
        return F.pad(image, list(amounts), value=PAD), go_on(y), go_on(x)

    return replace(where, rows=change(where.rows), keys=change(where.keys) if where.keys else None)


def _unfolded(
    where: Where, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1
) -> Where | None:
    """Positions behind F.unfold of (B, C, h, w), whose own padding would be the place (0, 0)."""
    if len(where.shape) != 4:
        return None
    py, px = _pair(padding)
    if py or px:
        where = _padded(where, (px, px, py, py))
    return where.map(lambda t: F.unfold(t, kernel_size, dilation, 0, stride))


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
    func: Callable,
    tensors: Any,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    lookup: Callable,
    tracked: Callable,
) -> Where | None:
    if tensors is None:
        tensors, args = kwargs["tensors"], (None,)
        kwargs = {k: v for k, v in kwargs.items() if k != "tensors"}
    found = [lookup(t) for t in tensors]
    known = next((w for w in found if w is not None), None)
    if known is None or any(w is None and tracked(t) for w, t in zip(found, tensors, strict=True)):
        return None

    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    dim = dim % tensors[0].dim() if func.__name__.startswith("c") else None

    def channel(pick: Callable[[Where], Tensor]) -> Tensor:
        blank = [torch.full((), math.nan, device=pick(known).device).expand(t.shape) for t in tensors]
        parts = [pick(w) if w is not None else b for w, b in zip(found, blank, strict=True)]
        if dim is None:
            return func(parts, *args[1:], **kwargs)
        flat = [a for a in range(parts[0].dim()) if a != dim and all(t.stride(a) == 0 for t in parts)]
        shape = [n if a in flat else -1 for a, n in enumerate(parts[0].shape)]
        for axis in flat:  # what is the same all along an axis stays a view
            parts = [t.narrow(axis, 0, 1) for t in parts]
        return torch.cat(parts, dim).expand(shape)

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
    keep = bool(args[2] if len(args) > 2 else kwargs.get("keepdim"))
    axes = sorted(
        (d % len(where.shape) for d in (dims if isinstance(dims, (tuple, list)) else (dims,))), reverse=True
    )

    def mean(t: Tensor) -> Tensor:
        for axis in axes:
            t = collapse(t, axis)
        for axis in reversed(axes if keep else ()):
            t = t.unsqueeze(axis)
        return t

    return where.map(mean)


def _resampled(where: Where, out: Tensor) -> Where | None:
    """Positions behind an interpolation of (B, C, h, w): pixel areas are rescaled."""
    image, y, x = (t.select(1, 0) for t in where.rows)
    lines = _lines(y, x)
    if lines is None:
        return None
    axes = []
    for centres, size in zip(lines[:2], out.shape[-2:], strict=True):
        found = _regular(centres)
        if found is None:
            return None
        ratio = centres.size(-1) / size
        axes.append(found[0] + found[1] * ((torch.arange(size, device=out.device) + 0.5) * ratio - 0.5))
    return _on_grid(image, (*axes, lines[2]), out.shape)


def _assigned(args: Sequence[Any], where: Where | None, lookup: Callable) -> Where | None:
    """Positions of a tensor after ``tensor[index] = value``: its own and, where written to, the value's."""
    target, index, value = args
    source = lookup(value) if isinstance(value, Tensor) else None
    if source is None:
        return where
    if where is None:
        where = Where(nowhere(target), nowhere(target) if source.keys else None, source.scores, source.turned)

    def write(t: Tensor, written: Tensor) -> Tensor:
        t = t.clone(memory_format=torch.contiguous_format)
        t[index] = written
        return t

    def both(target: Sequence[Tensor], written: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(write(t, w) for t, w in zip(target, written, strict=True))

    keys = both(where.keys, source.keys) if where.keys and source.keys else None
    return replace(where, rows=both(where.rows, source.rows), keys=keys)


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
