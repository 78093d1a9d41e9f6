"""The masked autoencoder with its decoder, tokens in the image's order throughout."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)


class Decoder(NamedTuple):
    """A decoder's channels, blocks and heads; the published ones are alike whatever the encoder."""

    width: int = 512
    depth: int = 8
    heads: int = 16


class Shape(NamedTuple):
    """An encoder's channels, blocks, heads and patch side in pixels."""

    width: int
    depth: int
    heads: int
    patch: int


class MaskedAutoencoder(nn.Module):
    """MAE's encoder and decoder (He et al. 2022, section 3).

    size:    (rows, columns) of the images
    shape:   the encoder's
    visible: numbers of the patches the encoder sees, ascending, of every image; None: all of them
    decoder: the decoder's shape

    The authors' code shuffles the tokens also at a masking ratio of 0, so that nothing in its encoder
    has a place; here they stay in raster order. Takes images (B, 3, rows, columns), gives the
    decoder's predictions of each patch's pixels, (B, patches, patch * patch * 3).
    """

    def __init__(
        self,
        size: tuple[int, int],
        shape: Shape,
        visible: Tensor | None = None,
        decoder: Decoder = Decoder(),
    ) -> None:
        super().__init__()

        def blocks(width: int, depth: int, heads: int) -> nn.ModuleList:
            one = partial(Block, dim=width, num_heads=heads, qkv_bias=True, norm_layer=LAYER_NORM)
            return nn.ModuleList(one() for _ in range(depth))

        self.patch_embed = PatchEmbed(
            img_size=size, patch_size=shape.patch, in_chans=3, embed_dim=shape.width
        )
        tokens = 1 + self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, shape.width), requires_grad=False)
        self.blocks = blocks(shape.width, shape.depth, shape.heads)
        self.norm = LAYER_NORM(shape.width)
        self.decoder_embed = nn.Linear(shape.width, decoder.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder.width))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, tokens, decoder.width), requires_grad=False)
        self.decoder_blocks = blocks(*decoder)
        self.decoder_norm = LAYER_NORM(decoder.width)
        self.decoder_pred = nn.Linear(decoder.width, shape.patch * shape.patch * 3)
        self.register_buffer("visible", visible, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images) + self.pos_embed[:, 1:]
        seen = patches if self.visible is None else patches.index_select(1, self.visible)
        class_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(images), -1, -1)
        x = torch.cat([class_token, seen], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_embed(self.norm(x))
        if self.visible is not None:
            x = self._with_mask_tokens(x, patches)
        x = x + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def _with_mask_tokens(self, x: Tensor, patches: Tensor) -> Tensor:
        """Class token and visible tokens (B, 1 + visible, C) among mask tokens, (B, 1 + patches, C).

        The zeros are made from the patches, though they hold nothing of them, because the watcher
        learns from that where each mask token is in the image.
        """
        hidden = (torch.zeros_like(patches[..., :1]) + self.mask_token).to(x.dtype)
        return torch.cat([x[:, :1], hidden.index_copy(1, self.visible, x[:, 1:])], dim=1)
