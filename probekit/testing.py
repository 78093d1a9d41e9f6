"""For authors of metrics: a layer from plain tensors, a tiny ViT, and the checks every metric has to pass.

    layer = make_layer(attention=torch.eye(16).expand(2, 3, 16, 16), grid=(4, 4))
    assert (MyMetric().measure(layer)["mine"] == 0).all()
    check_metric(MyMetric)

Needs no test framework. `check_metric` is in probekit.conformance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probekit.anatomy import LayerInfo, WindowGroup
from probekit.errors import UsageError
from probekit.layer import Layer, Scores
from probekit.metric import Metric, Row
from probekit.models.model import seeded

if TYPE_CHECKING:
    from probekit.plugins.catalog import Catalog

__all__ = ["TinyViT", "check_metric", "make_layer"]


def make_layer(
    attention: Tensor | None = None,
    q: Tensor | None = None,
    k: Tensor | None = None,
    scale: float | None = None,
    tokens: Tensor | None = None,
    grid: tuple[int, int] = (14, 14),
    stride: float = 16,
    prefix: int = 0,
    name: str = "layer",
    *,
    v: Tensor | None = None,
    window: int | None = None,
) -> Layer:
    """A layer of N = rows * columns patch tokens, as a metric sees it, made of plain tensors.

    attention: (B, H, T, T) with T = prefix + N, prefix tokens first; rows sum to 1
    q, k, v:   (B, H, T, d) instead; the scores are scale * q k^T, scale by default d ** -0.5
    tokens:    (B, N, C) or (B, T, C): `tokens` of a token site, and tokens_in, tokens_mid and tokens_out
    stride:    pixels between neighbouring tokens
    window:    side of square attention windows. Then `attention`, q, k and v are of windows in raster order,
               (B * W, H, window ** 2, ...), image-major

    With nothing given, q, k, v and tokens of 2 images and 3 heads are random but always the same. Raises
    `UsageError` for tensors that don't fit the grid.
    """
    rows, columns = grid
    total = prefix + rows * columns
    if all(t is None for t in (attention, q, k, v, tokens)):
        generator = torch.Generator().manual_seed(0)
        windows, length = (1, total) if window is None else (rows * columns // window**2, window**2)
        q, k, v = torch.randn(3, 2 * windows, 3, length, 8, generator=generator).unbind()
        tokens = torch.randn(2, total, 24, generator=generator)
    info = _info(grid, stride, prefix, name, window, tokens)
    length = total if window is None else window**2
    for what, t, axes in (
        ("attention", attention, (2, 3)),
        *((n, t, (2,)) for n, t in (("q", q), ("k", k), ("v", v))),
    ):
        if t is not None and (
            t.dim() != 4 or any(t.shape[a] != length for a in axes) or len(t) % info.windows
        ):
            raise UsageError(
                f"'{what}' is {tuple(t.shape)}, but a grid of {rows} x {columns} with {prefix} prefix tokens "
                f"has {length} tokens in each of {info.windows} windows"
            )
    if tokens is not None and (tokens.dim() != 3 or tokens.shape[1] not in (total, total - prefix)):
        raise UsageError(
            f"'tokens' is {tuple(tokens.shape)}, not (B, {total - prefix}, C) or (B, {total}, C)"
        )
    if (q is None) != (k is None):
        raise UsageError("'q' and 'k' go together")
    captured, shapes = _captured(attention, q, k, v, scale), []
    if tokens is not None:
        patches, before = tokens[:, tokens.shape[1] - rows * columns :].float(), tokens[:, :prefix].float()
        for site in ("tokens", "tokens_in", "tokens_mid", "tokens_out"):
            captured |= {site: patches, f"prefix:{site}": before}
        shapes.append(len(tokens))
    heads = next((t for t in (attention, q, v) if t is not None), None)
    if heads is not None:
        shapes.append(len(heads) // info.windows)
        info = replace(info, heads=heads.shape[1])
    if len(set(shapes)) > 1:
        raise UsageError(f"attention is of {shapes[1]} images, tokens are of {shapes[0]}")
    site = "attention" if heads is not None else "out"
    row = Row(name, 1.0, site, info.part, info.stage, info.heads, grid, info.stride)
    return Layer(info, row, shapes[0], captured)


def _info(
    grid: tuple[int, int], stride: float, prefix: int, name: str, window: int | None, tokens: Tensor | None
) -> LayerInfo:
    rows, columns = grid
    if window is not None and (prefix or rows % window or columns % window):
        raise UsageError(
            f"windows of {window} x {window} don't divide a grid of {rows} x {columns} and prefix {prefix}"
        )
    y, x = np.divmod(np.arange(rows * columns), columns)
    positions = (np.stack([y, x], 1) + 0.5) * stride
    numbers = np.arange(rows * columns)[None]
    if window is not None:
        cut = numbers.reshape(rows // window, window, columns // window, window)
        numbers = cut.transpose(0, 2, 1, 3).reshape(-1, window**2)
    places = np.tile(np.arange(numbers.shape[1]) + prefix, (len(numbers), 1))
    group = WindowGroup(np.arange(len(numbers)), places, places, numbers, positions[numbers])
    return LayerInfo(
        index=0,
        name=name,
        depth=1,
        part="encoder",
        stage=0,
        role="tokens",
        kind="explicit",
        heads=0,
        prefix=prefix,
        width=tokens.shape[-1] if tokens is not None else None,
        grid=grid,
        stride=(float(stride), float(stride)),
        positions=positions,
        windows=len(numbers),
        groups=(group,),
        starts=True,
    )


def _captured(
    attention: Tensor | None, q: Tensor | None, k: Tensor | None, v: Tensor | None, scale: float | None
) -> dict[str, Any]:
    captured: dict[str, Any] = {}
    if attention is not None:
        captured["scores"] = Scores(probabilities=attention.float())
    if q is not None and k is not None:
        captured |= {"q": q, "k": k}
        captured.setdefault("scores", Scores(q, k, q.shape[-1] ** -0.5 if scale is None else scale))
    if v is not None:
        captured["v"] = v
        if "scores" in captured:
            captured["heads"] = captured["scores"].full() @ v.float()
    return captured


class TinyViT(nn.Module):
    """A ViT of a few thousand random weights, the same for the same arguments; returns 5 logits.

    attend:   what computes attention from q (scaled), k and v (B, heads, tokens, d)
    prefix:   CLS and register tokens in front
    """

    def __init__(
        self,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
        *,
        width: int = 24,
        heads: int = 3,
        depth: int = 2,
        patch: int = 8,
        prefix: int = 1,
        seed: int = 0,
    ):
        super().__init__()
        with seeded(seed):
            self.patch = nn.Conv2d(3, width, patch, patch)
            self.prefix = nn.Parameter(torch.randn(1, prefix, width))
            self.blocks = nn.ModuleList(TinyBlock(width, heads, attend) for _ in range(depth))
            self.head = nn.Linear(width, 5)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.prefix.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class TinyAttention(nn.Module):
    """Multi-head self-attention with far from uniform maps."""

    def __init__(self, width: int, heads: int, attend: Callable[[Tensor, Tensor, Tensor], Tensor] | None):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.attend = attend or (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=1.0))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        with torch.no_grad():
            self.qkv.weight[: 2 * width] *= 3

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(self.attend(q * self.scale, k, v).transpose(1, 2).flatten(2))


class TinyBlock(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, attend: Callable[[Tensor, Tensor, Tensor], Tensor] | None):
        super().__init__()
        self.attn = TinyAttention(width, heads, attend)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def check_metric(metric: Metric | type[Metric], catalog: Catalog | None = None) -> None:
    """Check that a metric keeps its contract. Raises `MetricError` with the first thing that is wrong.

    Its attributes; that `measure` returns what `dims` declares, finite, the same for an image whatever the
    others in its batch, on whole layers and on windows, and changes no tensor it was given; that `describe`
    and `summarize` work, and `probekit.probe` on a `TinyViT`.

    catalog: where the metric is looked up that it draws on; by default what is installed
    """
    from probekit.conformance import check

    check(metric, catalog)
