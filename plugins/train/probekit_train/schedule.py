"""Optimiser and learning rate along the steps: timm's, as a recipe says."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from probekit.errors import UsageError
from probekit_train.recipe import Training


def steps_of(recipe: Training, images: int) -> int:
    """Steps of one round of the schedule: epochs x images / batch, at least one where epochs > 0."""
    return max(1, round(recipe.epochs * images / recipe.batch_size)) if recipe.epochs else 0


def optimiser(recipe: Training, objective: nn.Module, network: nn.Module | None = None) -> Optimizer:
    """network: what layer decay counts the blocks of; where it is 1, none is needed."""
    if recipe.layer_decay != 1:
        if network is None or not hasattr(network, "group_matcher"):
            raise UsageError("layer decay is for a network of timm with its classifier, not for pre-training")
        groups: Iterable[Any] = param_groups_layer_decay(
            network,
            recipe.weight_decay,
            no_weight_decay_list=network.no_weight_decay() if hasattr(network, "no_weight_decay") else (),
            layer_decay=recipe.layer_decay,
        )
    else:
        keep = objective.no_weight_decay()
        groups = param_groups_weight_decay(objective, recipe.weight_decay, no_weight_decay_list=keep)
    groups = [group for group in groups if group["params"]]
    momentum = {"betas": recipe.betas} if recipe.optimizer in ("adamw", "lamb") else {}
    return create_optimizer_v2(
        groups, opt=recipe.optimizer, lr=recipe.lr, weight_decay=recipe.weight_decay, **momentum
    )


def scheduler(recipe: Training, optimizer: Optimizer, images: int) -> Scheduler:
    """A function of the step alone: nothing of it needs to be saved."""
    total = max(1, steps_of(recipe, images))
    warmup = min(total, round(recipe.warmup_epochs * images / recipe.batch_size))
    made, _ = create_scheduler_v2(
        optimizer,
        sched=recipe.schedule,
        num_epochs=total,
        warmup_epochs=warmup,
        warmup_lr=recipe.lr / max(1, warmup),
        min_lr=0.0,
        decay_milestones=[round(share * total) for share in recipe.milestones],
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    return made
