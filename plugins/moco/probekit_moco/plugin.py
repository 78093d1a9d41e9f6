"""What the pack offers, as data."""

from __future__ import annotations

from probekit.hookspecs import hookimpl
from probekit.specs import Layout, ModelSpec, Option, Preprocessing, Weights

PROBEKIT_API = 1

_CITATION = (
    "Chen, Xie, He 2021, An Empirical Study of Training Self-Supervised Vision Transformers, ICCV 2021,"
    " arXiv:2104.02057"
)
_LICENCE = "CC BY-NC 4.0, non-commercial use only"
_ENCODER = Option(
    default="base",
    choices=("base", "momentum"),
    help="which of the two encoders in the file: the trained one or its moving average",
)
# The evaluation of the authors' main_lincls.py: Resize(256), torchvision's default bilinear, CenterCrop(224).
_PREPROCESSING = Preprocessing(interpolation="bilinear", crop_pct=0.875)
_FIT = "probekit.models.timm:fit_grid"


def _pretraining(encoder: str) -> Layout:
    other = "momentum" if encoder == "base" else "base"
    return Layout(
        name=f"MoCo v3 pre-training checkpoint ({encoder} encoder)",
        options={"encoder": encoder},
        container=("state_dict",),
        prefix=f"module.{encoder}_encoder.",
        ignore=(
            f"module.{encoder}_encoder.head.*",  # the projector
            f"module.{other}_encoder.*",
            "module.predictor.*",
        ),
        convert=_FIT,
        hint="vit-s16 and vit-b16 are the published sizes; other networks need another pack",
    )


_LINEAR = Layout(
    name="MoCo v3 linear-probe checkpoint",
    options={"encoder": "base"},  # what linear probing freezes is the base encoder
    container=("state_dict",),
    prefix="module.",
    ignore=("module.head.*",),
    convert=_FIT,
)
_BARE = Layout(
    name="bare state dict of a MoCo v3 encoder",
    options={"encoder": "base"},
    container=("state_dict",),
    ignore=("head.*",),
    convert=_FIT,
)


def _weights(size: str) -> Weights:
    name = f"vit-{size}-300ep"
    return Weights(
        url=f"https://dl.fbaipublicfiles.com/moco-v3/{name}/{name}.pth.tar",
        filename=f"moco-v3-{name}.pth.tar",
        licence=_LICENCE,
        layout=_pretraining("base"),
        layouts=(_pretraining("momentum"), _LINEAR, _BARE),
    )


def _spec(variant: str, size: str, summary: str, **more: bool) -> ModelSpec:
    return ModelSpec(
        name="moco",
        variant=variant,
        summary=summary,
        target="probekit_moco.models:build",
        options={"encoder": _ENCODER},
        citation=_CITATION,
        objective="CL",
        weights=_weights(size),
        preprocessing=_PREPROCESSING,
        heads=12,
        layers=12,
        **more,
    )


@hookimpl
def probekit_models() -> list[ModelSpec]:
    return [
        _spec("vit-b16", "b", "MoCo v3 ViT-B/16, 300 epochs, contrastive", default=True),
        _spec("vit-s16", "s", "MoCo v3 ViT-S/16 with 12 heads, 300 epochs, contrastive"),
    ]
