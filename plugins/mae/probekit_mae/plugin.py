"""What the pack offers, as data."""

from __future__ import annotations

from probekit.hookspecs import hookimpl
from probekit.specs import Layout, ModelSpec, Option, Preprocessing, Weights, miniature

PROBEKIT_API = 1

_CITATION = (
    "He, Chen, Xie, Li, Dollár, Girshick 2022, Masked Autoencoders Are Scalable Vision Learners, CVPR 2022,"
    " arXiv:2111.06377"
)
_LICENCE = "CC BY-NC 4.0, non-commercial use only"
_SITE = "https://dl.fbaipublicfiles.com/mae"
# The evaluation of the authors' util/datasets.py: Resize(256, bicubic), CenterCrop(224).
_PREPROCESSING = Preprocessing(interpolation="bicubic", crop_pct=0.875)
_MASKING = {
    "mask_ratio": Option(default=0.0, help="share of patches hidden from the encoder; trained at 0.75"),
    "seed": Option(default=0, help="which patches are hidden, the same of every image"),
}


def _layout(name: str) -> Layout:
    return Layout(
        name=name,
        container=("model",),
        convert="probekit_mae.models:fit",
        hint="vit-b16, vit-l16 and vit-h14 are the published sizes; check the variant's name",
    )


def _spec(
    variant: str, summary: str, file: str, layout: str, layers: int, heads: int | None, **more: object
) -> ModelSpec:
    given = {"objective": "MIM", "target": "probekit_mae.models:build", **more}
    return ModelSpec(
        name="mae",
        variant=variant,
        summary=summary,
        citation=_CITATION,
        weights=Weights(
            url=f"{_SITE}/{file}",
            filename=file.rpartition("/")[2],
            licence=_LICENCE,
            layout=_layout(layout),
        ),
        preprocessing=_PREPROCESSING,
        layers=layers,
        heads=heads,
        **given,
    )


def _family(variant: str, file: str, title: str, layers: int, heads: int) -> list[ModelSpec]:
    """One size: the encoder alone, with its decoder, with the decoder of the demonstration, fine-tuned."""
    full = {"target": "probekit_mae.models:build_full", "options": _MASKING}
    both = heads if heads == 16 else None  # the decoder's heads are 16 in every size
    return [
        _spec(
            variant,
            f"MAE {title}, the encoder alone, 1600 epochs, masked image modelling",
            f"pretrain/mae_pretrain_{file}.pth",
            "MAE encoder-only file",
            layers,
            heads,
        ),
        _spec(
            f"{variant}-full",
            f"MAE {title}, encoder and decoder, trained on normalised pixels",
            f"pretrain/mae_pretrain_{file}_full.pth",
            "MAE file with decoder",
            layers + 8,
            both,
            **full,
        ),
        _spec(
            f"{variant}-visualize",
            f"MAE {title}, encoder and decoder, trained on plain pixels, of the authors' demonstration",
            f"visualize/mae_visualize_{file}.pth",
            "MAE file with decoder",
            layers + 8,
            both,
            **full,
        ),
        _spec(
            f"{variant}-ft",
            f"MAE {title}, the encoder fine-tuned as a classifier of ImageNet-1k",
            f"finetune/mae_finetuned_{file}.pth",
            "MAE fine-tuned classifier",
            layers,
            heads,
            objective="supervised",
        ),
    ]


@hookimpl
def probekit_models() -> list[ModelSpec]:
    return [
        miniature(
            "mae",
            "MAE",
            bundled="probekit_mae:miniature.safetensors",
            objective="MIM",
            citation=_CITATION,
            published_as="vit-b16-full",
            convert="probekit_mae.models:fit",
            summary="bundled miniature of MAE with its decoder (12 + 2 layers, 1.5 M), trained on shapetex",
            target="probekit_mae.models:build_miniature",
            options=_MASKING,
            heads=None,
        ),
        *_family("vit-b16", "vit_base", "ViT-B/16", 12, 12),
        *_family("vit-l16", "vit_large", "ViT-L/16", 24, 16),
        *_family("vit-h14", "vit_huge", "ViT-H/14", 32, 16),
    ]
