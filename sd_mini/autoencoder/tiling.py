"""Large pictures in overlapping squares: memory by the square, not by the picture."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from math import ceil

import torch
from torch import Tensor, nn

from sd_mini.errors import UserError
from sd_mini.offload import device_of

SMALLEST = 8  # cells a side of a tile
_BLENDED = 2  # cells over which one tile goes over into the next


def in_tiles(decode: Callable[[Tensor], Tensor], latents: Tensor, tile: int, stride: int, reach: int) -> Tensor:
    """latents (B, C, h, w) => pixels (B, 3, stride h, stride w), `decode` seeing at most tile x tile cells at a time.

    Neighbours overlap by twice `reach`, how many cells a pixel depends on in each direction, and two more, over which
    they are blended, but by no more than half a tile. Convolutions make of tiles of at least 4 reach + 4 cells what
    they make of the whole, to rounding. Group norm and attention (AutoencoderKL, VQModel) look at all of a tile: their
    pictures differ from the whole, without a seam.
    Raises ValueError for a `tile` of less than 8.
    """
    check_tile(tile)
    margin = min(reach, (tile // 2 - _BLENDED) // 2)
    height, width = latents.shape[-2:]
    rows, columns = (_starts(side, tile, 2 * margin + _BLENDED) for side in (height, width))
    total: Tensor | None = None
    weights: Tensor | None = None
    for top, left in product(rows, columns):
        part = decode(latents[:, :, top : top + tile, left : left + tile])
        down = _ramp(top, tile, height, stride, margin).to(part)
        weight = down[:, None] * _ramp(left, tile, width, stride, margin).to(part)
        if total is None or weights is None:
            total = part.new_zeros(*part.shape[:2], height * stride, width * stride)
            weights = part.new_zeros(height * stride, width * stride)
        place = (..., slice(top * stride, (top + tile) * stride), slice(left * stride, (left + tile) * stride))
        total[place] += part * weight
        weights[place] += weight
    assert total is not None and weights is not None  # a grid has a tile at least
    return total / weights


def check_tile(tile: int) -> None:
    if tile < SMALLEST:
        raise UserError(f"tile {tile}: expected at least {SMALLEST} latent cells a side")


@torch.no_grad()
def reach_of(decode: Callable[[Tensor], Tensor], network: nn.Module, channels: int) -> int:
    """How many cells around its own a pixel depends on at most: the convolutions' half widths, each in cells of where
    it stands. `decode` runs `network` once on a few cells to find out."""
    parameter, side = next(network.parameters()), 4
    reached = [0.0]

    def add(layer: nn.Conv2d, _: object, out: Tensor) -> None:
        reached.append((layer.kernel_size[0] // 2) * side / out.shape[-1])

    hooks = [layer.register_forward_hook(add) for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    try:
        decode(torch.zeros(1, channels, side, side, device=device_of(network), dtype=parameter.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    # and what enlarging by interpolation looks at
    return ceil(sum(reached)) + 1


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along a side: evenly, the last one ending with it."""
    if length <= tile:
        return [0]
    count = ceil((length - overlap) / (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def _ramp(start: int, tile: int, length: int, stride: int, margin: int) -> Tensor:
    """A tile's weight along one side, for each pixel: 1, going down to 0 where a neighbour takes over."""
    size = min(tile, length)
    at = (torch.arange(size * stride) + 0.5) / stride
    weight = torch.ones(size * stride)
    if start > 0:
        weight = weight * ((at - margin) / _BLENDED).clamp(0, 1)
    if start + size < length:
        weight = weight * ((size - at - margin) / _BLENDED).clamp(0, 1)
    return weight
