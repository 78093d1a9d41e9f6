"""`probekit pretrain`, without its command line: from a recipe to a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from probekit.datasets.dataset import Dataset, renumbered
from probekit.errors import DataError, ProbekitError, UsageError
from probekit.plugins.loading import describe
from probekit.specs import Preprocessing
from probekit.store.sealing import remove_temporaries
from probekit.store.writing import RunLock
from probekit.subject import versions
from probekit_train import trained
from probekit_train.alarms import alarms
from probekit_train.backbone import Description
from probekit_train.objectives import Batch
from probekit_train.objectives.hybrid import Hybrid
from probekit_train.objectives.mae import MaskedAutoencoding
from probekit_train.objectives.moco import MomentumContrast
from probekit_train.objectives.simmim import MaskedPixels
from probekit_train.objectives.supervised import Classification
from probekit_train.pictures import Pictures, Share, normalised
from probekit_train.recipe import Pretraining, SupervisedRecipe, Training
from probekit_train.state import State
from probekit_train.training import INTERVAL, Job, Listener, check_batch, means, train
from probekit_train.views import seed_everything

OBJECTIVES: dict[str, Callable[..., nn.Module]] = {
    "moco": MomentumContrast,
    "simmim": MaskedPixels,
    "mae": MaskedAutoencoding,
    "hybrid": Hybrid,
}
MODEL, HALF = "model.safetensors", "model-fp16.safetensors"
_HELD_OUT = 1024


@dataclass(frozen=True)
class Plan:
    """What makes a training's objective and what its checkpoint says besides the recipe.

    base: SHA-256 of the weights that a fine-tuning begins with, "" where they are drawn from the seed
    """

    objective: nn.Module
    architecture: dict[str, Any]
    preprocessing: Preprocessing
    network: nn.Module | None = None
    decoder: dict[str, int] | None = None
    base: str = ""


def pretraining(recipe: Pretraining, dataset: Dataset) -> Plan:
    """The objective over a fresh network, its weights drawn from the recipe's seed. Raises UsageError."""
    classes = class_count(dataset) if isinstance(recipe, SupervisedRecipe) else 0
    description = Description(
        model=recipe.model,
        model_args=recipe.model_args,
        img_size=recipe.img_size,
        positions=recipe.positions,
        local_attention=recipe.local_attention,
        classes=classes,
        pool=getattr(recipe, "pool", "token"),
    )
    training: dict[str, float] = {}
    if recipe.drop_path:
        training["drop_path_rate"] = recipe.drop_path
    if getattr(recipe, "drop_tokens", 0):
        training["patch_drop_rate"] = recipe.drop_tokens
    seed_everything(recipe.seed, 0, 0)
    network = description.build(**training)
    pool = getattr(recipe, "pool", network.global_pool)  # masking doesn't pool
    if network.global_pool != pool:
        raise UsageError(
            f"'{recipe.model}' pools by '{network.global_pool}', not by '{pool}' as the recipe's 'pool' says",
            hint="`--set pool=avg`, or a model with a class token",
        )
    if classes:
        objective: nn.Module = Classification(network, recipe, classes)
    else:
        objective = OBJECTIVES[recipe.objective](network, recipe)
    decoder = None
    if recipe.objective == "mae":
        decoder = {
            "width": recipe.decoder_width,
            "depth": recipe.decoder_depth,
            "heads": recipe.decoder_heads,
        }
    return Plan(
        objective,
        description.model_dump(mode="json"),
        trained.preprocessing_for(recipe.img_size, recipe.crop_pct),
        network if classes else None,
        decoder,
    )


def class_count(dataset: Dataset) -> int:
    """Raises UsageError for a dataset without labels."""
    if dataset.labels is None:
        raise UsageError(
            f"dataset '{dataset.name}' has no labels, and a classifier is trained on them",
            hint="take a folder with one subfolder a class, or another `--objective`",
        )
    if dataset.classes is not None:
        return len(dataset.classes)
    return int(max(dataset.labels)) + 1


