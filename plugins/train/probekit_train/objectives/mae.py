"""MAE: an encoder of the visible patches and a decoder of all (He et al., CVPR 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from probekit.models.sincos import sincos_positions
from probekit_train.backbone import embedded, through_blocks
from probekit_train.objectives import Batch, spread, undecayed, weights_of
from probekit_train.recipe import MaeRecipe

_NORM = partial(nn.LayerNorm, eps=1e-6)


class Autoencoder(nn.Module):
    """Encoder and decoder, with the published names of the decoder's parts.

    Called with images (B, 3, H, W) it hides nothing, keeps the image's order, and gives each patch's
    pixels (B, patches, patch * patch * 3): what probekit watches.
    """

    def __init__(self, encoder: VisionTransformer, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.encoder = encoder
        grid, patch = encoder.patch_embed.grid_size, encoder.patch_embed.patch_size
        positions = sincos_positions(grid, width, rows_first=False)
        prefix = torch.zeros(1, encoder.num_prefix_tokens, width)
        self.decoder_embed = nn.Linear(encoder.embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(
            torch.cat([prefix, positions[:, 1:]], dim=1), requires_grad=False
        )
        self.decoder_blocks = nn.ModuleList(
            Block(width, heads, qkv_bias=True, norm_layer=_NORM) for _ in range(depth)
        )
        self.decoder_norm = _NORM(width)
        self.decoder_pred = nn.Linear(width, 3 * patch[0] * patch[1])
        for part in self.children():
            if part is not encoder:
                part.apply(_initialise)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        return self.decode(self.encoder.forward_features(images))

    def encode(self, images: Tensor, kept: Tensor) -> Tensor:
        """Normed tokens of the prefix and of the patches `kept` (B, visible)."""
        vit = self.encoder
        tokens = vit._pos_embed(embedded(vit, images))
        prefix, patches = tokens[:, : vit.num_prefix_tokens], tokens[:, vit.num_prefix_tokens :]
        visible = patches.gather(1, kept[..., None].expand(-1, -1, patches.shape[2]))
        return through_blocks(vit, torch.cat([prefix, visible], dim=1), self._mask(kept))

    def decode(self, tokens: Tensor, kept: Tensor | None = None) -> Tensor:
        """Pixels of all patches. kept: the patches `tokens` are of, all in order by default"""
        x = self.decoder_embed(tokens)
        if kept is not None:
            prefix = self.encoder.num_prefix_tokens
            count = self.encoder.patch_embed.num_patches
            hidden = self.mask_token.to(x.dtype).expand(len(x), count, -1)
            index = kept[..., None].expand(-1, -1, x.shape[2])
            x = torch.cat([x[:, :prefix], hidden.scatter(1, index, x[:, prefix:])], dim=1)
        x = x + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, self.encoder.num_prefix_tokens :]

    def _mask(self, kept: Tensor) -> Tensor | None:
        """The part of a local attention's mask that is about the visible tokens, (B, 1, tokens, tokens)."""
        mask = getattr(self.encoder.blocks[0].attn, "local_mask", None)
        if mask is None:
            return None
        prefix = torch.arange(self.encoder.num_prefix_tokens, device=kept.device).expand(len(kept), -1)
        index = torch.cat([prefix, kept + self.encoder.num_prefix_tokens], dim=1)
        return mask[index[:, :, None], index[:, None, :]][:, None]

    def published(self) -> dict[str, Tensor]:
        """The state by MAE's names: the encoder's at the top, the decoder's beside them."""
        return {name.removeprefix("encoder."): value for name, value in weights_of(self).items()}


def by_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `Autoencoder.published` gave, by the module's own names."""
    own = ("decoder_", "mask_token")
    return {name if name.startswith(own) else f"encoder.{name}": value for name, value in state.items()}


class MaskedAutoencoding(nn.Module):
    """The training of an `Autoencoder`."""

    def __init__(self, backbone: VisionTransformer, recipe: MaeRecipe) -> None:
        super().__init__()
        self.recipe = recipe
        size = recipe.decoder_width, recipe.decoder_depth, recipe.decoder_heads
        self.autoencoder = Autoencoder(backbone, *size)
        self.visible = max(1, int(backbone.patch_embed.num_patches * (1 - recipe.mask_ratio)))

    def begin_step(self, progress: float) -> None:
        """Nothing changes along the schedule."""

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        images = batch.views[0]
        patch = self.autoencoder.encoder.patch_embed
        order = torch.rand(len(images), patch.num_patches, device=images.device).argsort(dim=1)
        kept = order[:, : self.visible]
        tokens = self.autoencoder.encode(images, kept)
        guess = self.autoencoder.decode(tokens, kept).float()
        hidden = torch.ones_like(order, dtype=guess.dtype).scatter_(1, kept, 0.0)
        target = patches_of(images, patch.patch_size, normalise=self.recipe.normalise_target)
        features = tokens[:, self.autoencoder.encoder.num_prefix_tokens :].mean(dim=1)
        return {"loss": masked_square(target, guess, hidden), "feature_std": spread(features)}

    forward = losses

    def exported(self) -> dict[str, Tensor]:
        return self.autoencoder.published()

    def no_weight_decay(self) -> set[str]:
        return undecayed(self)


def patches_of(images: Tensor, patch: tuple[int, int], *, normalise: bool) -> Tensor:
    """Pixels (B, patches, patch * patch * 3), channels last; by each patch's mean and deviation, or plain."""
    count, _, height, width = images.shape
    rows, columns = height // patch[0], width // patch[1]
    cut = images.reshape(count, 3, rows, patch[0], columns, patch[1])
    pixels = cut.permute(0, 2, 4, 3, 5, 1).reshape(count, rows * columns, -1)
    if not normalise:
        return pixels
    return (pixels - pixels.mean(-1, keepdim=True)) / (pixels.var(-1, keepdim=True) + 1e-6).sqrt()


def masked_square(target: Tensor, guess: Tensor, hidden: Tensor) -> Tensor:
    """Mean squared error over the hidden patches. target, guess: (B, N, D); hidden: (B, N) of 0 and 1"""
    return ((guess - target).square().mean(dim=-1) * hidden).sum() / hidden.sum()


def _initialise(part: nn.Module) -> None:
    if isinstance(part, nn.Linear):
        nn.init.trunc_normal_(part.weight, std=0.02)
        nn.init.zeros_(part.bias)
