"""What the pack offers, as data."""

from __future__ import annotations

from probekit.hookspecs import hookimpl
from probekit.specs import Layout, ModelSpec, Preprocessing, Weights

PROBEKIT_API = 1

_BEIT = (
    "Bao, Dong, Piao, Wei 2022, BEiT: BERT Pre-Training of Image Transformers, ICLR 2022, arXiv:2106.08254"
)
_BEITV2 = (
    "Peng, Dong, Bao, Ye, Wei 2022, BEiT v2: Masked Image Modeling with Vector-Quantized Visual Tokenizers,"
    " arXiv:2208.06366"
)
# Where the authors' guides fetch their files from; the folder that older pages name is gone.
_ADDRESS = "https://github.com/addf400/files/releases/download"
_FIT = "probekit.models.timm:fit_grid"
_INDEX = "*relative_position_index"  # a buffer that follows from the grid
_HINT = (
    "pre-trained files have one 'rel_pos_bias' and 'norm', fine-tuned ones ('...-ft') a table in each block"
    " and 'fc_norm'"
)
_PRETRAINED = Layout(
    name="BEiT pre-training checkpoint",
    container=("model",),
    ignore=("mask_token", "lm_head.*", _INDEX),
    convert=_FIT,
    hint=_HINT,
)
# BEiT v2 trains the class token through two more blocks, behind the ninth block's patches.
_PRETRAINED_V2 = _PRETRAINED.model_copy(
    update={
        "name": "BEiT v2 pre-training checkpoint",
        "ignore": (*_PRETRAINED.ignore, "cls_pt_*"),
    }
)
_TUNED = Layout(
    name="BEiT fine-tuned checkpoint", container=("model",), ignore=(_INDEX,), convert=_FIT, hint=_HINT
)


def _spec(variant: str, file: str, summary: str, layout: Layout, **more: bool) -> ModelSpec:
    name = f"{file.partition('/')[2]}.pth"
    large = "-l16" in variant
    second = variant.startswith("v2-")
    # .5 for BEiT, which saw ImageNet-22k; ImageNet's for v2 (--imagenet_default_mean_and_std).
    values = {} if second else {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    return ModelSpec(
        name="beit",
        variant=variant,
        summary=summary,
        target="probekit_beit.models:build",
        citation=_BEITV2 if second else _BEIT,
        objective="supervised" if variant.endswith("-ft") else "MIM",
        weights=Weights(url=f"{_ADDRESS}/{file}.pth", filename=name, licence="MIT", layout=layout),
        preprocessing=Preprocessing(interpolation="bicubic", crop_pct=0.875, **values),
        heads=16 if large else 12,
        layers=24 if large else 12,
        **more,
    )


def _size(size: str) -> str:
    return {"b": "base", "l": "large"}[size]


@hookimpl
def probekit_models() -> list[ModelSpec]:
    return [
        *(
            _spec(
                f"vit-{size}16",
                f"v1.0/beit_{_size(size)}_patch16_224_pt22k",
                f"BEiT ViT-{size.upper()}/16, masked image modelling on ImageNet-22k",
                _PRETRAINED,
                default=size == "b",
            )
            for size in "bl"
        ),
        *(
            _spec(
                f"vit-{size}16-ft",
                f"v1.0/beit_{_size(size)}_patch16_224_pt22k_ft22kto1k",
                f"BEiT ViT-{size.upper()}/16, then fine-tuned on ImageNet-22k and 1k",
                _TUNED,
            )
            for size in "bl"
        ),
        *(
            _spec(
                f"v2-{size}16",
                f"BEiT-v2/beitv2_{_size(size)}_patch16_224_pt1k",
                f"BEiT v2 ViT-{size.upper()}/16, masked image modelling on ImageNet-1k, 1,600 epochs",
                _PRETRAINED_V2,
            )
            for size in "bl"
        ),
    ]
