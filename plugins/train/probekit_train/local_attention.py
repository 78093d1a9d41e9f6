"""Attention restricted to a neighbourhood (Park et al. 2023, Fig. D.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from probekit.errors import UsageError


def local_mask(grid: tuple[int, int], side: int, prefix: int) -> Tensor:
    """The additive mask (tokens, tokens): -inf where a key's patch is out of the query's reach.

    grid:   (rows, columns) of patches
    side:   of the square of patches a query sees, odd; so a Chebyshev distance of (side - 1) / 2
    prefix: tokens before the patches, which see everything and are always seen
    """
    rows, columns = torch.meshgrid(*(torch.arange(length) for length in grid), indexing="ij")
    place = torch.stack([rows.flatten(), columns.flatten()], dim=1)
    distance = (place[:, None] - place[None]).abs().amax(dim=2)
    mask = torch.zeros(prefix + len(place), prefix + len(place))
    mask[prefix:, prefix:].masked_fill_(distance > (side - 1) // 2, float("-inf"))
    return mask


def restrict(module: nn.Module, side: int) -> None:
    """Give every attention of a ViT of timm the mask, in place, unless its caller gives it one.

    The mask follows copies of the module and its device and is no part of its weights.
    Raises UsageError for a model whose attention takes no mask.
    """
    from timm.layers.attention import Attention

    blocks = getattr(module, "blocks", None)
    embed = getattr(module, "patch_embed", None)
    attentions = [getattr(block, "attn", None) for block in blocks] if blocks is not None else []
    if embed is None or not attentions or not all(isinstance(one, Attention) for one in attentions):
        raise UsageError(
            f"local attention needs a plain ViT of timm, not a {type(module).__name__}",
            hint="its attention would have to take a mask; 'vit_*' and 'deit_*' do",
        )
    mask = local_mask(embed.grid_size, side, module.num_prefix_tokens)
    for attention in attentions:
        attention.register_buffer("local_mask", mask, persistent=False)
        attention.register_forward_pre_hook(_masked, with_kwargs=True)


def _masked(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    if kwargs.get("attn_mask") is None:
        kwargs = {**kwargs, "attn_mask": module.local_mask}
    return args, kwargs
