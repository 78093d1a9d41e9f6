"""Classification with timm's mixing and smoothing of labels."""

from __future__ import annotations

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from probekit.errors import UsageError
from probekit_train.objectives import Batch, undecayed, weights_of
from probekit_train.recipe import FinetuneRecipe, SupervisedRecipe


class Classification(nn.Module):
    """A network of timm with its classifier; frozen, the classifier alone, on batch-normed features."""

    def __init__(self, network: nn.Module, recipe: SupervisedRecipe | FinetuneRecipe, classes: int) -> None:
        super().__init__()
        self.network = network
        self.frozen = isinstance(recipe, FinetuneRecipe) and recipe.frozen
        smoothing = recipe.label_smoothing
        self.mixup = None
        if recipe.mixup or recipe.cutmix:
            self.mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=smoothing, num_classes=classes)
        self.soft = SoftTargetCrossEntropy()
        self.hard = LabelSmoothingCrossEntropy(smoothing)
        if self.frozen:
            network.requires_grad_(False)
            head = network.get_classifier()
            if not isinstance(head, nn.Linear):  # distilled DeiT has two
                raise UsageError(
                    f"a {type(network).__name__} has no one linear classifier that could be trained alone",
                    hint="`--set frozen=false`, or a model with one",
                )
            head.requires_grad_(True)
            self.whiten = nn.BatchNorm1d(head.in_features, affine=False)

    def begin_step(self, progress: float) -> None:
        """Nothing changes along the schedule."""

    def train(self, mode: bool = True) -> Classification:
        super().train(mode)
        if self.frozen:
            self.network.eval()
        return self

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        images, labels = batch.views[0], batch.labels
        mix = self.training and self.mixup is not None
        targets = labels
        if mix:
            images, targets = self.mixup(images, labels)
        logits = self.classify(images).float()
        right = (logits.argmax(dim=1) == labels).float().mean() * 100
        result = {"loss": self.soft(logits, targets) if mix else self.hard(logits, targets)}
        # against mixed images the share of right answers says nothing
        return result if mix else {**result, "accuracy": right.detach()}

    forward = losses

    def classify(self, images: Tensor) -> Tensor:
        """Logits (B, classes)."""
        if not self.frozen:
            return self.network(images)
        with torch.no_grad():
            features = self.network.forward_head(self.network.forward_features(images), pre_logits=True)
        return self.network.get_classifier()(self.whiten(features.float()))

    def exported(self) -> dict[str, Tensor]:
        """The network's own names; a frozen one's batch norm is folded into its classifier."""
        state = weights_of(self.network)
        if self.frozen:
            name = next(n for n, m in self.network.named_modules() if m is self.network.get_classifier())
            scale = (self.whiten.running_var + self.whiten.eps).rsqrt().cpu()
            shift = self.whiten.running_mean.cpu()
            weight = state[f"{name}.weight"] * scale
            state[f"{name}.bias"] = state[f"{name}.bias"] - weight @ shift
            state[f"{name}.weight"] = weight
        return state

    def no_weight_decay(self) -> set[str]:
        return undecayed(self)
