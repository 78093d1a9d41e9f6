"""MoCo v3: contrast of two views with a momentum encoder (Chen, Xie and He, ICCV 2021)."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence

import torch
import torch.distributed as distributed
from timm.layers import PatchDropout
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from probekit_train.objectives import Batch, spread, undecayed, weights_of
from probekit_train.recipe import HybridRecipe, MocoRecipe


class MomentumContrast(nn.Module):
    """Encoder, projector and predictor, and the moving average of the first two that makes the keys."""

    def __init__(self, backbone: VisionTransformer, recipe: MocoRecipe | HybridRecipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.backbone = backbone
        self.projector = mlp((backbone.num_features, *recipe.projector))
        self.predictor = mlp((recipe.projector[-1], *recipe.predictor))
        if recipe.freeze_patch_embed:
            backbone.patch_embed.requires_grad_(False)
        self.momentum = nn.ModuleDict({"backbone": backbone, "projector": self.projector})
        self.momentum = copy.deepcopy(self.momentum).requires_grad_(False)

    def begin_step(self, progress: float) -> None:
        drop = self.recipe.drop_tokens if progress < self.recipe.drop_until else 0.0
        for module in self.modules():
            if isinstance(module, PatchDropout):
                module.prob = drop
        start, end = self.recipe.momentum, self.recipe.momentum_end
        if end is None:
            end = 1.0 if start else 0.0
        self.move(momentum_at(progress, start, end))

    @torch.no_grad()
    def move(self, momentum: float) -> None:
        """Momentum encoder = momentum x itself + (1 - momentum) x encoder; its batch norms keep their own
        statistics."""
        pairs = [
            *zip(self.momentum["backbone"].parameters(), self.backbone.parameters(), strict=True),
            *zip(self.momentum["projector"].parameters(), self.projector.parameters(), strict=True),
        ]
        torch._foreach_lerp_([slow for slow, _ in pairs], [fast for _, fast in pairs], 1 - momentum)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        first, second = batch.views
        features = [pooled(self.backbone, view) for view in (first, second)]
        queries = [self.predictor(self.projector(feature)) for feature in features]
        with torch.no_grad():
            slow = self.momentum
            keys = [slow["projector"](pooled(slow["backbone"], view)) for view in (first, second)]
        temperature = self.recipe.temperature
        entropies = [
            info_nce(queries[0], gathered(keys[1]), temperature),
            info_nce(queries[1], gathered(keys[0]), temperature),
        ]
        loss = 2 * temperature * (entropies[0] + entropies[1])
        return {
            "loss": loss,
            "info_nce": (entropies[0] + entropies[1]).detach() / 2,
            "feature_std": spread(features[0]),
        }

    forward = losses

    def exported(self) -> dict[str, Tensor]:
        return weights_of(self.backbone)

    def no_weight_decay(self) -> set[str]:
        return undecayed(self)


def info_nce(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Mean over queries of -log softmax_j(q_i . k_j / T) at its own key; unit vectors, in float32.

    queries: (B, C), whose own keys are the rows of `keys` (all processes' B, C) from this process's on
    """
    queries = functional.normalize(queries.float(), dim=1)
    keys = functional.normalize(keys.float(), dim=1)
    first = len(queries) * (distributed.get_rank() if len(keys) > len(queries) else 0)
    own = torch.arange(first, first + len(queries), device=queries.device)
    return functional.cross_entropy(queries @ keys.T / temperature, own)


def gathered(keys: Tensor) -> Tensor:
    """The keys of all processes, in their order."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return keys
    parts = [torch.empty_like(keys) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, keys.contiguous())
    return torch.cat(parts)


def momentum_at(progress: float, start: float, end: float) -> float:
    """From `start` to `end` along half a cosine, as `progress` goes from 0 to 1."""
    return end - (end - start) * (1 + math.cos(math.pi * progress)) / 2


def pooled(backbone: VisionTransformer, images: Tensor) -> Tensor:
    """The encoder's output (B, C): the normed class token, or the mean of normed patch tokens."""
    return backbone.forward_head(backbone.forward_features(images), pre_logits=True)


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers without bias, batch norm and ReLU between, batch norm without parameters at the end."""
    layers: list[nn.Module] = []
    last = len(widths) - 2
    for number, (before, after) in enumerate(itertools.pairwise(widths)):
        layers.append(nn.Linear(before, after, bias=False))
        layers += (
            [nn.BatchNorm1d(after), nn.ReLU()] if number < last else [nn.BatchNorm1d(after, affine=False)]
        )
    return nn.Sequential(*layers)
