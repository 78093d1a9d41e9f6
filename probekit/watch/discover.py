"""The plan pass: one forward of two images, in which a model shows where its attention is.

A `TorchFunctionMode` sees every torch call. Each result that descends from the image gets a node (who are
its ancestors), and a `Where` (`probekit.watch.positions`: which token each element belongs to). From these
follow, with no knowledge of any architecture:

- attention: a fused call, or a product whose one factor is a row-stochastic map of token-to-token scores,
  however its softmax was spelled;
- tokens before and after it: the addition in which one operand descends from the attention and the other
  is an ancestor of its queries; and after that, in the same way, tokens after the MLP;
- windows, shifts, prefix tokens, strides, pooled keys: from the positions of queries and keys.

The run (probekit.watch.observe) then goes by the ordinal of each call and asserts that shapes are as planned.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from probekit.watch.lineage import Discovery
from probekit.watch.record import Record

_ATTENTION = re.compile(r"att(entio)?n", re.IGNORECASE)
_PARTS = (nn.Dropout, nn.Identity, nn.Linear, nn.LayerNorm, nn.Softmax)


def discover(module: nn.Module, run: Callable[[Tensor], Any], images: Tensor) -> Record:
    """Forward two images and record what was seen. The module is left as it was, also after an error."""
    mode = Discovery(images)
    ran: dict[str, nn.Module] = {}
    with ExitStack() as stack:
        stack.enter_context(_names(module, mode, ran))
        stack.enter_context(torch.no_grad())
        with mode:
            output = run(images)
    found = list(tensors_of(output))
    record = mode.finish(found)
    record.output = output
    if found and not any(mode.tracked(t) for t in found):
        record.cut.append("")
    spoke = [c.path for c in record.calls] + record.unnormalised
    record.silent = [path for path, m in ran.items() if _is_attention(m) and not _spoke(path, m, spoke)]
    return record


def _is_attention(module: nn.Module) -> bool:
    named = _ATTENTION.search(type(module).__name__) and not isinstance(module, _PARTS)
    return bool(named) and any(True for _ in module.parameters())


def _spoke(path: str, module: nn.Module, spoke: Sequence[str]) -> bool:
    """Whether attention was seen in a module, in a part of it, or in what it is a part of."""
    inside = f"{path}." if path else ""
    return any(p == path or p.startswith(inside) or path.startswith(f"{p}.") for p in spoke)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Every tensor of a model's output, whatever it is wrapped in."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from (t for v in value.values() for t in tensors_of(v))
    elif isinstance(value, (list, tuple)):
        yield from (t for v in value for t in tensors_of(v))
    elif hasattr(value, "__dataclass_fields__"):
        yield from (t for n in value.__dataclass_fields__ for t in tensors_of(getattr(value, n)))


@contextmanager
def _names(module: nn.Module, mode: Discovery, ran: dict[str, nn.Module]) -> Iterator[None]:
    """Tells `mode` which modules run."""
    handles = []

    def entering(name: str, m: nn.Module) -> Callable:
        def hook(*_: Any) -> None:  # a value returned here would replace the module's input
            mode.enter(name)
            ran.setdefault(name, m)

        return hook

    def leaving(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        path = mode.leave()
        shapes = {t.shape for t in tensors_of((args, kwargs)) if mode.tracked(t)}
        lost = [t for t in tensors_of(out) if t.shape in shapes and not mode.tracked(t)]
        if lost and not any(mode.tracked(t) for t in tensors_of(out)):
            mode.record.cut.append(path)

    try:
        for name, m in module.named_modules():
            if isinstance(m, (nn.Softmax, nn.Dropout, nn.Identity)):
                continue
            path = ".".join(p for p in name.split(".") if p != "_orig_mod")
            handles.append(m.register_forward_pre_hook(entering(path, m)))
            handles.append(m.register_forward_hook(leaving, with_kwargs=True, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
