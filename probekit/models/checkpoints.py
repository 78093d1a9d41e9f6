"""Checkpoints into modules, with every key accounted for.

Nothing is loaded with ``strict=False``: a key that finds no place, and a weight that stays at its
initial value, are errors, because both give a network that runs and is wrong.
"""

from __future__ import annotations

import fnmatch
import importlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from probekit.errors import PluginError, WeightsError
from probekit.models.sincos import sincos_positions
from probekit.models.weightfile import load
from probekit.specs import Layout


@dataclass(frozen=True)
class Accounting:
    """Where each key of a checkpoint went.

    used:    keys of the file whose tensors are in the module now, by their full names
    ignored: keys of the file on the layout's ignore list
    layout:  the name of the layout, "" where it has none
    note:    what a reader of the numbers should know besides
    """

    used: tuple[str, ...]
    ignored: tuple[str, ...]
    layout: str = ""
    note: str = ""

    def __str__(self) -> str:
        named = f"{self.layout}: " if self.layout else ""
        note = f"; {self.note}" if self.note else ""
        return f"{named}{len(self.used)} keys used, {len(self.ignored)} ignored{note}"


def read(path: str | Path, container: Sequence[str] = ()) -> dict[str, Tensor]:
    """The tensors of a checkpoint, under the keys of `container`. Raises WeightsError, as `load` does."""
    return _tensors(_descend(load(path), container, str(path)), str(path))


# Where training scripts keep the weights, in timm's own order: averaged weights before plain ones.
_CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model")


def own_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint somebody trained with a library of theirs, for that library's loader.

    Found under the usual containers, without the prefixes of DistributedDataParallel and
    torch.compile, and finite. Raises WeightsError, as `load` does.
    """
    state = load(path)
    container = next((key for key in _CONTAINERS if isinstance(state.get(key), Mapping)), None)
    tensors = _tensors(state[container] if container else state, str(path))
    tensors = {re.sub(r"^((module|_orig_mod)\.)+", "", key): value for key, value in tensors.items()}
    for key, tensor in tensors.items():
        check_finite(key, tensor, str(path))
    return tensors


def choose(module: nn.Module, state: Mapping[str, Any], layouts: Sequence[Layout]) -> Layout:
    """The layout under which most keys find a place in `module`; the first of equals.

    Only a choice of what to try: `adopt` then has to account for every key.
    """
    return max(layouts, key=lambda layout: landing(module, state, layout))


def landing(module: nn.Module, state: Mapping[str, Any], layout: Layout) -> int:
    """How many keys of `state` have a place in `module` under `layout`, shapes and `convert` apart."""
    try:
        tensors = _tensors(_descend(state, layout.container, ""), "")
    except WeightsError:
        return 0
    kept, _, _ = _strip(tensors, layout)
    return len(kept.keys() & module.state_dict().keys())


def adopt(module: nn.Module, state: Mapping[str, Any], layout: Layout, *, source: str) -> Accounting:
    """Load `state` into `module`, in place, accounting for every key.

    Every tensor of the file is used or on the layout's ignore list, and every parameter and
    persistent buffer of the module comes from the file, in its shape and finite, as float32 where the
    module is float32; otherwise WeightsError, and the module is as it was. `source` names the file in
    messages.
    """
    tensors = _tensors(_descend(state, layout.container, source), source)
    kept, origin, ignored = _strip(tensors, layout)
    outside = [
        key for key in tensors if layout.prefix and not key.startswith(layout.prefix) and key not in ignored
    ]
    if not kept:
        wanted = f"whose name starts with '{layout.prefix}'" if layout.prefix else "for the model"
        raise WeightsError(
            f"'{source}' holds no weights {wanted}: its keys are {_names(tensors)}",
            hint=layout.hint or _expectation(module),
        )
    clashes = [key for key, sources in origin.items() if len(sources) > 1]
    if clashes:
        raise WeightsError(f"'{source}' has several keys for one place in the model: {_names(clashes)}")
    if layout.convert:
        kept = _convert(layout.convert, kept, module, source)
    _check_fit(module, kept, outside, layout, source)
    check_heads(module, kept, source)
    expected = module.state_dict()
    state_dict = {}
    for key, tensor in kept.items():
        tensor = tensor.detach().to(expected[key].dtype)
        check_finite(key, tensor, source)
        state_dict[key] = tensor
    module.load_state_dict(state_dict, strict=True)
    used = tuple(key for key in tensors if key not in ignored)
    return Accounting(used=used, ignored=tuple(key for key in tensors if key in ignored), layout=layout.name)


def check_heads(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Refuse a MoCo v3 ViT-S in a module of another head count, which no name or shape gives away.

    MoCo's 384 channels are 12 heads, everybody else's are 6. Its position embedding tells it: fixed
    sines and cosines, rows first, with a class token of zeros, in the file as they were generated.
    Raises WeightsError.
    """
    positions = state.get("pos_embed")
    if positions is None or positions.dim() != 3 or positions.shape[-1] != 384:
        return
    side = round((positions.shape[1] - 1) ** 0.5)
    if positions.shape[1] != 1 + side * side:
        return
    expected = sincos_positions((side, side), 384)
    heads = {part.num_heads for part in module.modules() if isinstance(getattr(part, "num_heads", None), int)}
    if heads - {12} and torch.allclose(positions.float().cpu(), expected, atol=2e-3):
        count = min(heads - {12})
        raise WeightsError(
            f"'{source}' is a MoCo v3 ViT-S, whose 384 channels are 12 heads; this model has {count}",
            hint=f"take 'moco:vit-s16@{source}'",
        )