def split_of(dataset: Dataset) -> tuple[Dataset, Dataset | None]:
    """The images to train on, and held-out ones where the dataset has a train split of its own."""
    train_split = getattr(dataset, "train", None)
    return (dataset, None) if train_split is None else (train_split, dataset)


def run(
    recipe: Training,
    dataset: Dataset,
    folder: Path,
    accelerator: Accelerator,
    plan: Callable[[Any, Dataset], Plan],
    *,
    workers: int = 0,
    stop_after: float | None = None,
    save_every: float = 5.0,
    half: bool = False,
    decoding: Callable[[int, int], None] = lambda done, total: None,
    listen: Listener = lambda report: None,
) -> tuple[State, dict[str, Any]]:
    """Train, write ``model.safetensors``, and return the state and what the checkpoint says of itself.

    The checkpoint is written also where the schedule isn't finished, with the images seen so far.
    """
    training_split, held_out = split_of(dataset)
    made = plan(recipe, training_split)
    fingerprint = training_split.fingerprint(range(len(training_split)))
    pictures = Pictures(training_split, decoding)
    job = Job(
        recipe,
        pictures,
        made.objective,
        made.preprocessing,
        folder,
        fingerprint,
        network=made.network,
        base=made.base,
        workers=workers,
        stop_after=stop_after,
        save_every=save_every,
    )
    check_batch(job)
    main = accelerator.is_main_process
    with RunLock(folder) if main else nullcontext():
        if main:
            remove_temporaries(folder)
        state = train(job, accelerator, listen)
        return state, _finished(job, made, state, training_split, held_out, accelerator, half)


def _finished(
    job: Job,
    made: Plan,
    state: State,
    trained_on: Dataset,
    held_out: Dataset | None,
    accelerator: Accelerator,
    half: bool,
) -> dict[str, Any]:
    """Write the checkpoint and return what it says of itself.

    It is written before held-out images are measured, and once more with what they lost: the training is
    done, and whatever becomes of these images, its weights are good.
    """
    recipe = job.recipe
    labelled = recipe.objective in ("supervised", "finetune")
    said = {
        "objective": recipe.objective,
        "architecture": made.architecture,
        **({"decoder": made.decoder} if made.decoder else {}),
        "preprocessing": made.preprocessing.model_dump(mode="json"),
        "recipe": recipe.model_dump(mode="json", by_alias=True),
        "dataset": {"name": trained_on.name, "fingerprint": job.fingerprint, "images": len(trained_on)},
        "classes": list(trained_on.classes or ()) if labelled else [],
        "seed": recipe.seed,
        "processes": accelerator.num_processes,
        **({"base": state.base} if state.base else {}),
        "finished": state.step == job.steps,
        "images_seen": state.step * recipe.batch_size,
        "seconds": round(state.seconds, 1),
        "losses": final_losses(state),
        "alarms": alarmed(job, state),
        "held_out": {},
        "versions": dict(versions()),
    }
    main = accelerator.is_main_process
    tensors = made.objective.exported() if main else {}
    if main:
        _write(job.folder, tensors, said, half)
    if held_out is None:
        return said
    try:
        images = comparable(held_out, trained_on) if labelled else held_out
        said["held_out"] = measured(job, images, accelerator)
        if len(images) < len(held_out):
            said["held_out_unknown"] = len(held_out) - len(images)  # of classes it wasn't trained on
    except Exception as error:
        said["not_held_out"] = error.message if isinstance(error, ProbekitError) else describe(error)
    if main:
        _write(job.folder, tensors, said, half)
    return said


def _write(folder: Path, tensors: Mapping[str, Tensor], said: Mapping[str, Any], half: bool) -> None:
    trained.write(folder / MODEL, tensors, said)
    if half:
        trained.write(folder / HALF, tensors, said, half=True)


