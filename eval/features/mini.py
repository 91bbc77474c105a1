"""A small fixed network, to compare sets of small pictures by where no pretrained one is at hand: FD-mini.

Its filters are drawn once, from one seed, and never trained: the same on every machine and for every run. What it
sees is colour, edges and their neighbourhoods, averaged over the picture: textures, shapes and sizes, not places.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, relu

SIDE = 64  # px at which pictures are looked at
WIDTHS = (16, 32, 80)
DIM = sum(WIDTHS)
_GAIN = 3.0  # brings the features to about unit length a filter, where the cubic kernel has room


class Mini(nn.Module):
    """(n, 3, H, W) uint8 => (n, 128) float32: the mean of each filter of three levels."""

    gain: Tensor

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        widths = (3, *WIDTHS)
        for level, (narrow, wide) in enumerate(pairwise(widths)):
            filters = torch.randn(wide, narrow, 3, 3, generator=draw) * (2 / (9 * narrow)) ** 0.5  # He et al. 2015
            self.register_buffer(f"filters_{level}", filters)
        self.register_buffer("gain", torch.tensor(_GAIN))  # a weight like the others, so that it counts in their hash

    def forward(self, pictures: Tensor) -> Tensor:
        x = pictures.float() / 127.5 - 1
        if x.shape[2:] != (SIDE, SIDE):
            x = interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
        x = x.contiguous(memory_format=torch.channels_last)  # twice as fast on a CPU
        seen = []
        for level in range(len(WIDTHS)):
            filters = getattr(self, f"filters_{level}").contiguous(memory_format=torch.channels_last)
            x = relu(nn.functional.conv2d(x, filters, padding=1), inplace=True)
            seen.append(x.mean((2, 3)))
            x = avg_pool2d(x, 2)
        return self.gain * torch.cat(seen, dim=1)
