"""Large pictures in overlapping squares: memory by the square, not by the picture."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

OVERLAP = 14  # cells that two neighbouring tiles share
_MARGIN = 6  # of these, next to a tile's own edge and left out: there a network sees padding instead of the picture


def in_tiles(decode: Callable[[Tensor], Tensor], latents: Tensor, tile: int, stride: int) -> Tensor:
    """latents (B, C, h, w) => pixels (B, 3, stride h, stride w), `decode` seeing at most tile x tile cells at a time.

    Neighbours share OVERLAP cells and are blended over the middle two of them. A network that sees no further than
    _MARGIN cells, as convolutions without attention and group norm do, makes in tiles what it makes of the whole, to
    rounding. AutoencoderKL's group norm and attention look at all of a tile: its pictures differ, without a seam.
    Raises ValueError for a `tile` that is not larger than twice the overlap.
    """
    check_tile(tile)
    height, width = latents.shape[-2:]
    rows, columns = _starts(height, tile), _starts(width, tile)
    total = weights = None
    for top, left in product(rows, columns):
        part = decode(latents[:, :, top : top + tile, left : left + tile])
        down = _ramp(top, tile, height, stride).to(part)
        weight = down[:, None] * _ramp(left, tile, width, stride).to(part)
        if total is None:
            total = part.new_zeros(*part.shape[:2], height * stride, width * stride)
            weights = part.new_zeros(height * stride, width * stride)
        place = (..., slice(top * stride, (top + tile) * stride), slice(left * stride, (left + tile) * stride))
        total[place] += part * weight
        weights[place] += weight
    return total / weights


def check_tile(tile: int) -> None:
    if tile <= 2 * OVERLAP:
        raise ValueError(f"tile {tile}: expected more than {2 * OVERLAP} cells a side, twice what neighbours share")


def _starts(length: int, tile: int) -> list[int]:
    """Where tiles begin along a side: evenly, the last one ending with it."""
    if length <= tile:
        return [0]
    count = -(-(length - OVERLAP) // (tile - OVERLAP))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def _ramp(start: int, tile: int, length: int, stride: int) -> Tensor:
    """A tile's weight along one side, for each pixel: 1, going down to 0 where a neighbour takes over."""
    size = min(tile, length)
    at = (torch.arange(size * stride) + 0.5) / stride
    reach = OVERLAP - 2 * _MARGIN
    weight = torch.ones(size * stride)
    if start > 0:
        weight = weight * ((at - _MARGIN) / reach).clamp(0, 1)
    if start + size < length:
        weight = weight * ((size - at - _MARGIN) / reach).clamp(0, 1)
    return weight
