"""The network that is trained: a ViT of timm, from a plain description that also goes into its checkpoint."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from timm.models import create_model, is_model, list_models
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from probekit.errors import UsageError
from probekit.models.sincos import sincos_positions
from probekit.models.timm import check_multiple
from probekit_train.local_attention import restrict

# Arguments that name files, fetch something, hold code or are set by fields of their own.
_NOT_ARGUMENTS = ("pretrain", "checkpoint", "cache", "script", "export", "features_only", "layer", "_fn")
_OWN_FIELDS = {"img_size": "img_size", "drop_path_rate": "drop_path", "patch_drop_rate": "drop_tokens"}


class Description(BaseModel):
    """Enough to build the network again, in plain data.

    model: a name in timm, or ``vit``; model_args: plain arguments for it
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    model_args: dict[str, Any] = {}
    img_size: int
    positions: str = "learned"
    local_attention: int | None = None
    classes: int = 0
    pool: str = "token"

    def build(self, **training: Any) -> VisionTransformer:
        """The network with random weights. Raises UsageError.

        training: arguments that matter in training alone (drop path, dropped tokens)
        """
        module = self._create(training)
        if not isinstance(module, VisionTransformer):
            raise UsageError(
                f"'{self.model}' of timm is no plain ViT but a {type(module).__name__}",
                hint="take one whose name begins with 'vit_' or 'deit', or 'vit' with `model_args`",
            )
        check_multiple((self.img_size, self.img_size), module.patch_embed.patch_size, self.model)
        if self.positions == "sincos":
            _fix_positions(module, self.model)
        if self.local_attention is not None:
            restrict(module, self.local_attention)
        return module

    def _create(self, training: dict[str, Any]) -> nn.Module:
        for name, value in self.model_args.items():
            if any(part in name for part in _NOT_ARGUMENTS) or not _is_plain(value):
                raise UsageError(f"'model_args' can't have '{name}': plain numbers and words only")
            if name in _OWN_FIELDS:
                raise UsageError(
                    f"'model_args' can't have '{name}'", hint=f"the recipe's '{_OWN_FIELDS[name]}' sets it"
                )
        arguments = {
            **self.model_args,
            **training,
            "img_size": self.img_size,
            "num_classes": self.classes,
        }
        if self.pool != "token":  # the mean of normed tokens, so that the norm keeps its name and place
            arguments |= {"global_pool": self.pool, "fc_norm": False}
        if self.model != "vit" and (not is_model(self.model) or ":" in self.model):
            near = difflib.get_close_matches(self.model, ["vit", *list_models()], n=2, cutoff=0.6)
            hint = (
                f"did you mean {' or '.join(map(repr, near))}?" if near else "a name as timm has it, or 'vit'"
            )
            raise UsageError(f"timm has no model '{self.model}'", hint=hint)
        try:
            if self.model == "vit":
                return VisionTransformer(**arguments)
            return create_model(self.model, pretrained=False, **arguments)
        except (TypeError, AssertionError, ValueError, RuntimeError) as error:
            text = " ".join(str(error).split()).removeprefix("VisionTransformer.__init__() ")
            raise UsageError(f"timm can't build '{self.model}': {text or type(error).__name__}") from error


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


@torch.no_grad()
def _fix_positions(module: VisionTransformer, name: str) -> None:
    if module.pos_embed is None or module.embed_dim % 4:
        raise UsageError(
            f"'{name}' can't have sines and cosines for positions", hint="`--set positions=learned`"
        )
    table = sincos_positions(module.patch_embed.grid_size, module.embed_dim)
    extra = module.pos_embed.shape[1] - (table.shape[1] - 1)
    grid = table[:, 1:]
    module.pos_embed.copy_(torch.cat([torch.zeros(1, extra, module.embed_dim), grid], dim=1))
    module.pos_embed.requires_grad = False


def embedded(module: VisionTransformer, images: Tensor) -> Tensor:
    """Patch embeddings (B, patches, C), before positions and prefix tokens."""
    patches = module.patch_embed(images)
    return patches.flatten(1, 2) if patches.dim() == 4 else patches


def through_blocks(module: VisionTransformer, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Tokens with positions through norm, blocks and the final norm, as timm's own forward does."""
    tokens = module.norm_pre(tokens)
    for block in module.blocks:
        tokens = block(tokens) if mask is None else block(tokens, attn_mask=mask)
    return module.norm(tokens)
