"""The built-in metrics, as data."""

from __future__ import annotations

from probekit.specs import MetricSpec, Option

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
        default="mean",
        choices=("mean", "cls"),
        help="mean of patch tokens, or the first prefix token: the class token where there is one",
    ),
}
_POOL_OR_BOTH = {
    "pool": Option(
        default="mean",
        choices=("mean", "cls", "both"),
        help="mean of patch tokens, the first prefix token (the class token where there is one), or both",
    ),
}
_POOLED_PROBE = {
    **_POOL_OR_BOTH,
    **_PROBE,
    "sites": Option(
        default="out",
        choices=("out", "all"),
        help="after each layer and its embedding (out), or after each attention too (all)",
    ),
}

METRICS = [
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
        options={
            "compat": _COMPAT,
            "prefix": Option(
                default="drop",
                choices=("drop", "keep"),
                help="whether prefix tokens are among queries and keys",
            ),
        },
        citation=_PARK,
        figure="Fig. 4",
    ),
    MetricSpec(
        name="features",
        summary="each image's pooled tokens at every layer, kept for probes and your own analysis",
        target="probekit.metrics.features:Features",
        on_request=True,
        options=_POOL_OR_BOTH,
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
            "average": Option(
                default="logs",
                choices=("logs", "amplitudes"),
                help="over channels: the logarithms (the paper), or the amplitudes before one logarithm",
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
        citation="Geirhos et al. 2019, ImageNet-trained CNNs are biased towards texture, ICLR 2019; " + _PARK,
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
        options={"tokens": Option(default=4, help="patches kept of each image"), **_PROBE},
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
