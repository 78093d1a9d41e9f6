"""A hand-written ViT, small enough to run hundreds of times: 4 x 4 tokens of 8 px, 3 layers, 2 heads, CLS.

Named in tests as ``tests/tiny.py:build``. Attention is peaked, so that metrics aren't at their uniform values.
"""

import torch
import torch.nn.functional as F
from torch import nn

from probekit import Model, Preprocessing

SIZE, PATCH, WIDTH, HEADS, DEPTH = 32, 8, 16, 2, 3


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(b, n, c))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TinyViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.cls = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.position = nn.Parameter(torch.randn(1, 1 + (SIZE // PATCH) ** 2, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        for block in self.blocks:
            block.attn.qkv.weight.data[: 2 * WIDTH] *= 4

    def forward(self, images):
        x = self.embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.position
        for block in self.blocks:
            x = block(x)
        return x[:, 0]


def build():
    return Model(TinyViT(), preprocessing=Preprocessing(size=(SIZE, SIZE), crop_pct=1.0))


def other():
    """The same architecture; another name in a grid."""
    return build()


def without_attention():
    return Model(
        nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Flatten()), preprocessing=Preprocessing(size=(SIZE, SIZE))
    )
