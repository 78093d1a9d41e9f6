"""Fixed 2-D sine-cosine position embeddings, as MoCo v3 and MAE use them."""

from __future__ import annotations

import torch
from torch import Tensor


def sincos_positions(grid: tuple[int, int], width: int, *, rows_first: bool = True) -> Tensor:
    """The embedding (1, 1 + rows * columns, width), float32, of a class token (zeros) and a raster grid.

    Of each half of the channels one codes the row and one the column: sin then cos of position times
    10000 ** (-i / (width / 4)). MoCo v3 puts the rows first, MAE the columns; otherwise they are equal
    (METRICS.md part II; Chen et al. 2021, section 4; He et al. 2022, appendix A).
    """
    if width % 4:
        raise ValueError(f"the width must be a multiple of 4, not {width}")
    rows, columns = grid
    frequency = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))

    def code(positions: Tensor) -> Tensor:
        angle = positions[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    row = code(torch.arange(rows, dtype=torch.float64)).repeat_interleave(columns, dim=0)
    column = code(torch.arange(columns, dtype=torch.float64)).repeat(rows, 1)
    tokens = torch.cat([row, column] if rows_first else [column, row], dim=1)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), tokens])[None].float()
