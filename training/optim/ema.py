"""Averages of the weights with power-function profiles, and any other width made from their snapshots afterwards.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models" (EDM2), sec. 3 and app. C.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sd_mini.errors import UserError

WIDTHS = (0.05, 0.10)
"""the relative widths that are tracked; any other is computed from their snapshots (EDM2, sec. 3.2)"""


def nearest_width(width: float) -> float:
    """The closest tracked width, for inspection during training."""
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
    """Weights (N,), sum 1, of snapshots at (step, width), whose weighted sum is the average of `width` at `step`.

    The least-squares fit of the profiles, EDM2, sec. 3.2 and algorithm 3, divided by its sum as in their
    `solve_posthoc_coefficients`: else the average of constant weights would not be these weights. Raises
    UserError where no snapshot was taken at `step`: the newest weights would be missing.
    """
    if not any(snapshot_step == step for snapshot_step, _ in snapshots):
        raise UserError(f"ema_width {width} at step {step}: expected a snapshot of that step; there is none")
    steps = np.array([snapshot_step for snapshot_step, _ in snapshots], dtype=np.float64)
    gammas = np.array([gamma_of_width(wide) for _, wide in snapshots])
    gram = _overlap(steps[:, None], gammas[:, None], steps[None, :], gammas[None, :])
    wanted = _overlap(steps, gammas, np.float64(step), np.float64(gamma_of_width(width)))
    fitted = np.linalg.lstsq(gram, wanted, rcond=None)[0]
    return fitted / fitted.sum()


def _overlap(
    step_a: np.ndarray, gamma_a: np.ndarray, step_b: np.ndarray | np.float64, gamma_b: np.ndarray | np.float64
) -> np.ndarray:
    """The inner product over time of two power-function profiles. EDM2, app. C.3."""
    ratio = step_a / step_b
    exponent = np.where(step_a < step_b, gamma_b, -gamma_a)
    numerator = (gamma_a + 1) * (gamma_b + 1) * ratio**exponent
    return numerator / ((gamma_a + gamma_b + 1) * np.maximum(step_a, step_b))
