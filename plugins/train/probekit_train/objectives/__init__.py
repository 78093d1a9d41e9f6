"""Objectives: each a module with `losses(batch)` over a backbone. Any class of this shape can be trained."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass
class Batch:
    """views: normalised images, each (B, 3, rows, cols); labels: (B,) int64, or None"""

    views: list[Tensor]
    labels: Tensor | None = None


class Objective(Protocol):
    """What `probekit_train.training.train` asks of a module besides being one."""

    def losses(self, batch: Batch) -> Mapping[str, Tensor]:
        """Scalars: "loss", which is minimised, and whatever else is worth a column of the log."""

    def begin_step(self, progress: float) -> None:
        """Called before every step of the optimiser, with the share of the schedule done, 0 to 1."""

    def exported(self) -> Mapping[str, Tensor]:
        """The tensors of the finished checkpoint, by their published names."""

    def no_weight_decay(self) -> Collection[str]:
        """Names of parameters besides biases and norms that aren't decayed."""


def spread(features: Tensor) -> Tensor:
    """How much features (B, C) differ between images: 1 where directions are even, 0 where all are one.

    Mean standard deviation of the channels of unit vectors, times the root of their number (Chen and He
    2021, section 4.1).
    """
    unit = functional.normalize(features.detach().float(), dim=1)
    return unit.std(dim=0, unbiased=False).mean() * unit.shape[1] ** 0.5


def undecayed(module: nn.Module) -> set[str]:
    """Position embeddings and tokens by their full names."""
    kinds = ("pos_embed", "cls_token", "reg_token", "mask_token")
    return {name for name, _ in module.named_parameters() if name.rpartition(".")[2] in kinds}


@torch.no_grad()
def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's state, copied to the CPU."""
    return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}
