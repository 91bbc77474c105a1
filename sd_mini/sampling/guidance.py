"""Classifier-free guidance: how far, over which noise levels, and what keeps its contrast."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from sd_mini.errors import UserError
from sd_mini.sampling.inputs import number

_SLACK = 1e-6  # at an interval's ends: a scheduler's levels are float32, in which 0.7 is 0.69999999


@dataclass(frozen=True)
class Guidance:
    """How a prediction with the prompt and one without it become one.

    scale: 1 is no guidance, more leans towards the prompt. rescale: 0 to 1, how far the result is brought back to the
    spread of the conditional prediction. low, high: noise levels in [0, 1] (0 the picture) between which guidance is at
    work; outside them the prediction without the prompt is not made, which saves its time.

    Raises ValueError, one line, for anything no picture comes out of.
    """

    scale: float
    rescale: float = 0.0
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self):
        for name in ("scale", "rescale", "low", "high"):
            object.__setattr__(self, name, number(getattr(self, name)))
        if not _is_number(self.scale) or self.scale < 0:
            raise UserError(f"guidance_scale {self.scale!r}: expected a finite number of at least 0 (1 is no guidance)")
        if not _is_number(self.rescale) or not 0 <= self.rescale <= 1:
            raise UserError(f"guidance_rescale {self.rescale!r}: expected a number from 0 (off) to 1")
        if not _is_number(self.low) or not _is_number(self.high) or not 0 <= self.low <= self.high <= 1:
            raise UserError(
                f"guidance_interval ({self.low!r}, {self.high!r}): expected two noise levels from 0 to 1, the lower "
                "first"
            )

    def is_active(self, level: float, grain: float = 0.0) -> bool:
        """Whether a step that starts at noise level `level`, known to within `grain`, is guided. Kynkaanniemi et al.
        2024, eq. 3, both ends included."""
        slack = grain + _SLACK
        return self.scale != 1 and self.low - slack <= level <= self.high + slack

    def join(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """Two predictions (B, C, h, w) => one."""
        return rescaled(guide(conditional, unconditional, self.scale), conditional, self.rescale)


def interval(given: object) -> tuple[float, float]:
    """Raises ValueError for anything but two values."""
    if isinstance(given, np.ndarray):
        given = given.tolist()
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise UserError(f"guidance_interval {given!r}: expected two noise levels from 0 to 1, the lower first")
    return given[0], given[1]


# Ho & Salimans 2022, eq. 6, in the form with scale 1 = no guidance
def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    return unconditional + scale * (conditional - unconditional)


# Lin et al. 2024 ("Common Diffusion Noise Schedules ..."), eq. 15 and 16
def rescaled(guided: Tensor, conditional: Tensor, share: float) -> Tensor:
    """`share` of the way to the standard deviation that each picture's conditional prediction has."""
    if share == 0:
        return guided
    axes = tuple(range(1, guided.ndim))
    factor = conditional.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
    return guided * (share * factor + 1 - share)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
