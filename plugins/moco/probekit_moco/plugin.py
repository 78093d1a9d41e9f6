"""What the pack offers, as data."""

from __future__ import annotations

from probekit.hookspecs import hookimpl
from probekit.specs import Layout, ModelSpec, Option, Preprocessing, Weights, miniature

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
_HINT = "the variants are vit-ti16, vit-s16, vit-b16, vit-l16, conv-s and conv-b; ResNets have no attention"


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
        hint=_HINT,
    )


_LINEAR = Layout(
    name="MoCo v3 linear-probe checkpoint",
    options={"encoder": "base"},  # what linear probing freezes is the base encoder
    container=("state_dict",),
    prefix="module.",
    ignore=("module.head.*",),
    convert=_FIT,
    hint=_HINT,
)
_BARE = Layout(
    name="bare state dict of a MoCo v3 encoder",
    options={"encoder": "base"},
    container=("state_dict",),
    ignore=("head.*",),
    convert=_FIT,
    hint=_HINT,
)


def _weights(published: str | None) -> Weights:
    """The layouts of all variants; with a name, of the file the authors published."""
    layouts = {"layout": _pretraining("base"), "layouts": (_pretraining("momentum"), _LINEAR, _BARE)}
    if published is None:
        return Weights(**layouts)
    return Weights(
        url=f"https://dl.fbaipublicfiles.com/moco-v3/{published}/{published}.pth.tar",
        filename=f"moco-v3-{published}.pth.tar",
        licence=_LICENCE,
        **layouts,
    )


def _spec(
    variant: str,
    heads: int,
    layers: int,
    summary: str,
    *,
    published: str | None = None,
) -> ModelSpec:
    return ModelSpec(
        name="moco",
        variant=variant,
        summary=f"MoCo v3 {summary}",
        target="probekit_moco.models:build",
        options={"encoder": _ENCODER},
        citation=_CITATION,
        objective="CL",
        weights=_weights(published),
        preprocessing=_PREPROCESSING,
        heads=heads,
        layers=layers,
    )


@hookimpl
def probekit_models() -> list[ModelSpec]:
    own = "for pre-trainings of your own (none published)"
    return [
        miniature(
            "moco",
            "MoCo v3",
            bundled="probekit_moco:miniature.safetensors",
            objective="CL",
            citation=_CITATION,
            published_as="vit-b16",
        ),
        _spec("vit-b16", 12, 12, "ViT-B/16, 300 epochs", published="vit-b-300ep"),
        _spec("vit-s16", 12, 12, "ViT-S/16 with 12 heads, 300 epochs", published="vit-s-300ep"),
        _spec("vit-ti16", 3, 12, f"ViT-Ti/16, {own}"),
        _spec("vit-l16", 16, 24, f"ViT-L/16, {own}"),
        _spec("conv-s", 12, 11, f"ViT-S with a convolutional stem, {own}"),
        _spec("conv-b", 12, 11, f"ViT-B with a convolutional stem, {own}"),
    ]
