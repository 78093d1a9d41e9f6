"""What the pack offers, as data."""

from __future__ import annotations

from probekit.hookspecs import hookimpl
from probekit.specs import Layout, ModelSpec, Option, Preprocessing, Weights

PROBEKIT_API = 1

_DINO = (
    "Caron, Touvron, Misra, Jégou, Mairal, Bojanowski, Joulin 2021, Emerging Properties in Self-Supervised"
    " Vision Transformers, ICCV 2021, arXiv:2104.14294"
)
_DINOV2 = (
    "Oquab, Darcet, Moutakanni et al. 2024, DINOv2: Learning Robust Visual Features without Supervision,"
    " TMLR, arXiv:2304.07193"
)
_REGISTERS = (
    f"{_DINOV2}; Darcet, Oquab, Mairal, Bojanowski 2024, Vision Transformers Need Registers, ICLR 2024,"
    " arXiv:2309.16588"
)
_LICENCE = "Apache-2.0"
_ADDRESS = "https://dl.fbaipublicfiles.com"
# Both repositories' linear evaluation: Resize(256, bicubic), CenterCrop(224), ImageNet's mean and std.
_PREPROCESSING = Preprocessing(interpolation="bicubic", crop_pct=0.875)
_FIT = "probekit_dino.models:fit"
_NETWORK = Option(
    default="teacher",
    choices=("teacher", "student"),
    help="which of the two networks of a full checkpoint; the backbone-only files hold the teacher",
)

_BACKBONE = Layout(
    name="DINO backbone",
    options={"network": "teacher"},
    ignore=("head.*",),
    convert=_FIT,
    hint="vit-s16, vit-s8, vit-b16 and vit-b8 differ in width and patch; 'dino:v2-...' takes DINOv2's",
)


def _full(network: str, prefix: str) -> Layout:
    return Layout(
        name=f"DINO full checkpoint ({network})",
        options={"network": network},
        container=(network,),
        prefix=f"{prefix}backbone.",
        ignore=(f"{prefix}head.*",),  # the projection head
        convert=_FIT,
        hint=_BACKBONE.hint,
    )


# The student is trained inside DistributedDataParallel, the teacher only where the head has BatchNorm.
_FULL = tuple(_full(network, prefix) for network in ("teacher", "student") for prefix in ("", "module."))

_V2 = Layout(
    name="DINOv2 backbone",
    ignore=("mask_token",),
    convert=_FIT,
    hint="files with '_reg4_' in their name are for the variants that end in '-reg', the others are not",
)
_V2_REGISTERS = _V2.model_copy(
    update={"name": "DINOv2 backbone with registers", "rename": ((r"^register_tokens$", "reg_token"),)}
)


def _dino(size: str, patch: int, **more: bool) -> ModelSpec:
    name = f"dino_{'deitsmall' if size == 's' else 'vitbase'}{patch}_pretrain"
    return ModelSpec(
        name="dino",
        variant=f"vit-{size}{patch}",
        summary=f"DINO ViT-{size.upper()}/{patch}, self-distillation between views of an image",
        target="probekit_dino.models:build",
        options={"network": _NETWORK},
        citation=_DINO,
        objective="CL",
        weights=Weights(
            url=f"{_ADDRESS}/dino/{name}/{name}.pth",
            filename=f"{name}.pth",
            licence=_LICENCE,
            layout=_BACKBONE,
            layouts=_FULL,
        ),
        preprocessing=_PREPROCESSING,
        heads={"s": 6, "b": 12}[size],
        layers=12,
        **more,
    )


def _dinov2(size: str, registers: bool) -> ModelSpec:
    folder = f"dinov2_vit{size}14"
    name = f"{folder}{'_reg4' if registers else ''}_pretrain.pth"
    return ModelSpec(
        name="dino",
        variant=f"v2-{size}14{'-reg' if registers else ''}",
        summary=f"DINOv2 ViT-{size.upper()}/14{' with 4 registers' if registers else ''}, at 224 px",
        target="probekit_dino.models:build",
        citation=_REGISTERS if registers else _DINOV2,
        objective="hybrid",  # DINO between views plus iBOT's masked patches
        weights=Weights(
            url=f"{_ADDRESS}/dinov2/{folder}/{name}",
            filename=name,
            licence=_LICENCE,
            layout=_V2_REGISTERS if registers else _V2,
        ),
        preprocessing=_PREPROCESSING,
        heads={"s": 6, "b": 12, "l": 16}[size],
        layers=24 if size == "l" else 12,
    )


@hookimpl
def probekit_models() -> list[ModelSpec]:
    return [
        _dino("s", 16),
        _dino("s", 8),
        _dino("b", 16, default=True),
        _dino("b", 8),
        *(_dinov2(size, registers) for registers in (False, True) for size in "sbl"),
    ]
