"""Both at once: (1 - lambda) SimMIM + lambda MoCo over one encoder (Park et al., ICLR 2023, section 5)."""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from probekit_train.objectives import Batch, undecayed, weights_of
from probekit_train.objectives.moco import MomentumContrast
from probekit_train.objectives.simmim import MaskedPixels
from probekit_train.recipe import HybridRecipe


class Hybrid(nn.Module):
    """SimMIM sees the first view, MoCo the second and third; three heads and a momentum encoder."""

    def __init__(self, backbone: VisionTransformer, recipe: HybridRecipe) -> None:
        super().__init__()
        self.weight = recipe.weight
        self.contrast = MomentumContrast(backbone, recipe)
        self.masking = MaskedPixels(backbone, recipe)

    def begin_step(self, progress: float) -> None:
        self.contrast.begin_step(progress)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        masked = self.masking.losses(Batch(batch.views[:1]))
        contrast = self.contrast.losses(Batch(batch.views[1:]))
        loss = (1 - self.weight) * masked["loss"] + self.weight * contrast["loss"]
        return {
            **contrast,
            "loss": loss,
            "mim": masked["loss"].detach(),
            "contrast": contrast["loss"].detach(),
        }

    forward = losses

    def exported(self) -> dict[str, Tensor]:
        return weights_of(self.contrast.backbone)

    def no_weight_decay(self) -> set[str]:
        return undecayed(self)
