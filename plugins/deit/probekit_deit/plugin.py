"""What the pack offers, as data."""

from __future__ import annotations

from probekit.hookspecs import hookimpl
from probekit.specs import Layout, ModelSpec, Preprocessing, Weights, miniature

PROBEKIT_API = 1

_DEIT = (
    "Touvron, Cord, Douze, Massa, Sablayrolles, Jégou 2021, Training Data-efficient Image Transformers &"
    " Distillation through Attention, ICML 2021, arXiv:2012.12877"
)
_DEIT3 = "Touvron, Cord, Jégou 2022, DeiT III: Revenge of the ViT, ECCV 2022, arXiv:2204.07118"
_AUGREG = (
    "Steiner, Kolesnikov, Zhai, Wightman, Uszkoreit, Beyer 2022, How to Train Your ViT? Data, Augmentation,"
    " and Regularization in Vision Transformers, TMLR, arXiv:2106.10270"
)
_LICENCE = "Apache-2.0"
_ADDRESS = "https://dl.fbaipublicfiles.com/deit"
_FIT = "probekit.models.timm:fit_grid"
_SIZES = {"ti": ("tiny", 3, 12), "s": ("small", 6, 12), "b": ("base", 12, 12), "l": ("large", 16, 24)}
# The ends of the published names: the first digits of the files' SHA-256.
_ENDINGS = {
    "ti": ("a1311bcf", "b40b3cf7"),
    "s": ("cd65a155", "649709d9"),
    "b": ("b5f2ef4d", "df68dfff"),
}

_PLAIN = Layout(
    name="DeiT checkpoint",
    container=("model",),
    convert=_FIT,
    hint="distilled files have 'dist_token' and are for the '-distilled' variants, DeiT III's for 'v3-...';"
    " a network fine-tuned on other classes is 'timm:deit_..._patch16_224@PATH'",
)
_THIRD = _PLAIN.model_copy(
    update={"name": "DeiT III checkpoint", "rename": ((r"\bgamma_([12])$", r"ls\1.gamma"),)}
)


def _spec(variant: str, size: str, file: str, **more: object) -> ModelSpec:
    _, heads, layers = _SIZES[size]
    third = variant.startswith("v3-")
    return ModelSpec(
        name="deit",
        variant=variant,
        target="probekit_deit.models:build",
        citation=_DEIT3 if third else _DEIT,
        objective="supervised",
        weights=Weights(
            url=f"{_ADDRESS}/{file}",
            filename=file,
            licence=_LICENCE,
            layout=_THIRD if third else _PLAIN,
        ),
        # DeiT: Resize(256, bicubic), CenterCrop(224). DeiT III tests without a margin (its table 1).
        preprocessing=Preprocessing(interpolation="bicubic", crop_pct=1.0 if third else 0.875),
        heads=heads,
        layers=layers,
        **more,
    )


def _deit(size: str, distilled: bool) -> ModelSpec:
    name = f"deit_{_SIZES[size][0]}_{'distilled_' if distilled else ''}patch16_224"
    return _spec(
        f"vit-{size}16{'-distilled' if distilled else ''}",
        size,
        f"{name}-{_ENDINGS[size][distilled]}.pth",
        summary=f"DeiT-{size.title()}/16, supervised{' and distilled: 2 prefix tokens' if distilled else ''}",
    )


def _deit3(size: str, wide: bool) -> ModelSpec:
    return _spec(
        f"v3-{size}16{'-21k' if wide else ''}",
        size,
        f"deit_3_{_SIZES[size][0]}_224_{'21k' if wide else '1k'}.pth",
        summary=f"DeiT III ViT-{size.upper()}/16, supervised"
        f"{', ImageNet-21k then 1k' if wide else ' on ImageNet-1k'}",
    )


def _augreg(size: str) -> ModelSpec:
    _, heads, layers = _SIZES[size]
    return ModelSpec(
        name="augreg",
        variant=f"vit-{size}16",
        summary=f"AugReg ViT-{size.title()}/16, supervised, ImageNet-21k then 1k, from timm's hub repository",
        target="probekit_deit.models:build_augreg",
        citation=_AUGREG,
        objective="supervised",
        loads_weights=True,
        weights=Weights(licence=_LICENCE),
        preprocessing=Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.9),
        heads=heads,
        layers=layers,
        default=size == "b",
    )


@hookimpl
def probekit_models() -> list[ModelSpec]:
    return [
        miniature(
            "deit",
            "supervised training",
            bundled="probekit_deit:miniature.safetensors",
            objective="supervised",
            ignore=("head.*",),
            published_as="vit-b16",
        ),
        *(_deit(size, distilled) for distilled in (False, True) for size in ("ti", "s", "b")),
        *(_deit3(size, wide) for wide in (False, True) for size in ("s", "b", "l")),
        *(_augreg(size) for size in _SIZES),
    ]
