"""What probekit itself offers, through the same hooks as any plugin. Nothing here imports a target."""

from __future__ import annotations

from probekit.hookspecs import hookimpl
from probekit.specs import DatasetSpec, MetricSpec, ModelSpec, Option, ReportSpec

PROBEKIT_API = 1

_PARK = "Park et al. 2023, What Do Self-Supervised Vision Transformers Learn?, ICLR 2023, arXiv:2305.00729"
_COMPAT = Option(
    default="",
    choices=("", "cl-vs-mim"),
    help="'cl-vs-mim' repeats the paper's published code where it differs from the paper",
)


@hookimpl
def probekit_metrics() -> list[MetricSpec]:
    return [
        MetricSpec(
            name="attention_distance",
            summary="how far each head looks, in pixels",
            target="probekit.metrics.attention_distance:AttentionDistance",
            options={
                "compat": _COMPAT,
                "renormalise": Option(default=True, help="rows sum to 1 over the patch tokens"),
            },
            citation=_PARK,
            figure="Fig. 3",
        ),
        MetricSpec(
            name="nmi",
            summary="how much a head's attention depends on the query (0: collapsed to one map)",
            target="probekit.metrics.nmi:NMI",
            options={"compat": _COMPAT},
            citation=_PARK,
            figure="Fig. 4",
        ),
        MetricSpec(
            name="fourier",
            summary="log amplitude of the tokens' spatial frequencies, relative to frequency 0",
            target="probekit.metrics.fourier:Fourier",
            options={
                "compat": _COMPAT,
                "dc": Option(
                    default="include",
                    choices=("include", "exclude"),
                    help="relative to frequency 0 (include, the paper) or to the lowest above it (exclude)",
                ),
            },
            citation=_PARK,
            figure="Fig. 9",
        ),
    ]


@hookimpl
def probekit_models() -> list[ModelSpec]:
    return [
        ModelSpec(
            name="timm",
            summary="any model of timm by its name: timm:vit_tiny_patch16_224",
            target="probekit.models.timm:build",
            options={
                "container": Option(
                    default="", help="where in your checkpoint the weights are, if several places would do"
                ),
                "prefix": Option(default="", help="of the weights' names there; 'none' for no prefix"),
            },
            any_variant=True,
            loads_weights=True,
            citation="Wightman 2019, PyTorch Image Models, doi:10.5281/zenodo.4414861",
        ),
        ModelSpec(
            name="hf",
            summary="a vision model of Hugging Face transformers by its repository: hf:facebook/vit-mae-base",
            target="probekit.models.huggingface:build",
            any_variant=True,
            loads_weights=True,
            citation="Wolf et al. 2020, Transformers: State-of-the-Art Natural Language Processing, EMNLP",
        ),
    ]


@hookimpl
def probekit_datasets() -> list[DatasetSpec]:
    return [
        DatasetSpec(
            name="folder",
            summary="images in a folder; class folders, where there are any, become labels",
            target="probekit.datasets.folder:load",
            argument="PATH",
        )
    ]


@hookimpl
def probekit_reports() -> list[ReportSpec]:
    return [
        ReportSpec(
            name="html",
            summary="one page that works offline: curves over depth, a table, provenance, failures",
            target="probekit.reports.html:render",
        ),
        ReportSpec(
            name="csv",
            summary="every number as one long table: a row for each value, layer and head or frequency",
            target="probekit.reports.csv:render",
            suffix=".csv",
        ),
    ]
