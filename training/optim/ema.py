"""Averages of the weights with power-function profiles, and any other width made from their snapshots afterwards.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models" (EDM2), sec. 3 and app. C.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sd_mini.errors import UserError
from training.distributed.sharding import own_part

WIDTHS = (0.05, 0.10)
"""the relative widths that are tracked; any other is made of their snapshots (EDM2, sec. 3.2)"""


class PowerEMA:
    """Averages of one set of tensors, one for each of WIDTHS; the trained tensors themselves are never touched.

    An average is as wide, relative to the steps so far, as its width says (its standard deviation over the step): it
    forgets the random start by itself and needs no warm-up. EDM2, sec. 3.1.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        self.averages = {width: [t.detach().clone() for t in tensors] for width in WIDTHS}
        self._gammas = {width: gamma_of_width(width) for width in WIDTHS}

    @torch.no_grad()
    def update(self, tensors: Sequence[Tensor], step: int, before: int) -> None:
        """Fold in the tensors as they are after optimizer update number `step`, from 1 on; last done after `before`.

        They stand for all updates since then, so an average that is brought up to date every fourth one keeps its
        profile in steps of four.
        """
        new = [own_part(t.detach()) for t in tensors]
        for width, average in self.averages.items():
            # beta(t) = (1 - 1/t)^(gamma + 1) an update, EDM2, eq. 127; the product over those since `before`
            beta = (before / step) ** (self._gammas[width] + 1)
            torch._foreach_lerp_([own_part(t) for t in average], new, 1 - beta)


def nearest_width(width: float) -> float:
    """The tracked width that comes closest, for looks during training."""
    return min(WIDTHS, key=lambda tracked: abs(tracked - width))


def gamma_of_width(width: float) -> float:
    """Relative width => the power function's exponent. EDM2, eq. 126: width = sqrt(g + 1) / ((g + 2) sqrt(g + 3)).

    The width falls from 0.289 at g = 0 towards 0, so a bisection finds g. Raises ValueError outside (0, 0.28].
    """
    if not 0 < width <= 0.28:
        raise UserError(f"ema_width {width}: expected above 0 and at most 0.28 (0.05 and 0.10 are usual)")
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        wide = (middle + 1) ** 0.5 / ((middle + 2) * (middle + 3) ** 0.5)
        low, high = (middle, high) if wide > width else (low, middle)
    return (low + high) / 2


def posthoc_coefficients(snapshots: Sequence[tuple[int, float]], step: int, width: float) -> np.ndarray:
    """How much of each snapshot, taken at (step, width), makes up the average of `width` at `step`: (N,), sum 1.

    The least-squares fit of the profiles, EDM2, sec. 3.2 and algorithm 3, divided by its sum as in their
    `solve_posthoc_coefficients`: else the average of weights that stand still would not be these weights. Raises
    UserError where no snapshot was taken at `step`: the newest weights would be missing.
    """
    if not any(taken == step for taken, _ in snapshots):
        raise UserError(f"ema_width {width} at step {step}: expected a snapshot of that step; there is none")
    steps = np.array([taken for taken, _ in snapshots], dtype=np.float64)
    gammas = np.array([gamma_of_width(wide) for _, wide in snapshots])
    gram = _overlap(steps[:, None], gammas[:, None], steps[None, :], gammas[None, :])
    wanted = _overlap(steps, gammas, np.float64(step), np.float64(gamma_of_width(width)))
    fitted = np.linalg.lstsq(gram, wanted, rcond=None)[0]
    return fitted / fitted.sum()


def _overlap(step_a: np.ndarray, gamma_a: np.ndarray, step_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """The inner product over time of two power-function profiles. EDM2, app. C.3."""
    ratio = step_a / step_b
    exponent = np.where(step_a < step_b, gamma_b, -gamma_a)
    numerator = (gamma_a + 1) * (gamma_b + 1) * ratio**exponent
    return numerator / ((gamma_a + gamma_b + 1) * np.maximum(step_a, step_b))
