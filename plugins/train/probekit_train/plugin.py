"""What the pack offers, as data."""

from __future__ import annotations

from probekit.hookspecs import hookimpl
from probekit.specs import CommandSpec, ModelSpec, Objective, miniature

PROBEKIT_API = 1

_KINDS: dict[str, Objective] = {
    "moco": "CL",
    "simmim": "MIM",
    "mae": "MIM",
    "hybrid": "hybrid",
    "supervised": "supervised",
}


@hookimpl
def probekit_commands() -> list[CommandSpec]:
    return [
        CommandSpec(
            name="pretrain",
            summary="train a ViT with MoCo v3, SimMIM, MAE, both at once or labels",
            target="probekit_train.commands:pretrain_app",
        ),
        CommandSpec(
            name="finetune",
            summary="train a model's classifier, with or without the model itself",
            target="probekit_train.commands:finetune_app",
        ),
    ]


@hookimpl
def probekit_models() -> list[ModelSpec]:
    target = "probekit_train.trained:build"
    anything = ModelSpec(
        name="trained",
        summary="a checkpoint of `probekit pretrain` or `finetune`, as its own metadata describes it",
        target=target,
        loads_weights=True,
        default=True,
    )
    return [
        anything,
        miniature(
            "hybrid",
            "SimMIM and MoCo v3 at once, lambda 0.2",
            bundled="probekit_train:miniature-hybrid.safetensors",
            objective="hybrid",
            citation="Park, Kim, Heo, Kim, Yun 2023, What Do Self-Supervised Vision Transformers Learn?, ICLR"
            " 2023, arXiv:2305.00729",
        ),
        miniature(
            "untrained",
            "nothing",
            bundled="probekit_train:miniature-untrained.safetensors",
            objective="untrained",
            summary="where all bundled miniatures began: the same network before any training",
        ),
        *(
            ModelSpec(
                name="trained",
                variant=objective,
                summary=f"a checkpoint of `probekit pretrain` with objective {objective}",
                target=target,
                objective=kind,
                loads_weights=True,
            )
            for objective, kind in _KINDS.items()
        ),
    ]
