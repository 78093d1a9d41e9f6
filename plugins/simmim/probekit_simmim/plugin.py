"""What the pack offers, as data."""

from __future__ import annotations

from probekit.hookspecs import hookimpl
from probekit.specs import Layout, ModelSpec, Option, Preprocessing, Weights, miniature

PROBEKIT_API = 1

_CITATION = (
    "Xie, Zhang, Cao, Lin, Bao, Yao, Dai, Hu 2022, SimMIM: A Simple Framework for Masked Image"
    " Modeling, CVPR 2022, arXiv:2111.09886"
)
_FIT = "probekit_simmim.models:fit"
# The evaluation of the authors' data_finetune.py: Resize(256 / 224 of the size, bicubic), CenterCrop.
_PREPROCESSING = Preprocessing(interpolation="bicubic", crop_pct=0.875)
SWIN_PREPROCESSING = Preprocessing(interpolation="bicubic", crop_pct=0.875, size=(192, 192))
# Buffers that follow from the grid; the module makes its own.
_BUFFERS = ("*relative_position_index", "*attn_mask")
# timm has the merging of patches at the beginning of the stage after it.
_MERGING = tuple((rf"^layers\.{i}\.downsample\.", f"layers.{i + 1}.downsample.") for i in (2, 1, 0))

_PRETRAINING = Layout(
    name="SimMIM pre-training checkpoint",
    container=("model",),
    prefix="encoder.",
    ignore=("encoder.mask_token", "decoder.*", *_BUFFERS),
    convert=_FIT,
    hint="the variants are vit-b16, vit-b16-ft (fine-tuned), swin-b and swin-l",
)
_BARE = Layout(
    name="bare state dict of a SimMIM encoder",
    container=("model",),
    ignore=("mask_token", *_BUFFERS),
    convert=_FIT,
    hint=_PRETRAINING.hint,
)
_FINE_TUNED = Layout(
    name="SimMIM fine-tuned checkpoint",
    container=("model",),
    ignore=_BUFFERS,
    convert=_FIT,
    hint=_PRETRAINING.hint,
)
_SWIN = _PRETRAINING.model_copy(update={"rename": _MERGING})
_SWIN_BARE = Layout(
    name="SimMIM fine-tuned checkpoint or bare state dict of an encoder",
    container=("model",),
    ignore=("mask_token", "head.*", *_BUFFERS),
    rename=_MERGING,
    convert=_FIT,
    hint=_PRETRAINING.hint,
)


def _weights(drive: str, filename: str, layout: Layout, *others: Layout) -> Weights:
    """A file on Google Drive, by its id there."""
    return Weights(
        url=f"https://drive.google.com/uc?export=download&id={drive}&confirm=t",
        filename=filename,
        licence="MIT",
        layout=layout,
        layouts=others,
    )


def _swin(variant: str, summary: str, drive: str, filename: str, window: int) -> ModelSpec:
    option = Option(default=window, help="side of the attention windows in tokens; 224 px needs 7 or 14")
    return ModelSpec(
        name="simmim",
        variant=variant,
        summary=summary,
        target="probekit_simmim.models:build_swin",
        options={"window": option},
        citation=_CITATION,
        objective="MIM",
        weights=_weights(drive, filename, _SWIN, _SWIN_BARE),
        preprocessing=SWIN_PREPROCESSING,
        heads=(6, 12, 24, 48) if variant == "swin-l" else (4, 8, 16, 32),
        layers=24,
    )


@hookimpl
def probekit_models() -> list[ModelSpec]:
    return [
        miniature(
            "simmim",
            "SimMIM",
            bundled="probekit_simmim:miniature.safetensors",
            objective="MIM",
            citation=_CITATION,
            published_as="vit-b16",
        ),
        ModelSpec(
            name="simmim",
            variant="vit-b16",
            summary="SimMIM ViT-B/16, 800 epochs, masked image modelling",
            target="probekit_simmim.models:build",
            citation=_CITATION,
            objective="MIM",
            weights=_weights(
                "1dJn6GYkwMIcoP3zqOEyW1_iQfpBi8UOw", "simmim-vit-b16-pretrain.pth", _PRETRAINING, _BARE
            ),
            preprocessing=_PREPROCESSING,
            heads=12,
            layers=12,
        ),
        ModelSpec(
            name="simmim",
            variant="vit-b16-ft",
            summary="SimMIM ViT-B/16, fine-tuned as a classifier of ImageNet-1k for 100 epochs",
            target="probekit_simmim.models:build",
            citation=_CITATION,
            objective="supervised",
            weights=_weights("1fKgDYd0tRgyHyTnyB1CleYxjo0Gn5tEB", "simmim-vit-b16-finetune.pth", _FINE_TUNED),
            preprocessing=_PREPROCESSING,
            heads=12,
            layers=12,
        ),
        _swin(
            "swin-b",
            "SimMIM Swin-B at 192 px with windows of 6, 800 epochs, masked image modelling",
            "15zENvGjHlM71uKQ3d2FbljWPubtrPtjl",
            "simmim-swin-b-pretrain.pth",
            6,
        ),
        _swin(
            "swin-l",
            "SimMIM Swin-L at 192 px with windows of 12, 800 epochs, masked image modelling",
            "1qDxrTl2YUDB0505_4QrU5LU2R1kKmcBP",
            "simmim-swin-l-pretrain.pth",
            12,
        ),
    ]
