"""What probekit itself offers, through the same hooks as any plugin. Nothing here imports a target."""

from __future__ import annotations

from probekit.hookspecs import hookimpl
from probekit.plugins.builtin_metrics import METRICS
from probekit.specs import DatasetSpec, FindingSpec, MetricSpec, ModelSpec, Option, ReportSpec

PROBEKIT_API = 1

_GEIRHOS = (
    "Geirhos et al. 2019, ImageNet-trained CNNs are biased towards texture, ICLR 2019, arXiv:1811.12231"
)
_PARK = "Park et al. 2023, What Do Self-Supervised Vision Transformers Learn?, ICLR 2023, arXiv:2305.00729"


@hookimpl
def probekit_metrics() -> list[MetricSpec]:
    return list(METRICS)


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
        ),
        DatasetSpec(
            name="shapetex",
            summary="drawn images of 8 shapes in 8 textures, independent, paired or in conflict; no files",
            target="probekit.datasets.shapetex:load",
            argument="[KIND]",
            options={
                "images": Option(default=2048, help="how many test images"),
                "train": Option(default=50_000, help="how many training images"),
                "size": Option(default=64, help="pixels on a side"),
                "classes": Option(default=8, help="how many shapes, and textures"),
                "labels": Option(default="shape", choices=("shape", "texture"), help="which of the two"),
                "seed": Option(default=0, help="another seed draws other images"),
            },
        ),
        DatasetSpec(
            name="cifar10",
            summary="CIFAR-10 from a zip or folder of images or its Python batches; test and train split",
            target="probekit.datasets.cifar10:load",
            argument="PATH",
            citation="Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images",
        ),
        DatasetSpec(
            name="cue-conflict",
            summary="photographs with another category's texture, by style transfer, for shape bias",
            target="probekit.datasets.cue_conflict:load",
            argument="PATH",
            options={
                "keep_same": Option(
                    default=False, help="keep images whose shape and texture are of one category"
                ),
            },
            citation=_GEIRHOS,
        ),
        DatasetSpec(
            name="stylized",
            summary="Stylized-ImageNet: ImageNet's shapes in the styles of paintings, labelled by shape",
            target="probekit.datasets.cue_conflict:load_stylized",
            argument="PATH",
            citation=_GEIRHOS,
        ),
        DatasetSpec(
            name="segmentation",
            summary="images with class masks: ADE20K's scene parsing layout, or images/ and masks/",
            target="probekit.datasets.segmentation:load",
            argument="PATH",
            options={"classes": Option(default=0, help="how many there are, if known (0: it isn't)")},
        ),
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
        ReportSpec(
            name="figures",
            summary="a folder of figures for a paper or a talk: every chart and picture as SVG and PNG",
            target="probekit.reports.paper_figures:render",
            suffix="-figures",
        ),
        ReportSpec(
            name="decisions",
            summary="every trial of shape against texture as one table: image, shape, texture, decision",
            target="probekit.reports.decisions:render",
            suffix="-decisions.csv",
        ),
    ]


@hookimpl
def probekit_findings() -> list[FindingSpec]:
    summaries = {
        "attends-farther": "later layers of CL attend farther than MIM's (Fig. 3)",
        "nmi-collapses": "in later layers CL's attention depends less on the query than MIM's (Fig. 4)",
        "heads-alike": "in later layers CL's heads are more alike than MIM's (Fig. 5)",
        "depths-alike": "in later layers attention changes CL's tokens less than MIM's (Fig. 5)",
        "tokens-alike": "in later layers CL's tokens are more alike than MIM's (Fig. 5)",
        "token-volume": "with depth MIM spreads tokens over more directions, CL less so (Fig. 7)",
        "token-volume-absolute": "with depth the volume of tokens grows more in MIM than in CL (Fig. 7)",
        "image-volume": "with depth CL spreads images over more directions, MIM less so (Fig. 7)",
        "low-frequency": "in later layers CL's tokens hold less high frequency than MIM's (Fig. 9)",
        "high-frequency": "in later layers MIM's tokens hold more high frequency than CL's (Fig. 9)",
        "low-frequency-no-dc": "low-frequency without the mean of the tokens",
        "high-frequency-no-dc": "high-frequency without the mean of the tokens",
        "shape-biased": "CL goes by shape more often than MIM (Fig. 8a)",
        "loses-to-noise": "high-frequency noise costs MIM more accuracy than CL (Fig. 8b)",
        "separates-last": "at the last layer a linear probe is better on CL than on MIM (Fig. 11)",
        "peaks-later": "a linear probe's best layer is later in CL than in MIM (Fig. 11)",
        "later-layers-matter": "with depth a linear probe gains more on CL than on MIM (Fig. 11)",
        "hybrid-probe-early": "early layers of the hybrid are nearer to MIM in linear probing (Fig. 12)",
        "hybrid-probe-late": "later layers of the hybrid are nearer to CL in linear probing (Fig. 12)",
        "hybrid-nmi-early": "early layers of the hybrid are nearer to MIM in NMI (Fig. 12)",
        "hybrid-nmi-late": "later layers of the hybrid are nearer to CL in NMI (Fig. 12)",
        "hybrid-fourier-early": "early layers of the hybrid are nearer to MIM in frequency (Fig. 12)",
        "hybrid-fourier-late": "later layers of the hybrid are nearer to CL in frequency (Fig. 12)",
    }
    return [
        FindingSpec(
            name=name,
            summary=summary,
            target=f"probekit.findings.park2023:{name.upper().replace('-', '_')}",
            citation=_PARK,
        )
        for name, summary in summaries.items()
    ]
