"""What the pack offers, as data."""

from __future__ import annotations

from probekit.hookspecs import hookimpl
from probekit.specs import Layout, ModelSpec, Option, Preprocessing, Weights

PROBEKIT_API = 1

_SWIN = (
    "Liu, Lin, Cao, Hu, Wei, Zhang, Lin, Guo 2021, Swin Transformer: Hierarchical Vision Transformer using"
    " Shifted Windows, ICCV 2021, arXiv:2103.14030"
)
_SWINV2 = (
    "Liu, Hu, Lin, Yao, Xie, Wei, Ning, Cao, Zhang, Dong, Wei, Guo 2022, Swin Transformer V2: Scaling Up"
    " Capacity and Resolution, CVPR 2022, arXiv:2111.09883"
)
_ADDRESS = "https://github.com/SwinTransformer/storage/releases/download"
_PADDING = Option(
    default="refuse",
    choices=("refuse", "drop"),
    help="what to do with an image size the windows don't divide: refuse it, or pad and drop padded keys",
)
_OFFICIAL = Layout(
    name="Swin checkpoint",
    container=("model",),
    ignore=("*relative_position_index", "*attn_mask"),  # buffers that follow from the grid
    # The authors merge patches after a stage, timm before the next.
    rename=(
        *((rf"^layers\.{i}\.downsample\.", f"layers.{i + 1}.downsample.") for i in (2, 1, 0)),
        (r"^head\.", "head.fc."),
    ),
    convert="probekit.models.timm:fit_grid",
    hint="sizes, windows, V2 and ImageNet-22k are variants of their own; timm's files are for 'timm:swin...'",
)
_OFFICIAL_V2 = _OFFICIAL.model_copy(
    update={
        "name": "Swin V2 checkpoint",
        "ignore": (*_OFFICIAL.ignore, "*relative_coords_table"),
        "convert": None,
    }
)
_HEADS = {"tiny": (3, 6, 12, 24), "small": (3, 6, 12, 24), "base": (4, 8, 16, 32), "large": (6, 12, 24, 48)}
# Variant, published file, what it was trained on.
_FILES = (
    ("tiny", "v1.0.0/swin_tiny_patch4_window7_224", "ImageNet-1k"),
    ("small", "v1.0.0/swin_small_patch4_window7_224", "ImageNet-1k"),
    ("base", "v1.0.0/swin_base_patch4_window7_224", "ImageNet-1k"),
    ("base-384", "v1.0.0/swin_base_patch4_window12_384", "ImageNet-1k"),
    ("large", "v1.0.0/swin_large_patch4_window7_224_22kto1k", "ImageNet-22k then 1k"),
    ("large-384", "v1.0.0/swin_large_patch4_window12_384_22kto1k", "ImageNet-22k then 1k"),
    ("tiny-22k", "v1.0.8/swin_tiny_patch4_window7_224_22k", "ImageNet-22k"),
    ("small-22k", "v1.0.8/swin_small_patch4_window7_224_22k", "ImageNet-22k"),
    ("base-22k", "v1.0.0/swin_base_patch4_window7_224_22k", "ImageNet-22k"),
    ("base-384-22k", "v1.0.0/swin_base_patch4_window12_384_22k", "ImageNet-22k"),
    ("large-22k", "v1.0.0/swin_large_patch4_window7_224_22k", "ImageNet-22k"),
    ("large-384-22k", "v1.0.0/swin_large_patch4_window12_384_22k", "ImageNet-22k"),
    *(
        (
            f"v2-{size}{'-w16' if window == 16 else ''}",
            f"v2.0.0/swinv2_{size}_patch4_window{window}_256",
            "ImageNet-1k",
        )
        for window in (8, 16)
        for size in ("tiny", "small", "base")
    ),
)


def _spec(variant: str, file: str, data: str) -> ModelSpec:
    second = variant.startswith("v2-")
    size = variant.removeprefix("v2-").partition("-")[0]
    window, pixels = file.partition("_window")[2].split("_")[:2]
    name = f"{file.partition('/')[2]}.pth"
    return ModelSpec(
        name="swin",
        variant=variant,
        summary=f"{'Swin V2' if second else 'Swin'} {size}, supervised on {data}, {window}x{window} windows",
        target="probekit_swin.models:build",
        options={"padding": _PADDING},
        citation=_SWINV2 if second else _SWIN,
        objective="supervised",
        weights=Weights(
            url=f"{_ADDRESS}/{file}.pth",
            filename=name,
            licence="MIT",
            layout=_OFFICIAL_V2 if second else _OFFICIAL,
        ),
        # The authors' data/build.py: resized by 256/224 and cropped, squeezed at 384 (TEST.CROP False).
        preprocessing=Preprocessing(
            interpolation="bicubic",
            crop_pct=1.0 if pixels == "384" else 0.875,
            crop_mode="squash" if pixels == "384" else "center",
            size=(int(pixels), int(pixels)),
        ),
        heads=_HEADS[size],
        layers=12 if size == "tiny" else 24,
        default=variant == "base",
    )


@hookimpl
def probekit_models() -> list[ModelSpec]:
    return [_spec(*entry) for entry in _FILES]
