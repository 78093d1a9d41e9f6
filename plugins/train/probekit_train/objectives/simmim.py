"""SimMIM: pixels of masked squares from the others, through a one-layer head (Xie et al., CVPR 2022)."""

from __future__ import annotations

import math

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from probekit.errors import UsageError
from probekit_train.backbone import embedded, through_blocks
from probekit_train.objectives import Batch, spread, undecayed, weights_of
from probekit_train.recipe import HybridRecipe, SimmimRecipe


class MaskedPixels(nn.Module):
    """Mask tokens take the place of masked patches' embeddings; the head gives every patch's pixels."""

    def __init__(self, backbone: VisionTransformer, recipe: SimmimRecipe | HybridRecipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.backbone = backbone
        patch, grid = backbone.patch_embed.patch_size, backbone.patch_embed.grid_size
        if patch[0] != patch[1]:
            raise UsageError(f"SimMIM's head needs square patches, not {patch[0]} x {patch[1]}")
        if recipe.mask_unit % patch[0] or any(side * patch[0] % recipe.mask_unit for side in grid):
            raise UsageError(
                f"masked squares of {recipe.mask_unit} px don't fit images of {recipe.img_size} px in patches"
                f" of {patch[0]} px",
                hint=f"a multiple of {patch[0]} that divides the image: `--set mask_unit={2 * patch[0]}`",
            )
        self.unit = recipe.mask_unit // patch[0]
        squares = grid[0] // self.unit * (grid[1] // self.unit)
        if hidden_squares(squares, recipe.mask_ratio) == squares:
            raise UsageError(
                f"masked squares of {recipe.mask_unit} px at a ratio of {recipe.mask_ratio:g} hide the whole"
                f" image: {squares} of {squares}",
                hint="a smaller `--set mask_unit=...` or `--set mask_ratio=...`",
            )
        self.mask_token = nn.Parameter(torch.zeros(1, 1, backbone.embed_dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.decoder = nn.Sequential(
            nn.Conv2d(backbone.embed_dim, 3 * patch[0] ** 2, 1), nn.PixelShuffle(patch[0])
        )

    def begin_step(self, progress: float) -> None:
        """Nothing changes along the schedule."""

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        images = batch.views[0]
        grid = self.backbone.patch_embed.grid_size
        mask = unit_mask(len(images), grid, self.unit, self.recipe.mask_ratio, images.device)
        tokens, guess = self.reconstruct(images, mask)
        side = self.backbone.patch_embed.patch_size[0]
        pixels = mask.repeat_interleave(side, 1).repeat_interleave(side, 2)
        features = tokens[:, self.backbone.num_prefix_tokens :].mean(dim=1)
        return {"loss": masked_l1(images, guess.float(), pixels), "feature_std": spread(features)}

    forward = losses

    def reconstruct(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Normed tokens (B, tokens, C) and all pixels (B, 3, H, W). mask: (B, rows, columns) of 0 and 1"""
        vit = self.backbone
        patches = embedded(vit, images)
        hidden = mask.flatten(1)[..., None].to(patches.dtype)
        patches = patches * (1 - hidden) + self.mask_token.to(patches.dtype) * hidden
        tokens = through_blocks(vit, vit._pos_embed(patches))
        plane = tokens[:, vit.num_prefix_tokens :].transpose(1, 2).unflatten(2, vit.patch_embed.grid_size)
        return tokens, self.decoder(plane)

    def exported(self) -> dict[str, Tensor]:
        return weights_of(self.backbone)

    def no_weight_decay(self) -> set[str]:
        return undecayed(self)


def masked_l1(images: Tensor, guess: Tensor, mask: Tensor) -> Tensor:
    """sum |x - x^| mask / (sum mask + 1e-5) / 3, as published.

    images, guess: (B, 3, H, W); mask: (B, H, W), 1 where hidden
    """
    return ((images - guess).abs() * mask[:, None]).sum() / (mask.sum() + 1e-5) / images.shape[1]


def hidden_squares(squares: int, ratio: float) -> int:
    return math.ceil(squares * ratio)


def unit_mask(count: int, grid: tuple[int, int], unit: int, ratio: float, device: torch.device) -> Tensor:
    """Random masks (count, rows, columns) of 0 and 1, ceil(squares x ratio) squares of `unit` patches."""
    rows, columns = grid[0] // unit, grid[1] // unit
    hidden = hidden_squares(rows * columns, ratio)
    order = torch.rand(count, rows * columns, device=device).argsort(dim=1)
    mask = torch.zeros(count, rows * columns, device=device).scatter_(1, order[:, :hidden], 1.0)
    return mask.view(count, rows, columns).repeat_interleave(unit, 1).repeat_interleave(unit, 2)
