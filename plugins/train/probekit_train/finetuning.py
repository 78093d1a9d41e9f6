"""`probekit finetune`, without its command line: another model's weights, a new classifier, labels."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from timm.layers import DropPath
from torch import nn

from probekit.datasets.dataset import Dataset
from probekit.errors import UsageError
from probekit.models.model import Model, load_model, seeded
from probekit.names import parse_model, quoted
from probekit_train import trained
from probekit_train.backbone import Description
from probekit_train.local_attention import restrict
from probekit_train.objectives.mae import Autoencoder
from probekit_train.objectives.supervised import Classification
from probekit_train.pretraining import Plan, class_count
from probekit_train.recipe import FinetuneRecipe
from probekit_train.trained import Tuned, classify
from probekit_train.views import seed_everything


def finetuning(recipe: FinetuneRecipe, dataset: Dataset, catalog: Any) -> Plan:
    """A classifier of the dataset's labels over the recipe's model. Raises UsageError, WeightsError."""
    classes = class_count(dataset)
    reference = parse_model(recipe.model)
    if reference.is_file or reference.is_module:
        raise UsageError(
            f"{quoted(recipe.model)} is no pack's model: nothing could build its network again for the"
            " checkpoint",
            hint="name it in a pack of your own (`probekit plugins new`), or take another model",
        )
    size = None if recipe.img_size is None else (recipe.img_size, recipe.img_size)
    model = load_model(recipe.model, catalog, seed=recipe.seed, image_size=size)
    preprocessing = model.preprocessing
    if preprocessing is None or preprocessing.size[0] != preprocessing.size[1]:
        raise UsageError(f"'{recipe.model}' doesn't take square images", hint="give a square `img_size`")
    side = preprocessing.size[0]
    network = model.module.encoder if isinstance(model.module, Autoencoder) else model.module
    fresh = None
    if recipe.reinit_first or recipe.reinit_last:
        fresh = _untrained(recipe, model, size, catalog)
        reinitialise(network, fresh, recipe.reinit_first, recipe.reinit_last)
    seed_everything(recipe.seed, 0, 0)
    classify(network, classes, recipe.pool)
    if recipe.drop_path:
        set_drop_path(network, recipe.drop_path)
    if recipe.local_attention is not None:
        restrict(network, recipe.local_attention)
    return Plan(
        Classification(network, recipe, classes),
        _architecture(recipe, side, classes),
        preprocessing,
        network,
        base="" if model.weights.kind == "random" else model.weights.sha256,
    )


def _architecture(recipe: FinetuneRecipe, side: int, classes: int) -> dict[str, Any]:
    """What the checkpoint says of its network: a pre-training's own description, or a pack's reference."""
    changes = {"img_size": side, "classes": classes, "pool": recipe.pool}
    if recipe.local_attention is not None:
        changes["local_attention"] = recipe.local_attention
    reference = parse_model(recipe.model)
    if reference.name == "trained":
        said = trained.about(Path(reference.weights or ""))["architecture"]
        if "reference" in said:
            return asdict(replace(Tuned(**said), **changes))
        return Description.model_validate({**said, **changes}).model_dump(mode="json")
    return asdict(Tuned(str(replace(reference, weights=None)), **changes))


def _untrained(recipe: FinetuneRecipe, model: Model, size: tuple[int, int] | None, catalog: Any) -> nn.Module:
    """The same network with weights drawn anew, by its builder's own initialisation."""
    reference = parse_model(recipe.model)
    if reference.name != "trained":
        random = replace(reference, weights="random")
        return load_model(random, catalog, seed=recipe.seed, image_size=size).module
    path = Path(reference.weights or "")
    with seeded(recipe.seed):
        module = trained.rebuild(trained.about(path), path).module
    return module.encoder if isinstance(module, Autoencoder) else module


def reinitialise(network: nn.Module, fresh: nn.Module, first: int, last: int) -> None:
    """Put `fresh`'s first and last blocks in place of the network's (Park et al. 2023, Fig. F.3).

    Raises UsageError for a network without a list of blocks, or with too few.
    """
    blocks = getattr(network, "blocks", None)
    if blocks is None:
        raise UsageError(f"a {type(network).__name__} has no list of blocks to begin anew")
    depth = len(blocks)
    if first + last > depth:
        raise UsageError(
            f"{first} first and {last} last blocks can't begin anew where there are {depth}",
            hint=f"together at most {depth}",
        )
    for number in (*range(first), *range(depth - last, depth)):
        blocks[number].load_state_dict(fresh.blocks[number].state_dict())


def set_drop_path(network: nn.Module, rate: float) -> None:
    """Stochastic depth from 0 at the first block to `rate` at the last, as timm's constructors set it."""
    blocks = [part for part in network.modules() if hasattr(part, "drop_path1")]
    if not blocks:
        raise UsageError(f"a {type(network).__name__} has no stochastic depth", hint="`--set drop_path=0`")
    for number, block in enumerate(blocks):
        share = rate * number / max(1, len(blocks) - 1)
        for name in ("drop_path1", "drop_path2"):
            if hasattr(block, name):
                setattr(block, name, DropPath(share) if share else nn.Identity())
