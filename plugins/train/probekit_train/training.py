"""The loop: steps of an objective over a stream of images, saved often, resumed exactly."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from probekit.errors import DataError, UsageError
from probekit.specs import Preprocessing
from probekit_train.alarms import alarms
from probekit_train.objectives import Batch
from probekit_train.pictures import Pictures, Share, normalised, stream
from probekit_train.recipe import Training
from probekit_train.schedule import optimiser, scheduler, steps_of
from probekit_train.state import State
from probekit_train.views import seed_everything

# Losses are fetched, and everything that may end a training is looked at, once in so many steps.
INTERVAL = 10
STATE = "state.pt"


@dataclass
class Report:
    """What a listener hears every few steps.

    row:      the latest averages, a line of the log
    warnings: sentences by their kind
    """

    step: int
    steps: int
    row: dict[str, float]
    warnings: dict[str, str] = field(default_factory=dict)


Listener = Callable[[Report], None]


@dataclass
class Job:
    """A training to be done.

    preprocessing: size (square) and normalisation of the images
    network:       what layer decay looks at
    base:          SHA-256 of the weights it begins with, "" for drawn ones
    stop_after:    minutes after which this call ends, whatever is left
    save_every:    minutes between checkpoints
    """

    recipe: Training
    pictures: Pictures
    objective: nn.Module
    preprocessing: Preprocessing
    folder: Path
    fingerprint: str
    network: nn.Module | None = None
    base: str = ""
    workers: int = 0
    stop_after: float | None = None
    save_every: float = 5.0

    @property
    def round_steps(self) -> int:
        """Steps of one round."""
        return steps_of(self.recipe, len(self.pictures))

    @property
    def steps(self) -> int:
        return self.recipe.rounds * self.round_steps

    @property
    def negatives(self) -> int:
        """Keys that InfoNCE compares each query with, its own included."""
        return self.recipe.batch_size // self.recipe.accumulate

    def progress(self, step: int) -> float:
        """Share of its round that was done before step `step` (from 0)."""
        return step % self.round_steps / self.round_steps


def processes(recipe: Training, cpu: bool) -> Accelerator:
    """accelerate's view of this process. Raises UsageError for a batch that doesn't divide.

    cpu: leave accelerators alone
    """
    accelerator = Accelerator(
        mixed_precision="bf16" if recipe.precision == "bf16" else "no",
        cpu=cpu,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    parts = accelerator.num_processes * recipe.accumulate
    if recipe.batch_size % parts:
        raise UsageError(
            f"a batch of {recipe.batch_size} images doesn't divide into {parts} parts, one a process and"
            " accumulation",
            hint=f"`--set batch_size={math.ceil(recipe.batch_size / parts) * parts}`",
        )
    if recipe.objective in ("moco", "hybrid") and recipe.batch_size // recipe.accumulate < 2:
        raise UsageError(
            "InfoNCE tells an image from the others of its batch, and a batch of 1 has no others",
            hint="`--set batch_size=128`",
        )
    if (getattr(recipe, "mixup", 0) or getattr(recipe, "cutmix", 0)) and recipe.batch_size // parts % 2:
        raise UsageError(
            f"mixup and cutmix pair the images of a batch, and {recipe.batch_size // parts} can't be paired",
            hint="an even batch on each process, or `--set mixup=0 --set cutmix=0`",
        )
    if recipe.batch_size // parts < 2:
        raise UsageError(
            f"a batch of {recipe.batch_size} images leaves 1 to each process, too few for batch norms",
            hint=f"`--set batch_size={2 * parts}` or more",
        )
    return accelerator


def check_batch(job: Job) -> None:
    """Raises UsageError for a batch of more images than there are."""
    if job.recipe.batch_size > len(job.pictures):
        raise UsageError(
            f"a batch of {job.recipe.batch_size} images is more than the {len(job.pictures)} there are",
            hint=f"`--set batch_size={max(2, len(job.pictures) // 2)}`",
        )


def train(job: Job, accelerator: Accelerator, listen: Listener = lambda report: None) -> State:
    """Do what is left of a training, or `stop_after` minutes of it, and return its state, which is saved.

    The state of an earlier call in the folder is resumed. Equal seeds give equal weights on one machine
    with one number of threads, however often it was interrupted: the images, views and masks of a step are
    functions of the seed and the step. Raises UsageError, DataError (a loss that isn't finite, an image
    that can't be read) and StoreError (a full disk).
    """
    recipe, path = job.recipe, job.folder / STATE
    job.objective.to(accelerator.device)
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        job.objective = nn.SyncBatchNorm.convert_sync_batchnorm(job.objective)
    optimizer = optimiser(recipe, job.objective, job.network)
    state = State(recipe.model_dump(mode="json", by_alias=True), job.fingerprint, job.base)
    if path.exists():
        state = State.resume(path, state, job.objective, optimizer, job.steps)
    rates = scheduler(recipe, optimizer, len(job.pictures))
    module = accelerator.prepare_model(job.objective)
    module.train()
    parts = _parts(job, state.step, accelerator)
    began, saved, spent = time.monotonic(), time.monotonic(), state.seconds
    sums: dict[str, Tensor] = {}
    since, counted = time.monotonic(), 0
    while state.step < job.steps:
        progress = job.progress(state.step)
        rates.step_update(state.step % job.round_steps)
        job.objective.begin_step(progress)
        for values in _step(module, parts, optimizer, job, state.step, accelerator):
            for name, value in values.items():
                sums[name] = sums.get(name, 0) + value.detach()
        state.step, counted = state.step + 1, counted + 1
        if state.step % INTERVAL and state.step < job.steps:
            continue
        count = counted * recipe.accumulate
        row = means(sums, count, accelerator)
        _check(row, state.step, path)
        now = time.monotonic()
        state.seconds = spent + now - began
        row = {
            "step": state.step,
            "images": state.step * recipe.batch_size,
            "seconds": round(state.seconds, 2),
            "lr": max(group["lr"] for group in optimizer.param_groups),
            "images_per_second": counted * recipe.batch_size / max(now - since, 1e-9),
            **row,
        }
        state.rows.append(row)
        warnings = alarms(row, progress, job.negatives)
        listen(Report(state.step, job.steps, row, warnings))
        sums, since, counted = {}, now, 0
        ended = job.stop_after is not None and now - began > 60 * job.stop_after
        ended = _agreed(ended, accelerator)
        if ended or state.step == job.steps or now - saved > 60 * job.save_every:
            if accelerator.is_main_process:
                state.save(path, job.objective, optimizer)
            saved = now
        if ended:
            break
    if not job.steps and accelerator.is_main_process:  # so that no other recipe overwrites its model unasked
        state.save(path, job.objective, optimizer)
    accelerator.wait_for_everyone()
    return state


def _parts(job: Job, step: int, accelerator: Accelerator) -> Iterator[tuple[list[Tensor], Tensor | None]]:
    share = Share(
        job.pictures,
        job.recipe,
        job.preprocessing.size[0],
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
    )
    numbers = range(step * job.recipe.accumulate, job.steps * job.recipe.accumulate)
    return stream(share, numbers, job.workers)


def _step(
    module: nn.Module, parts: Iterator[Any], optimizer: Any, job: Job, step: int, accelerator: Accelerator
) -> Iterator[dict[str, Tensor]]:
    """One step of the optimiser, yielding what each of its parts lost."""
    accumulate = job.recipe.accumulate
    for number in range(accumulate):
        views, labels = next(parts)
        batch = Batch(
            [normalised(view, job.preprocessing, accelerator.device) for view in views],
            None if labels is None else labels.to(accelerator.device),
        )
        # after the images, whose views draw from the same generators where this process makes them
        seed_everything(job.recipe.seed, step * accumulate + number, 2, accelerator.process_index)
        last = number == accumulate - 1
        with nullcontext() if last else accelerator.no_sync(module):
            values = module(batch)
            accelerator.backward(values["loss"] / accumulate)
        yield values
    if job.recipe.clip:
        nn.utils.clip_grad_norm_(job.objective.parameters(), job.recipe.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def means(sums: dict[str, Tensor], count: int, accelerator: Accelerator) -> dict[str, float]:
    """Of sums over `count` steps, and over processes; fetched at once."""
    if not sums:
        return {}
    values = torch.stack([value.float() for value in sums.values()]) / count
    if accelerator.num_processes > 1:
        values = accelerator.reduce(values, "mean")
    return dict(zip(sums, values.tolist(), strict=True))


def _check(row: dict[str, float], step: int, path: Path) -> None:
    if math.isfinite(row.get("loss", 0.0)):
        return
    before = f"; '{path}' is from before" if path.exists() else ""
    raise DataError(
        f"the loss is not a number any more at step {step}{before}",
        hint="a smaller `--set lr=...` or a longer `--set warmup_epochs=...`, with another `--out`",
    )


def _agreed(ended: bool, accelerator: Accelerator) -> bool:
    """The first process's word, so that all stop at one step."""
    if accelerator.num_processes == 1:
        return ended
    flag = torch.tensor(float(ended and accelerator.is_main_process), device=accelerator.device)
    return bool(accelerator.reduce(flag, "sum").item() > 0)
