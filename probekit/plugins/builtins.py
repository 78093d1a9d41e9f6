"""What probekit itself offers, through the same hooks as any plugin. Nothing here imports a target."""

from __future__ import annotations

from probekit.hookspecs import hookimpl
from probekit.specs import DatasetSpec, FindingSpec, MetricSpec, ModelSpec, Option, ReportSpec

PROBEKIT_API = 1

_GEIRHOS = (
    "Geirhos et al. 2019, ImageNet-trained CNNs are biased towards texture, ICLR 2019, arXiv:1811.12231"
)
_PARK = "Park et al. 2023, What Do Self-Supervised Vision Transformers Learn?, ICLR 2023, arXiv:2305.00729"
_COMPAT = Option(
    default="",
    choices=("", "cl-vs-mim"),
    help="'cl-vs-mim' repeats the paper's published code where it differs from the paper",
)
_PROBE = {
    "norm": Option(
        default="bn",
        choices=("bn", "ln", "none"),
        help="of the features, without affine parameters: batch norm of the train split, layer norm, none",
    ),
    "solver": Option(
        default="lbfgs",
        choices=("lbfgs", "sgd"),
        help="logistic regression to its optimum (lbfgs), or the recipe of the paper's Table A.1 (sgd)",
    ),
    "l2": Option(default="", help="penalty of the weights; empty: chosen within the train split (sgd: 0.05)"),
    "lr": Option(default="", help="of sgd, for 256 images; empty: chosen within the train split"),
}
_POOL = {
    "pool": Option(
        default="mean", choices=("mean", "cls"), help="which features: mean of patch tokens, or the CLS token"
    ),
}
_POOLED_PROBE = {
    "pool": Option(
        default="mean",
        choices=("mean", "cls", "both"),
        help="which features: mean of the patch tokens, the CLS token, or both",
    ),
    **_PROBE,
    "sites": Option(
        default="out",
        choices=("out", "all"),
        help="after each layer and its embedding (out), or after each attention too (all)",
    ),
}


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
            name="features",
            summary="each image's pooled tokens at every layer, kept for probes and your own analysis",
            target="probekit.metrics.features:Features",
            on_request=True,
            options={
                "pool": Option(
                    default="mean",
                    choices=("mean", "cls", "both"),
                    help="of patch tokens, the CLS token, or both",
                )
            },
        ),
        MetricSpec(
            name="class_scores",
            summary="log-probabilities of the model's own classifier, kept for what it decides",
            target="probekit.metrics.class_scores:ClassScores",
            on_request=True,
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
        MetricSpec(
            name="attention_entropy",
            summary="how spread each query's attention is (tells uniform from homogeneous maps)",
            target="probekit.metrics.attention_entropy:AttentionEntropy",
            citation=_PARK,
        ),
        MetricSpec(
            name="prefix_mass",
            summary="attention that patch tokens give to CLS and register tokens",
            target="probekit.metrics.prefix_mass:PrefixMass",
        ),
        MetricSpec(
            name="feature_variance",
            summary="variance of the tokens of an image, at every token site",
            target="probekit.metrics.feature_variance:FeatureVariance",
            citation="Park and Kim 2022, How Do Vision Transformers Work?, ICLR 2022, arXiv:2202.06709",
        ),
        MetricSpec(
            name="similarity_heads",
            summary="cosine similarity of the heads' outputs",
            target="probekit.metrics.similarity_heads:SimilarityHeads",
            citation=_PARK,
            figure="Fig. 5",
        ),
        MetricSpec(
            name="similarity_depths",
            summary="cosine similarity of the tokens before and after self-attention",
            target="probekit.metrics.similarity_depths:SimilarityDepths",
            options={
                "of": Option(
                    default="stream",
                    choices=("stream", "branch"),
                    help="after: the residual stream with the attention (stream) or what was added (branch)",
                ),
            },
            citation=_PARK,
            figure="Fig. 5",
        ),
        MetricSpec(
            name="similarity_tokens",
            summary="cosine similarity of an image's tokens, over all pairs",
            target="probekit.metrics.similarity_tokens:SimilarityTokens",
            options={
                "of": Option(
                    default="stream",
                    choices=("stream", "attention"),
                    help="the residual stream at every token site, or attention's output before projection",
                ),
            },
            citation=_PARK,
            figure="Fig. 5",
        ),
        MetricSpec(
            name="linear_probe",
            summary="accuracy of a linear classifier on each layer's features",
            target="probekit.metrics.linear_probe:LinearProbe",
            options=_POOLED_PROBE,
            citation=_PARK,
            figure="Fig. 11",
        ),
        MetricSpec(
            name="shape_bias",
            summary="share of decisions for the shape where shape and texture conflict",
            target="probekit.metrics.shape_bias:ShapeBias",
            options={
                "classifier": Option(
                    default="probe",
                    choices=("probe", "own"),
                    help="`probe`: a linear probe on each layer's features decides; `own`: the model's",
                ),
                **_POOLED_PROBE,
            },
            citation="Geirhos et al. 2019, ImageNet-trained CNNs are biased towards texture, ICLR 2019; "
            + _PARK,
            figure="Fig. 8a",
        ),
        MetricSpec(
            name="frequency_robustness",
            summary="accuracy that a linear probe loses to noise of each frequency band",
            target="probekit.metrics.frequency_robustness:FrequencyRobustness",
            options={
                "half_width": Option(default=0.05, help="of a band, in units of pi"),
                "eps": Option(default=0.7, help="size of the white noise, in the model's normalised space"),
                "energy": Option(
                    default="ring",
                    choices=("ring", "equal"),
                    help="more noise in higher bands, as published (ring), or as much in each (equal)",
                ),
                "symmetric": Option(default=False, help="bands symmetric about 0, for any image size"),
                "step": Option(default=0.1, help="between bands, in units of pi"),
                "seeds": Option(default=1, help="draws of the noise, averaged"),
                **_POOLED_PROBE,
            },
            citation="Park and Kim 2022, How Do Vision Transformers Work?, ICLR 2022; " + _PARK,
            figure="Fig. 8b",
        ),
        MetricSpec(
            name="reinit",
            summary="accuracy that a last-layer probe loses when first or last blocks get fresh weights",
            target="probekit.metrics.reinit:Reinit",
            on_request=True,
            options={
                "blocks": Option(default="1-2-3-6", help="how many blocks, numbers between dashes"),
                **_POOLED_PROBE,
            },
            citation=_PARK,
            figure="Fig. F.3",
        ),
        MetricSpec(
            name="segmentation_probe",
            summary="mean IoU of a linear classifier of patch tokens",
            target="probekit.metrics.segmentation_probe:SegmentationProbe",
            options={"tokens": Option(default=16, help="patches kept of each image"), **_PROBE},
            citation=_PARK,
            figure="Table G.1",
        ),
        MetricSpec(
            name="spectrum_tokens",
            summary="log eigenvalues of the covariance of an image's tokens: how many directions they fill",
            target="probekit.metrics.spectrum_tokens:SpectrumTokens",
            options={
                "every": Option(
                    default=8, help="one image in so many is measured; all of them in a run of at most 64"
                )
            },
            citation=_PARK,
            figure="Fig. 7",
        ),
        MetricSpec(
            name="spectrum_images",
            summary="log eigenvalues of the covariance of the images' features, layer by layer",
            target="probekit.metrics.spectrum_images:SpectrumImages",
            options=_POOL,
            citation=_PARK,
            figure="Fig. 7",
        ),
        MetricSpec(
            name="token_translation",
            summary="how far attention moves all tokens of an image alike (1: a translation)",
            target="probekit.metrics.token_translation:TokenTranslation",
            citation=_PARK,
            figure="Fig. 6",
        ),
        MetricSpec(
            name="token_scatter",
            summary="tokens of two images before and after attention, in three directions",
            target="probekit.metrics.token_scatter:TokenScatter",
            options={"images": Option(default=2, help="how many, spread over the dataset")},
            citation=_PARK,
            figure="Fig. 6",
        ),
        MetricSpec(
            name="token_embedding",
            summary="t-SNE of the last layer's tokens, and whether neighbours are of one class",
            target="probekit.metrics.token_embedding:TokenEmbedding",
            options={
                "method": Option(
                    default="tsne", choices=("tsne", "umap"), help="umap needs the package umap-learn"
                ),
                "images": Option(default=18, help="how many, spread over the dataset"),
                "classes": Option(default=3, help="of how many classes, the same number of each"),
                "layer": Option(default=-1, help="after which layer; 0: the embedding, -1: the last"),
            },
            citation=_PARK,
            figure="Fig. E.2",
        ),
        MetricSpec(
            name="attention_maps",
            summary="attention of three places in a few images, as pictures, and attention rollout",
            target="probekit.metrics.attention_maps:AttentionMaps",
            options={
                "images": Option(default=4, help="how many, spread over the dataset"),
                "row": Option(default=0.25, help="of the third place, as a share of the height"),
                "col": Option(default=0.75, help="of the third place, as a share of the width"),
            },
            citation=_PARK,
            figure="Fig. 2",
        ),
        MetricSpec(
            name="cka",
            summary="how alike two layers, of one model or two, arrange the same images",
            target="probekit.metrics.cka:CKA",
            options=_POOL,
            citation="Kornblith et al. 2019, Similarity of Neural Network Representations Revisited, ICML",
        ),
        MetricSpec(
            name="knn",
            summary="accuracy of the nearest train images' vote on each layer's features",
            target="probekit.metrics.knn:KNN",
            options={
                "k": Option(default=20, help="how many neighbours vote"),
                **_POOL,
            },
            citation="Caron et al. 2021, Emerging Properties in Self-Supervised Vision Transformers, ICCV",
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