def final_losses(state: State) -> dict[str, float]:
    """Means of the log's last rows, about the last hundred steps."""
    rows = state.rows[-max(1, 100 // INTERVAL) :]
    skipped = {"step", "images", "seconds", "lr", "images_per_second"}
    names = [name for name in (rows[-1] if rows else {}) if name not in skipped]
    return {name: round(math.fsum(row[name] for row in rows) / len(rows), 6) for name in names}


def alarmed(job: Job, state: State) -> dict[str, int]:
    """The kinds of alarms there were, each with the first step whose averages gave it."""
    found: dict[str, int] = {}
    for row in state.rows:
        step = int(row["step"])
        for kind in alarms(row, job.progress(step - 1), job.negatives):
            found.setdefault(kind, step)
    return found


def comparable(held_out: Dataset, trained_on: Dataset) -> Dataset:
    """The held-out images of classes that were trained on, by the numbers those have there.

    Raises DataError where there are none.
    """
    if held_out.labels is None:
        raise DataError("they have no labels")
    labels = renumbered(held_out, trained_on)
    if trained_on.classes is None:  # numbers alone: those it never saw are no classes of it
        known = set(trained_on.labels)
        labels = {index: number for index, number in labels.items() if number in known}
    elif held_out.classes is not None and list(held_out.classes) == list(trained_on.classes):
        labels = dict(enumerate(held_out.labels))  # also where names differ in capitals alone
    if not labels:
        raise DataError("none is of a class that was trained on")
    return _Chosen(held_out, list(labels), list(labels.values()))


@torch.no_grad()
def measured(job: Job, dataset: Dataset, accelerator: Accelerator) -> dict[str, float]:
    """The losses on at most 1024 held-out images, views and masks fixed by the seed.

    Every process takes its part of each batch, as in training. Raises DataError in all of them where one
    can't read an image.
    """
    processes, rank = accelerator.num_processes, accelerator.process_index
    count = min(_HELD_OUT, len(dataset))
    size = min(job.recipe.batch_size // job.recipe.accumulate, count)
    size -= size % processes
    if not size:
        return {}
    chosen = _Chosen(dataset, [number * len(dataset) // count for number in range(count)])
    recipe = job.recipe.model_copy(update={"batch_size": size, "accumulate": 1})
    share = Share(Pictures(chosen), recipe, job.preprocessing.size[0], rank=rank, processes=processes)
    job.objective.eval()
    sums: dict[str, Tensor] = {}
    for number in range(count // size):
        part = share[number]
        unread = gather_object([str(part)] if isinstance(part, Exception) else [])
        if unread:
            raise DataError(unread[0])
        views, labels = part
        seed_everything(recipe.seed, number, 3, rank)
        batch = Batch(
            [normalised(view, job.preprocessing, accelerator.device) for view in views],
            None if labels is None else labels.to(accelerator.device),
        )
        for name, value in job.objective.losses(batch).items():
            sums[name] = sums.get(name, 0) + value
    job.objective.train()
    return {name: round(value, 6) for name, value in means(sums, count // size, accelerator).items()}


class _Chosen(Dataset):
    """Some images of a dataset, as one of their own. labels: where they aren't the dataset's"""

    def __init__(self, dataset: Dataset, indices: list[int], labels: list[int] | None = None) -> None:
        self.name = dataset.name
        self.ids = [dataset.ids[index] for index in indices]
        if labels is None and dataset.labels is not None:
            labels = [dataset.labels[index] for index in indices]
        self.labels = labels
        self._dataset, self._indices = dataset, indices

    def image(self, index: int) -> Any:
        return self._dataset.image(self._indices[index])


def length(recipe: Training) -> str:
    """Of its schedule, in words."""
    epochs = f"{recipe.epochs:g} epoch{'s' if recipe.epochs != 1 else ''}"
    return epochs if recipe.rounds == 1 else f"{recipe.rounds} rounds of {epochs}"


def summary(said: Mapping[str, Any]) -> str:
    losses = ", ".join(f"{name} {value:.4f}" for name, value in said["losses"].items())
    return f"{said['images_seen']} images in {said['seconds'] / 60:.1f} min; last {losses or 'untrained'}"
