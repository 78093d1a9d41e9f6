"""What the pack offers, as data."""

from __future__ import annotations

from probekit.hookspecs import hookimpl
from probekit.specs import Layout, ModelSpec, Preprocessing, Weights

PROBEKIT_API = 1

_CITATION = (
    "Heo, Yun, Han, Chun, Choe, Oh 2021, Rethinking Spatial Dimensions of Vision Transformers, ICCV 2021,"
    " arXiv:2103.16302"
)
# The authors publish on Google Drive; timm's release holds the same files under the same names.
_ADDRESS = "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-pit-weights"
_NAMES = {
    "ti": "pit_ti_730",
    "xs": "pit_xs_781",
    "s": "pit_s_809",
    "b": "pit_b_820",
    "ti-distilled": "pit_ti_distill_746",
    "xs-distilled": "pit_xs_distill_791",
    "s-distilled": "pit_s_distill_819",
    "b-distilled": "pit_b_distill_840",
}
_HEADS = {"ti": (2, 4, 8), "xs": (2, 4, 8), "s": (3, 6, 12), "b": (4, 8, 16)}
_LAYOUT = Layout(
    name="PiT checkpoint",
    # The authors pool after a stage, timm before the next.
    rename=tuple((rf"^pools\.{i}\.", f"transformers.{i + 1}.pool.") for i in (0, 1)),
    convert="probekit_pit.models:fit",
    hint="ti, xs, s and b differ in width; files called '..._distill_...' are for the '-distilled' variants",
)


def _spec(variant: str, name: str) -> ModelSpec:
    size, _, distilled = variant.partition("-")
    return ModelSpec(
        name="pit",
        variant=variant,
        summary=f"PiT-{size.title() if size == 'ti' else size.upper()}, supervised, strides"
        f" {'7/14/28' if size == 'b' else '8/16/32'}{', distilled: 2 prefix tokens' if distilled else ''}",
        target="probekit_pit.models:build",
        citation=_CITATION,
        objective="supervised",
        weights=Weights(
            url=f"{_ADDRESS}/{name}.pth", filename=f"{name}.pth", licence="Apache-2.0", layout=_LAYOUT
        ),
        # Trained and tested with DeiT's code: Resize(256, bicubic), CenterCrop(224).
        preprocessing=Preprocessing(interpolation="bicubic", crop_pct=0.875),
        heads=_HEADS[size],
        layers=13 if size == "b" else 12,
        default=variant == "s",
    )


@hookimpl
def probekit_models() -> list[ModelSpec]:
    return [_spec(variant, name) for variant, name in _NAMES.items()]
