"""Arguments of torch's attention functions as q, k, v, scale and an additive bias."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from probekit import attention
from probekit.errors import WatchError


@dataclass(frozen=True)
class Fused:
    """Arguments of one attention call, q, k and v as (lead..., tokens, d)."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    bias: Tensor | None

    def probabilities(self) -> Tensor:
        return attention.probabilities(self.q, self.k, scale=self.scale, bias=self.bias)


_SDPA = ("q", "k", "v", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_SHORT = {"query": "q", "key": "k", "value": "v"}


def fused_arguments(args: Sequence[Any], kwargs: dict[str, Any]) -> Fused:
    """The call's tensors, its mask as an additive bias, grouped queries spelled out."""
    given = dict(zip(_SDPA, args, strict=False)) | {_SHORT.get(k, k): v for k, v in kwargs.items()}
    q, k, v = given["q"], given["k"], given["v"]
    if given.get("enable_gqa"):
        repeats = q.size(-3) // k.size(-3)
        k, v = k.repeat_interleave(repeats, -3), v.repeat_interleave(repeats, -3)
    lead = torch.broadcast_shapes(*(t.shape[:-2] for t in (q, k, v)))  # one head of keys for all (MQA)
    q, k, v = (t.expand(*lead, *t.shape[-2:]) for t in (q, k, v))
    bias = given.get("attn_mask")
    if given.get("is_causal"):
        bias = torch.ones(q.size(-2), k.size(-2), dtype=torch.bool, device=q.device).tril()
    if bias is not None and bias.dtype == torch.bool:
        bias = torch.zeros(bias.shape, device=q.device).masked_fill(~bias, -torch.inf)
    scale = given.get("scale")
    return Fused(q, k, v, float(q.size(-1) ** -0.5 if scale is None else scale), bias)


_MHA = inspect.signature(F.multi_head_attention_forward)


def bind_mha(args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `F.multi_head_attention_forward` by name."""
    bound = _MHA.bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def mha_arguments(bound: dict[str, Any]) -> Fused:
    """What `F.multi_head_attention_forward` computes inside, where no mode can look: its q, k and v.

    Shapes (B, heads, tokens, d). Raises `WatchError` where it attends to more than its arguments.
    """
    if bound["bias_k"] is not None or bound["add_zero_attn"]:
        raise WatchError("nn.MultiheadAttention with 'add_bias_kv' or 'add_zero_attn' can't be watched")
    heads, width = bound["num_heads"], bound["embed_dim_to_check"]
    if bound["use_separate_proj_weight"]:
        weights = [bound[f"{n}_proj_weight"] for n in "qkv"]
    else:
        weights = bound["in_proj_weight"].split(width)
    biases = bound["in_proj_bias"].split(width) if bound["in_proj_bias"] is not None else (None,) * 3

    def project(i: int, name: str) -> Tensor:
        x = bound[name] if bound[name].dim() == 3 else bound[name].unsqueeze(1)
        x = F.linear(x, weights[i], biases[i])
        return x.reshape(x.size(0), x.size(1), heads, -1).permute(1, 2, 0, 3)

    q, k, v = (project(i, n) for i, n in enumerate(("query", "key", "value")))
    bias = None
    for mask, split in ((bound["attn_mask"], (-1, heads)), (bound["key_padding_mask"], None)):
        if mask is None:
            continue
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, device=q.device, dtype=q.dtype).masked_fill(mask, -torch.inf)
        if split is None:
            mask = mask[:, None, None, :]
        elif mask.dim() == 3:
            mask = mask.unflatten(0, split)
        bias = mask if bias is None else bias + mask
    return Fused(q, k, v, q.size(-1) ** -0.5, bias)


def mha_output(bound: dict[str, Any], heads: Tensor) -> Tensor:
    """The result of `F.multi_head_attention_forward` from its heads (B, H, L, d): (L, B, C)."""
    joined = heads.permute(2, 0, 1, 3).flatten(2)
    bias = bound["out_proj_bias"]
    return F.linear(joined, bound["out_proj_weight"].float(), bias.float() if bias is not None else None)
