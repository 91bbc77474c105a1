"""What a few-step noise predictor was made for: how many evaluations, without guidance, by its own sampler."""

from __future__ import annotations

from typing import Any, Literal

from diffusers import FlowMatchEulerDiscreteScheduler
from pydantic import Field

from sd_mini.config import Config
from sd_mini.errors import UserError

SAMPLER = "euler"  # with an average velocity its step is exact: x_r = x_t - (t - r) u


class FewSteps(Config):
    """Recorded in the stage's contract and in the pipeline's settings as `few_steps`."""

    method: Literal["meanflow", "reflow"]
    """how the network was trained; of meanflow it predicts the average velocity of a step"""
    steps: tuple[int, ...]
    """the numbers of evaluations that it was made for"""
    end_blocks: int = Field(0, ge=0)
    """of meanflow: how many of the last blocks read the time where a step ends"""

    def check_steps(self, steps: Any) -> None:
        """Raises UserError for a number of evaluations that the network was not made for."""
        if steps not in self.steps:
            raise UserError(
                f"num_inference_steps {steps}: this few-step noise predictor was made for {self._numbers}; use one of "
                "these, or join the run with stage 3's own: sd-mini export RUN"
            )

    def check_guidance(self, scale: float, **others: bool) -> None:
        """Raises UserError for a guidance scale other than 1, and for each of `others` that is asked for."""
        asked = [f"guidance_scale {scale:g}"] if scale != 1 else [name for name, is_asked in others.items() if is_asked]
        if asked:
            raise UserError(
                f"{asked[0]}: guidance is part of what this few-step noise predictor has learnt, and it runs unguided; "
                "leave it out (scale 1), or join the run with stage 3's own: sd-mini export RUN"
            )

    def check_scheduler(self, scheduler: Any) -> None:
        """Raises UserError for another scheduler than its own."""
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            raise UserError(
                f"scheduler {type(scheduler).__name__}: this few-step noise predictor carries its own sampler; use "
                f"{SAMPLER}"
            )

    @property
    def _numbers(self) -> str:
        *most, last = map(str, self.steps)
        return f"{', '.join(most)} or {last} evaluations" if most else f"{last} evaluations"
