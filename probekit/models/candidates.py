"""Where in somebody's own checkpoint a model's weights lie: under which keys, behind which prefix.

Nothing is guessed in silence: the place is found by the model's own names, and two places that fit
alike (teacher and student, weights and their moving average) are an error that lists them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from probekit.errors import WeightsError

NONE = "none"
"""What users write for the file's own top level, or for no prefix."""

# Where training scripts keep weights, for files in which no name is the model's own.
_USUAL = {
    *("state_dict", "model", "model_state", "model_state_dict", "module", "net", "network", "backbone"),
    *("encoder", "teacher", "student", "state_dict_ema", "model_ema", "ema"),
}
_WRAPPERS = ("module.", "_orig_mod.", "model.")
_DEPTH = 3
_ANCHORS = 12
_RIVAL = 0.9  # of the best place's keys: from here on another place is as good


@dataclass(frozen=True)
class Candidate:
    """One place in a checkpoint.

    container: keys to descend into, in order; () where the weights are the file itself
    prefix:    of the weights' names
    tensors:   the weights, by their names behind the prefix
    outside:   the container's other keys, in full
    found:     how many of the model's `wanted` names are among them
    """

    container: tuple[str, ...]
    prefix: str
    tensors: Mapping[str, Tensor] = field(repr=False)
    outside: tuple[str, ...] = field(repr=False)
    found: int
    wanted: int

    @property
    def where(self) -> str:
        """``'teacher', prefix 'backbone.'``"""
        place = f"'{'/'.join(self.container)}'" if self.container else "the file itself"
        return f"{place}, prefix '{self.prefix}'" if self.prefix else place

    def __str__(self) -> str:
        return f"{self.where} ({self.found} of {self.wanted} keys)"


def candidates(state: Mapping[str, Any], names: Collection[str]) -> list[Candidate]:
    """The places in `state` that hold any of a model's `names`, the fullest first."""
    wanted = set(names)
    deep = sorted(name for name in wanted if name.count(".") >= 2) or sorted(wanted)
    anchors = deep[:: max(len(deep) // _ANCHORS, 1)]
    found = []
    for container, tensors in _containers(state):
        for prefix in _prefixes(tensors, anchors):
            place = _place(container, tensors, prefix, wanted)
            if place.found:
                found.append(place)
    return sorted(found, key=lambda place: -place.found)


def choose(
    state: Mapping[str, Any],
    names: Collection[str],
    *,
    source: str,
    target: str,
    container: str = "",
    prefix: str = "",
) -> Candidate:
    """The one place in a checkpoint where a model's weights lie.

    names:     the model's own
    source:    the file, for messages
    target:    the model's name, to which options can be added, for messages
    container: the place a user asked for, keys joined by "/", `NONE` for the file itself; "": find it
    prefix:    the same for the prefix
    A file in which no name is the model's, but which holds weights in one place only, may be of another
    version of the code: that place is returned with ``found=0``, for the library's own conversion.
    Raises WeightsError where several places fit alike, or none.
    """
    found = candidates(state, names)
    asked = [
        place
        for place in found
        if container in ("", "/".join(place.container) or NONE) and prefix in ("", place.prefix or NONE)
    ]
    if found and not asked:
        raise WeightsError(
            f"'{source}' has no weights of '{target}' in the place asked for: there are {_listed(found)}",
            hint=f"leave the option out, or take one of these: '{target}{_option(found)}@{source}'",
        )
    if not found:
        return _only(state, names, source, target)
    best, *others = asked
    rivals = [place for place in others if place.found >= _RIVAL * best.found]
    if rivals:
        raise WeightsError(
            f"'{source}' holds weights of '{target}' in {len(rivals) + 1} places: {_listed([best, *rivals])}",
            hint=f"say which: '{target}{_option([best, *rivals])}@{source}'",
        )
    return best


def _containers(
    state: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    tensors = {
        key: value for key, value in state.items() if isinstance(key, str) and isinstance(value, Tensor)
    }
    if tensors:
        yield path, tensors
    if len(path) < _DEPTH:
        for key, value in state.items():
            if isinstance(key, str) and isinstance(value, Mapping):
                yield from _containers(value, (*path, key))


def _prefixes(tensors: Collection[str], anchors: Sequence[str]) -> list[str]:
    ends = tuple(f".{anchor}" for anchor in anchors)
    found: dict[str, None] = {}
    for key in tensors:
        if key in anchors:
            found[""] = None
        elif key.endswith(ends):
            found |= {key[: len(key) - len(end) + 1]: None for end in ends if key.endswith(end)}
    return list(found)


def _place(
    container: tuple[str, ...], tensors: Mapping[str, Tensor], prefix: str, wanted: set[str]
) -> Candidate:
    inside = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
    outside = tuple(key for key in tensors if not key.startswith(prefix))
    return Candidate(container, prefix, inside, outside, len(inside.keys() & wanted), len(wanted))


def _only(state: Mapping[str, Any], names: Collection[str], source: str, target: str) -> Candidate:
    places = [(path, tensors) for path, tensors in _containers(state) if not path or path[-1] in _USUAL]
    if len(places) != 1:
        held = ", ".join(f"'{key}'" for key in list(state)[:4]) or "nothing"
        raise WeightsError(
            f"'{source}' holds no weights of '{target}': none of its keys is the model's; it holds {held}",
            hint="the file is of another architecture, or one that a pack reads: `probekit list models`",
        )
    container, tensors = places[0]
    prefix = ""
    while wrapper := next((w for w in _WRAPPERS if all(k.startswith(prefix + w) for k in tensors)), None):
        prefix += wrapper
    return _place(container, tensors, prefix, set(names))


def _listed(places: Sequence[Candidate], count: int = 4) -> str:
    more = f" and {len(places) - count} more" if len(places) > count else ""
    return "; ".join(map(str, places[:count])) + more


def _option(places: Sequence[Candidate]) -> str:
    """The options that tell the first of `places` from the others."""
    first = places[0]
    text = ""
    if any(place.container != first.container for place in places):
        text = f":container={'/'.join(first.container) or NONE}"
    if any(place.container == first.container for place in places[1:]):
        text += f":prefix={first.prefix or NONE}"
    return text or f":container={'/'.join(first.container) or NONE}"
