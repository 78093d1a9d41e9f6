"""The state of an unfinished training: one file, replaced whole, to go on from to the same weights."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from probekit.errors import StoreError, UsageError
from probekit.models.weightfile import load
from probekit.names import quoted
from probekit.store.sealing import write_bytes
from probekit_train.reading import make

FORMAT = 1
_ANOTHER = "take another `--out` for another training, or move the folder away to begin anew"


@dataclass
class State:
    """step: steps done; seconds: spent so far, over all restarts; rows: the log"""

    recipe: dict[str, Any]
    fingerprint: str
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
            "step": self.step,
            "seconds": self.seconds,
            "rows": self.rows,
            "objective": objective.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        torch.save(content, buffer)
        write_bytes(path, buffer.getbuffer())

    @classmethod
    def resume(cls, path: Path, expected: State, objective: nn.Module, optimizer: Optimizer) -> State:
        """The state in `path`, its weights put into `objective` and `optimizer`.

        A training of fewer rounds is the beginning of one of more.
        Raises UsageError for the state of another recipe or of other images, StoreError for a file that is
        no state, WeightsError for a damaged one.
        """
        content = load(path)
        if content.get("format") != FORMAT or "objective" not in content:
            raise StoreError(f"'{path}' is no state of a training that this version reads", hint=_ANOTHER)
        found = _complete(json.loads(content["recipe"]))
        done = min(found.get("rounds", 1), expected.recipe["rounds"])  # more rounds begin with the same ones
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
        try:
            objective.load_state_dict(content["objective"], strict=True)
            optimizer.load_state_dict(content["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise StoreError(f"'{path}' is of another version of the pack", hint=_ANOTHER) from error
        rows = [dict(row) for row in content["rows"]]
        return cls(expected.recipe, content["fingerprint"], content["step"], content["seconds"], rows)


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
