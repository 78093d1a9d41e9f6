"""The state of an unfinished training: one file, replaced whole, to go on from to the same weights."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from probekit.errors import StoreError, UsageError, WeightsError
from probekit.models.weightfile import load
from probekit.names import quoted
from probekit.store.sealing import write_bytes
from probekit_train.reading import make

FORMAT = 1
_ANOTHER = "take another `--out` for another training, or move the folder away to begin anew"
_DAMAGED = "move the file away to begin anew, or give another `--out`"
_KINDS: dict[str, Any] = {
    "recipe": str,
    "fingerprint": str,
    "step": int,
    "seconds": int | float,
    "rows": list,
    "objective": Mapping,
    "optimizer": Mapping,
}


@dataclass
class State:
    """What a training has come to.

    base:    SHA-256 of the weights it began with, "" where that isn't known or they were drawn
    step:    steps done
    seconds: spent so far, over all restarts
    rows:    the log
    """

    recipe: dict[str, Any]
    fingerprint: str
    base: str = ""
    step: int = 0
    seconds: float = 0.0
    rows: list[dict[str, float]] = field(default_factory=list)

    def save(self, path: Path, objective: nn.Module, optimizer: Optimizer) -> None:
        """Atomically, fsynced. Raises StoreError, and what was there before is untouched."""
        buffer = io.BytesIO()
        content = {
            "format": FORMAT,
            "recipe": json.dumps(self.recipe),
            "fingerprint": self.fingerprint,
            "base": self.base,
            "step": self.step,
            "seconds": self.seconds,
            "rows": self.rows,
            "objective": objective.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        torch.save(content, buffer)
        write_bytes(path, buffer.getbuffer())

    @classmethod
    def resume(
        cls, path: Path, expected: State, objective: nn.Module, optimizer: Optimizer, steps: int
    ) -> State:
        """The state in `path`, its weights put into `objective` and `optimizer`.

        A training of fewer rounds is the beginning of one of more.

        steps: of the whole schedule
        Raises UsageError for the state of another recipe, of other images or of other weights to begin with,
        StoreError for a file that is damaged or no state.
        """
        content = _read(path)
        try:
            found = _complete(json.loads(content["recipe"]))
            # more rounds begin with the same ones
            done = min(found.get("rounds", 1), expected.recipe["rounds"])
        except (ValueError, AttributeError, TypeError) as error:
            raise _damaged(path, "its recipe can't be read") from error
        if found != {**expected.recipe, "rounds": done}:
            raise UsageError(
                f"the checkpoint in '{path.parent}' is of another recipe:"
                f" {_difference(found, expected.recipe)}",
                hint=_ANOTHER,
            )
        if content["fingerprint"] != expected.fingerprint:
            raise UsageError(
                f"the checkpoint in '{path.parent}' was trained on other images: the content of"
                f" {quoted(expected.recipe['dataset'])} has changed",
                hint=_ANOTHER,
            )
        base = content.get("base", "")  # older versions of the pack didn't say
        if base and base != expected.base:
            raise UsageError(
                f"the checkpoint in '{path.parent}' began with other weights: the content of"
                f" {quoted(expected.recipe['model'])} has changed",
                hint=_ANOTHER,
            )
        if not 0 <= content["step"] <= steps:
            raise _damaged(path, f"it is at step {content['step']} of {steps}")
        try:
            objective.load_state_dict(content["objective"], strict=True)
            optimizer.load_state_dict(content["optimizer"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"'{path}' is of another version of the pack", hint=_ANOTHER) from error
        if not all(bool(value.isfinite().all()) for value in objective.parameters()):
            raise _damaged(path, "some of its weights are no numbers")
        rows = [dict(row) for row in content["rows"]]
        return cls(expected.recipe, content["fingerprint"], base, content["step"], content["seconds"], rows)


def _read(path: Path) -> Mapping[str, Any]:
    """The parts of a state, each of its kind. Raises StoreError."""
    try:
        content = load(path)
    except WeightsError as error:  # whose way out is about checkpoints to load
        raise StoreError(error.message, hint=_DAMAGED) from error
    if content.get("format") != FORMAT or "objective" not in content:
        raise StoreError(f"'{path}' is no state of a training that this version reads", hint=_DAMAGED)
    for name, kind in _KINDS.items():
        if not isinstance(content.get(name), kind):
            raise _damaged(path, f"its '{name}' is missing or of another kind")
    columns = {"step", "images", "loss"}
    if not all(isinstance(row, Mapping) and columns <= row.keys() for row in content["rows"]):
        raise _damaged(path, "its log can't be read")
    return content


def _damaged(path: Path, reason: str) -> StoreError:
    return StoreError(f"'{path}' is damaged: {reason}", hint=_DAMAGED)


def _complete(recipe: dict[str, Any]) -> dict[str, Any]:
    """With the fields that an older version of the pack didn't have, at their defaults."""
    try:
        return make(recipe).model_dump(mode="json", by_alias=True)
    except UsageError:
        return recipe


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    for key in ("objective", *wanted, *found):
        if found.get(key) != wanted.get(key):
            if isinstance(wanted.get(key), (list, dict)):
                return f"its {quoted(key)} differ"
            return f"its {quoted(key)} is {quoted(found.get(key))}, and here {quoted(wanted.get(key))}"
    return "its fields are in another order"
