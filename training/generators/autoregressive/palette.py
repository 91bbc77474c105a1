"""Colours as codes, for pictures that are drawn pixel by pixel.

Chen et al. 2020 (image GPT), section 3.2: k-means over the training pixels' colours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sd_mini.autoencoder.model import spread_vectors
from sd_mini.errors import UserError

ROUNDS = 20


def palette_of(latents: Tensor, count: int) -> Tensor:
    """Latents (N, C, h, w) => the `count` vectors that stand for their cells, (count, C): Lloyd's k-means, seeded.

    Raises UserError where the cells have fewer colours than that.
    """
    vectors = latents.permute(0, 2, 3, 1).flatten(0, 2)
    if (distinct := len(vectors.unique(dim=0))) < count:
        raise UserError(f"palette {count}: the training pictures have {distinct} colours; expected at most so many")
    colours = spread_vectors(vectors, count, torch.Generator().manual_seed(0))
    for _ in range(ROUNDS):
        nearest = torch.cdist(vectors, colours).argmin(1)
        sums = torch.zeros_like(colours).index_add_(0, nearest, vectors)
        uses = nearest.bincount(minlength=count)[:, None]
        colours = torch.where(uses > 0, sums / uses.clamp(min=1), colours)
    return colours


def nearest_codes(latents: Tensor, codes: Tensor) -> Tensor:
    """Latents (B, C, h, w) => the nearest of the vectors (K, C) at each cell, (B, h w) int64, in raster order."""
    return torch.cdist(latents.flatten(2).transpose(1, 2), codes[None]).argmin(-1)