def _descend(state: Mapping[str, Any], container: Sequence[str], source: str) -> Mapping[str, Any]:
    for depth, key in enumerate(container):
        inside = state.get(key)
        if isinstance(inside, Mapping):
            state = inside
        elif depth == 0 and state and all(isinstance(value, Tensor) for value in state.values()):
            return state  # a bare state dict, as our own hint about unsafe files tells users to save
        else:
            raise WeightsError(
                f"'{source}' has no '{'/'.join(container[: depth + 1])}': it holds {_names(state)}",
                hint="is this the model's checkpoint, and not the optimizer's or another tool's?",
            )
    return state


def _tensors(state: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    tensors = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise WeightsError(
            f"'{source}' holds no tensors at its top level, only {_names(state)}",
            hint="save the state dict alone, or use the model pack this file was made for",
        )
    return tensors


def _strip(
    tensors: Mapping[str, Tensor], layout: Layout
) -> tuple[dict[str, Tensor], dict[str, list[str]], set[str]]:
    """Tensors by their names in the module; the file's keys behind each name; the ignored keys."""
    ignore = [re.compile(fnmatch.translate(pattern)) for pattern in layout.ignore]
    rename = [(re.compile(pattern), replacement) for pattern, replacement in layout.rename]
    kept: dict[str, Tensor] = {}
    origin: dict[str, list[str]] = {}
    ignored: set[str] = set()
    for key, tensor in tensors.items():
        if any(pattern.match(key) for pattern in ignore):
            ignored.add(key)
        elif key.startswith(layout.prefix):
            name = key[len(layout.prefix) :]
            for pattern, replacement in rename:
                name = pattern.sub(replacement, name)
            kept[name] = tensor
            origin.setdefault(name, []).append(key)
    return kept, origin, ignored


def _convert(target: str, kept: dict[str, Tensor], module: nn.Module, source: str) -> dict[str, Tensor]:
    name, _, attribute = target.partition(":")
    try:
        function = getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError) as error:
        raise PluginError(f"the conversion '{target}' can't be imported: {error}") from error
    try:
        return dict(function(kept, module))
    except WeightsError as error:  # what the file is instead; the sentence begins with its name
        raise WeightsError(f"'{source}' {error.message}", hint=error.hint) from error
    except Exception as error:
        raise WeightsError(
            f"'{source}' can't be converted for this model: {type(error).__name__}: {error}",
            hint=_expectation(module),
        ) from error


SPARE_KEYS = "the model's weights are all there: save the file without these keys"
"""The hint where a file holds more than the model, and nothing is missing."""


def _check_fit(
    module: nn.Module, kept: Mapping[str, Tensor], outside: Sequence[str], layout: Layout, source: str
) -> None:
    expected = module.state_dict()
    missing = [f"'{key}' {_shape(value)}" for key, value in expected.items() if key not in kept]
    unexpected = [f"'{key}' {_shape(value)}" for key, value in kept.items() if key not in expected]
    unexpected += [f"'{key}'" for key in outside]
    shapes = [
        f"'{key}' {_shape(kept[key])} where the model has {_shape(value)}"
        for key, value in expected.items()
        if key in kept and kept[key].shape != value.shape
    ]
    problems = [
        f"{len(found)} {label} ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''})"
        for label, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if found
    ]
    if problems:
        kind = f" as a {layout.name}" if layout.name else ""
        raise WeightsError(
            f"'{source}' doesn't fit the model{kind}: keys {'; '.join(problems)}",
            hint=layout.hint
            or (
                "the file is of another architecture, variant or training stage; check the name"
                if missing or shapes
                else SPARE_KEYS
            ),
        )


def _expectation(module: nn.Module) -> str:
    return f"the model's own keys are {_names(module.state_dict())}"


def check_finite(key: str, tensor: Tensor, source: str) -> None:
    """Raises WeightsError for NaN or infinite weights. `key` and `source` are for the message."""
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise WeightsError(
            f"'{source}' holds NaN or infinite weights, the first in '{key}'",
            hint="the training had diverged or the file is damaged; use another checkpoint",
        )


def _shape(tensor: Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))})"


def _names(keys: Iterable[str], count: int = 4) -> str:
    """The first few names, quoted, and how many more there are."""
    keys = [str(key) for key in keys]
    more = f" and {len(keys) - count} more" if len(keys) > count else ""
    return (", ".join(f"'{key[:80]}'" for key in keys[:count]) or "nothing") + more
