"""What the pack offers, as data."""

from __future__ import annotations

from probekit.hookspecs import hookimpl
from probekit.specs import Layout, ModelSpec, Preprocessing, Weights

PROBEKIT_API = 1

_FIT = "probekit.models.timm:fit_grid"
# Buffers that follow from the grid; the module makes its own.
_INDEX = "*relative_position_index"

_PRETRAINING = Layout(
    name="SimMIM pre-training checkpoint",
    container=("model",),
    prefix="encoder.",
    ignore=("encoder.mask_token", "decoder.*", _INDEX),
    convert=_FIT,
    hint="a fine-tuned SimMIM has tables of its own in each block and 'fc_norm'; this is the pre-trained one",
)
_BARE = Layout(
    name="bare state dict of a SimMIM encoder",
    container=("model",),
    ignore=("mask_token", _INDEX),
    convert=_FIT,
    hint=_PRETRAINING.hint,
)


@hookimpl
def probekit_models() -> list[ModelSpec]:
    return [
        ModelSpec(
            name="simmim",
            variant="vit-b16",
            summary="SimMIM ViT-B/16, 800 epochs, masked image modelling",
            target="probekit_simmim.models:build",
            citation=(
                "Xie, Zhang, Cao, Lin, Bao, Yao, Dai, Hu 2022, SimMIM: A Simple Framework for Masked Image"
                " Modeling, CVPR 2022, arXiv:2111.09886"
            ),
            objective="MIM",
            weights=Weights(
                url="https://drive.google.com/uc?export=download&id=1dJn6GYkwMIcoP3zqOEyW1_iQfpBi8UOw&confirm=t",
                filename="simmim-vit-b16-pretrain.pth",
                licence="MIT",
                layout=_PRETRAINING,
                layouts=(_BARE,),
            ),
            preprocessing=Preprocessing(interpolation="bicubic", crop_pct=0.875),
            default=True,
            heads=12,
            layers=12,
        )
    ]
