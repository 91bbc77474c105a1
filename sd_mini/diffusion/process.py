"""A noise predictor's objective as one object: what noise does, what is learnt, and what a sampler makes of it."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from sd_mini import diffusion
from sd_mini.config import Config, check
from sd_mini.diffusion.forward import STEPS, Schedule
from sd_mini.errors import UserError

FLOW = ("flow", "flow_x")


class Process(Config):
    """What belongs to a trained network for good. Time, inside: t in [0, 1] on the linear path, 0 to 999 on a schedule.

    Combinations in which nothing could be learnt, or nothing sampled, are refused by name.
    """

    kind: Literal["flow", "flow_x", "epsilon", "v_prediction", "sample"] = "flow"
    """what the network predicts: on the linear path the velocity, or the clean latents under the velocity's loss
    (flow_x, JiT); on a discrete schedule the noise, v or the clean latents"""
    schedule: Schedule | None = None
    """of the three discrete kinds: linear (DDPM), scaled_linear (Stable Diffusion), cosine (iDDPM)"""
    zero_snr: bool = False
    """rescale the schedule so that its last step is pure noise"""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.is_flow and (self.schedule is not None or self.zero_snr):
            raise UserError(
                f"objective.kind {self.kind}: has no schedule and no zero_snr (its path ends in pure noise by itself); "
                "leave them out, or choose epsilon, v_prediction or sample"
            )
        if not self.is_flow and self.schedule is None:
            raise UserError(
                f"objective.kind {self.kind}: expected a schedule, one of {', '.join(diffusion.BETAS)}; it has none"
            )
        if self.kind == "epsilon" and self.zero_snr:
            raise UserError(
                "objective.kind epsilon: with zero_snr the last step is the noise itself, so predicting it teaches "
                "nothing; choose v_prediction or sample, or leave zero_snr out"
            )
        return self

    @classmethod
    def of(cls, contract: dict[str, Any]) -> Self:
        """The process that a stage's contract, or a pipeline's config, records; flow where it says nothing."""
        recorded = contract.get("objective") or {}
        return check(cls, {name: recorded[name] for name in cls.model_fields if name in recorded}, "recorded objective")

    @property
    def is_flow(self) -> bool:
        return self.kind in FLOW

    def times(self, drawn: Tensor) -> Tensor:
        """Draws in [0, 1] (B,) => timesteps: themselves, or the steps that they fall on."""
        return drawn if self.is_flow else (drawn * STEPS).long().clamp(max=STEPS - 1)

    def scaled(self, timesteps: Tensor) -> Tensor:
        """Timesteps => the scale of diffusers' networks and schedulers, 0 to 1000 (the noise)."""
        return timesteps * STEPS if self.is_flow else timesteps

    def alphas(self, timesteps: Tensor) -> Tensor:
        assert self.schedule is not None
        return diffusion.alphas_cumprod(self.schedule, self.zero_snr).to(timesteps.device)[timesteps]

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if self.is_flow:
            return diffusion.flow_noise(latents, noise, timesteps)
        return diffusion.discrete_noise(latents, noise, self.alphas(timesteps))

    def target(self, latents: Tensor, noise: Tensor, noised: Tensor, timesteps: Tensor) -> Tensor:
        """What `answer` is compared with, (B, C, h, w)."""
        if self.kind == "flow":
            return diffusion.flow_target(latents, noise)
        if self.kind == "flow_x":
            return diffusion.velocity_of(latents, noised, timesteps)
        if self.kind == "v_prediction":
            return diffusion.v_target(latents, noise, self.alphas(timesteps))
        return noise if self.kind == "epsilon" else latents

    def answer(self, predicted: Tensor, noised: Tensor, timesteps: Tensor, floor: float = 0.05) -> Tensor:
        """The network's output => what the loss compares and the scheduler steps by: of flow_x the velocity.

        `floor`: below that t the loss would be all of the last little noise. A sampler divides by its own t instead, so
        that its last step ends in the clean latents that the network said.
        """
        return diffusion.velocity_of(predicted, noised, timesteps, floor) if self.kind == "flow_x" else predicted

    def snr(self, timesteps: Tensor) -> Tensor:
        """(B,) signal-to-noise ratio of the noised latents, which have unit variance."""
        if self.is_flow:
            return ((1 - timesteps) / timesteps) ** 2
        alphas = self.alphas(timesteps)
        return alphas / (1 - alphas)


Weighting = Literal["none", "min_snr", "cosmap", "log"]


class TimeConfig(Process):
    """The process, and how its training spreads its effort over the noise levels."""

    density: diffusion.Density = "logit_normal"
    """how timesteps are drawn"""
    uniform_share: float = Field(0.1, ge=0, le=1)
    """share of timesteps drawn uniformly all the same"""
    mode_scale: float = Field(1.29, ge=-1, le=1.75)
    """of density mode: above 0 the middle is drawn more often, below 0 the ends"""
    shift: float = Field(1.0, gt=0)
    """above 1 trains more on the noisy end"""
    weighting: Weighting = "none"
    """of the losses: min_snr (Min-SNR-gamma), cosmap (Stable Diffusion 3's); log takes each sample's logarithm instead,
    so that all count alike, whatever their noise level and however much there is in their pictures"""
    min_snr_gamma: float = Field(5.0, gt=0)

    @model_validator(mode="after")
    def _weights_fit(self) -> Self:
        if self.weighting == "cosmap" and not self.is_flow:
            raise UserError(f"objective.weighting cosmap: is the linear path's, not {self.kind}'s; use min_snr")
        if self.shift != 1 and not self.is_flow:
            raise UserError(f"objective.shift {self.shift:g}: is the linear path's; {self.kind}'s schedule has its own")
        return self

    def draw(self, uniform: Tensor) -> Tensor:
        """U[0, 1) draws (B,) => timesteps (B,)."""
        return self.times(
            diffusion.sample_timesteps(uniform, self.density, self.uniform_share, self.shift, self.mode_scale)
        )

    def weights(self, timesteps: Tensor) -> Tensor | None:
        """(B,) weights of the squared errors; None where time gives none."""
        if self.weighting == "cosmap":
            return diffusion.cosmap_weights(timesteps)
        if self.weighting == "min_snr":
            prediction = "flow" if self.is_flow else self.kind
            return diffusion.min_snr_weights(self.snr(timesteps), self.min_snr_gamma, prediction)
        return None
