"""Random numbers of pictures: each from its own generator, whatever the batch that it is in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Draws = Sequence[torch.Generator | None]  # each picture's own; None draws from torch's


def normals(shape: tuple[int, ...], draws: Draws) -> Tensor:
    """N(0, I) on the CPU, (len(draws), *shape): row i from the i-th generator, which draws on its own device."""
    return torch.stack([torch.randn(shape, generator=g, device=_device(g)).cpu() for g in draws])


def uniforms(shape: tuple[int, ...], draws: Draws) -> Tensor:
    """U[0, 1) on the CPU, (len(draws), *shape): as `normals`."""
    return torch.stack([torch.rand(shape, generator=g, device=_device(g)).cpu() for g in draws])


def alike(batch: int) -> Draws:
    """A generator of seed 0 for each picture, so that all have the same draws."""
    return [torch.Generator().manual_seed(0) for _ in range(batch)]


def _device(generator: torch.Generator | None) -> torch.device | str:
    return "cpu" if generator is None else generator.device
