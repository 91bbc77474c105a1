"""Exponential moving average of the weights with a power-function profile."""

from __future__ import annotations

import copy

import torch
from torch import nn


class PowerEMA:
    """`module` is a copy of the trained one whose weights are the average; the trained weights are never touched.

    The average is as wide, relative to the steps so far, as `width` says (its standard deviation over the step): it
    forgets the random start by itself and needs no warm-up. Karras et al. 2024 (EDM2), sec. 3.1.
    """

    def __init__(self, module: nn.Module, width: float):
        self.gamma = gamma_of_width(width)
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Fold in the weights after optimizer update number `step`, counted from 1."""
        # beta(t) = (1 - 1/t)^(gamma + 1). EDM2, eq. 127
        beta = (1 - 1 / step) ** (self.gamma + 1)
        average, new = list(self.module.parameters()), [p.detach() for p in module.parameters()]
        torch._foreach_lerp_(average, new, 1 - beta)
        for kept, buffer in zip(self.module.buffers(), module.buffers(), strict=True):
            kept.copy_(buffer)


def gamma_of_width(width: float) -> float:
    """Relative width => the power function's exponent. EDM2, eq. 126: width = sqrt(g + 1) / ((g + 2) sqrt(g + 3)).

    The width falls from 0.289 at g = 0 towards 0, so a bisection finds g. Raises ValueError outside (0, 0.28].
    """
    if not 0 < width <= 0.28:
        raise ValueError(f"ema_width {width}: expected above 0 and at most 0.28 (0.05 and 0.10 are usual)")
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        wide = (middle + 1) ** 0.5 / ((middle + 2) * (middle + 3) ** 0.5)
        low, high = (middle, high) if wide > width else (low, middle)
    return (low + high) / 2
