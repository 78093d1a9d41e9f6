"""Recipes: every number of a training. One class an objective, so that no field is ever without effect."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Below = Annotated[float, Field(ge=0, lt=1)]
Pool = Literal["token", "avg"]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)


class View(_Strict):
    """One random view of an image.

    scale:       share of the image's area in the crop, from and to (RandomResizedCrop)
    flip:        chance of a horizontal flip
    jitter:      strengths of brightness, contrast, saturation and hue, applied with chance `jitter_chance`
    grey, blur, solarise: chances; blur is Gaussian with a radius of `blur_radius` pixels, from and to
    randaugment: timm's configuration of RandAugment ("rand-m9-mstd0.5-inc1"), "" for none
    """

    scale: tuple[float, float] = (0.08, 1.0)
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    flip: Share = 0.5
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    jitter_chance: Share = 0.8
    grey: Share = 0.0
    blur: Share = 0.0
    blur_radius: tuple[float, float] = (0.1, 2.0)
    solarise: Share = 0.0
    randaugment: str = ""

    @model_validator(mode="after")
    def _ordered(self) -> View:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError("scale goes from above 0 up to 1 at most")
        if min(self.jitter) < 0 or self.jitter[3] > 0.5:
            raise ValueError("jitter's strengths are 0 or more, that of hue 0.5 at most")
        if not 0 <= self.blur_radius[0] <= self.blur_radius[1]:
            raise ValueError("blur_radius goes from 0 or more up")
        return self


class Training(_Strict):
    """What pre-training and fine-tuning share.

    epochs:       passes over the images in one round, whole or not; 0 writes the untrained network
    rounds:       how often the whole schedule runs, each time from the last one's weights (warm restarts,
                  Loshchilov and Hutter 2017); a finished training goes on when they are raised
    batch_size:   images of one step of the optimiser, over all processes and `accumulate` parts
    lr:           the peak learning rate itself; nothing scales it with the batch
    clip:         largest norm of the gradient, 0 for no limit
    milestones:   for ``multistep``: shares of the schedule at which the rate falls to a tenth
    layer_decay:  each block's rate is this times the next one's; 1 for all alike
    views:        how each view of an image is made, in the order the objective takes them
    """

    view_count: ClassVar[int] = 1

    epochs: float = Field(ge=0)
    rounds: Positive = 1
    warmup_epochs: float = Field(0.0, ge=0)
    batch_size: Positive
    accumulate: Positive = 1
    optimizer: Literal["adamw", "sgd", "lamb", "lars"] = "adamw"
    lr: float = Field(gt=0)
    betas: tuple[Below, Below] = (0.9, 0.95)
    weight_decay: float = Field(0.05, ge=0)
    clip: float = Field(3.0, ge=0)
    schedule: Literal["cosine", "multistep", "constant"] = "cosine"
    milestones: tuple[Share, ...] = ()
    layer_decay: float = Field(1.0, gt=0, le=1)
    drop_path: Below = 0.0
    local_attention: int | None = Field(None, gt=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = Field(0, ge=0)
    dataset: str = "shapetex"
    views: tuple[View, ...]

    @model_validator(mode="after")
    def _consistent(self) -> Training:
        if len(self.views) != self.view_count:
            raise ValueError(f"it takes {self.view_count} views, and {len(self.views)} are given")
        if self.local_attention is not None and self.local_attention % 2 == 0:
            raise ValueError(
                f"local_attention is the side of a neighbourhood and odd, not {self.local_attention}"
            )
        if self.epochs and self.warmup_epochs > self.epochs:
            raise ValueError("warmup_epochs can't be more than epochs")
        if self.milestones and self.schedule != "multistep":
            raise ValueError("milestones are for the schedule 'multistep'")
        return self


class Pretraining(Training):
    """model: a ViT's name in timm, or ``vit``: timm's VisionTransformer with `model_args` alone.

    positions: learned, or fixed sines and cosines
    crop_pct:  of the preprocessing that the finished model is measured with
    """

    objective: str
    model: str = "vit"
    model_args: dict[str, Any] = {}
    img_size: Positive = 224
    positions: Literal["learned", "sincos"] = "learned"
    crop_pct: float = Field(0.875, gt=0, le=1)

    @model_validator(mode="after")
    def _buildable(self) -> Pretraining:
        if self.model_args.get("in_chans", 3) != 3:
            raise ValueError("images have 3 channels, and model_args.in_chans says otherwise")
        if self.objective in ("simmim", "mae", "hybrid") and self.model_args.get("dynamic_img_size"):
            raise ValueError("masks are of one size, which excludes model_args.dynamic_img_size")
        return self


class _Contrast(Pretraining):
    """MoCo v3 (Chen et al. 2021).

    momentum:           of the momentum encoder at the start; 0 makes it SimCLR*
    momentum_end:       at the end, reached along a cosine; 1, or 0 where `momentum` is 0
    projector, predictor: widths after the encoder's own
    pool:               what the projector sees: the class token, or the mean of patch tokens
    drop_tokens:        share of patch tokens left out of each view for the first `drop_until` of the
                        steps, which MoCo doesn't do: about twice the images per second
    """

    temperature: float = Field(0.2, gt=0)
    momentum: Share = 0.99
    momentum_end: Share | None = None
    projector: tuple[Positive, ...] = (4096, 4096, 256)
    predictor: tuple[Positive, ...] = (4096, 256)
    freeze_patch_embed: bool = True
    pool: Pool = "token"
    drop_tokens: Below = 0.0
    drop_until: Share = 1.0

    @model_validator(mode="after")
    def _heads_meet(self) -> _Contrast:
        if not self.projector or not self.predictor or self.projector[-1] != self.predictor[-1]:
            raise ValueError("projector and predictor must end in the same width")
        if self.drop_tokens and self.local_attention:
            raise ValueError("drop_tokens and local_attention exclude each other")
        return self


class _Masking(Pretraining):
    """SimMIM (Xie et al. 2022). mask_unit: side of the squares that are masked as a whole, in pixels."""

    mask_unit: Positive = 32
    mask_ratio: float = Field(0.6, gt=0, lt=1)


class MocoRecipe(_Contrast):
    view_count: ClassVar[int] = 2
    objective: Literal["moco"]


class SimmimRecipe(_Masking):
    objective: Literal["simmim"]


class MaeRecipe(Pretraining):
    """MAE (He et al. 2022). normalise_target: each patch by its own mean and deviation."""

    objective: Literal["mae"]
    mask_ratio: float = Field(0.75, gt=0, lt=1)
    decoder_width: Positive = 512
    decoder_depth: Positive = 8
    decoder_heads: Positive = 16
    normalise_target: bool = True

    @model_validator(mode="after")
    def _divisible(self) -> MaeRecipe:
        if self.decoder_width % self.decoder_heads or self.decoder_width % 4:
            raise ValueError("decoder_width must be a multiple of decoder_heads and of 4")
        return self


class HybridRecipe(_Contrast, _Masking):
    """(1 - lambda) SimMIM on view 1 + lambda MoCo on views 2 and 3 (Park et al. 2023, section 5)."""

    view_count: ClassVar[int] = 3
    objective: Literal["hybrid"]
    weight: Share = Field(0.2, alias="lambda")


class _Labels(Training):
    """label_smoothing; mixup and cutmix: the alphas of their beta distributions, 0 for none."""

    label_smoothing: Below = 0.0
    mixup: float = Field(0.0, ge=0)
    cutmix: float = Field(0.0, ge=0)


class SupervisedRecipe(_Labels, Pretraining):
    objective: Literal["supervised"]
    pool: Pool = "token"


class FinetuneRecipe(_Labels):
    """model: any ViT probekit can load, with its weights.

    frozen:       only the classifier is trained, on features that are batch-normalised without parameters
    pool:         the class token or the mean of patch tokens, after the final norm
    reinit_first, reinit_last: blocks that start anew, untrained (Park et al. 2023, Fig. F.3)
    """

    objective: Literal["finetune"] = "finetune"
    model: str = ""
    img_size: Positive | None = None
    pool: Pool = "avg"
    frozen: bool = False
    reinit_first: int = Field(0, ge=0)
    reinit_last: int = Field(0, ge=0)


RECIPES: dict[str, type[Training]] = {
    "moco": MocoRecipe,
    "simmim": SimmimRecipe,
    "mae": MaeRecipe,
    "hybrid": HybridRecipe,
    "supervised": SupervisedRecipe,
    "finetune": FinetuneRecipe,
}
