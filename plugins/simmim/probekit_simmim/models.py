"""SimMIM's network as timm's Beit."""

from __future__ import annotations

from timm.models.beit import Beit

from probekit.models.timm import check_multiple


def build(variant: str, *, image_size: tuple[int, int] | None = None) -> Beit:
    """ViT-B/16 with one relative-position bias for all blocks, layer scale, and no bias on the keys.

    image_size: (rows, columns), multiples of 16; 224 x 224 by default
    """
    rows, columns = image_size or (224, 224)
    check_multiple((rows, columns), (16, 16), f"simmim:{variant}")
    return Beit(
        img_size=(rows, columns),
        patch_size=16,
        embed_dim=768,
        depth=12,
        num_heads=12,
        num_classes=0,
        global_pool="token",  # the pre-trained file has `norm` and no `fc_norm`
        init_values=0.1,
        use_abs_pos_emb=False,
        use_rel_pos_bias=False,
        use_shared_rel_pos_bias=True,
    )
