"""BEiT's networks as timm's."""

from __future__ import annotations

from timm.models.beit import Beit

from probekit.models.timm import check_multiple

SHAPES = {"b": (768, 12, 12, 0.1), "l": (1024, 16, 24, 1e-5)}
"""Width, heads, layers, initial layer scale."""


def build(variant: str, *, image_size: tuple[int, int] | None = None) -> Beit:
    """A Vision Transformer with relative-position biases, layer scale and no bias on the keys.

    Pre-trained: one table of biases for all blocks, `norm`, no classifier. Fine-tuned (``-ft``): a table
    in each block, the patches' mean through `fc_norm`, a classifier of 1,000 classes. LayerNorm's eps is
    1e-6 (Bao et al. 2022, section 2.5 and appendix; the authors' modeling_pretrain.py and
    modeling_finetune.py).
    image_size: (rows, columns), multiples of 16; 224 x 224 by default
    """
    size = tuple(image_size or (224, 224))
    check_multiple(size, (16, 16), f"beit:{variant}")
    width, heads, layers, scale = SHAPES[variant.split("-")[1].removesuffix("16")]
    tuned = variant.endswith("-ft")
    return Beit(
        img_size=size,
        patch_size=16,
        embed_dim=width,
        depth=layers,
        num_heads=heads,
        num_classes=1000 if tuned else 0,
        global_pool="avg" if tuned else "token",
        init_values=scale,
        use_abs_pos_emb=False,
        use_rel_pos_bias=tuned,
        use_shared_rel_pos_bias=not tuned,
    )
