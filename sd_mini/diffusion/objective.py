"""A noise predictor's objective: the forward process, the target, the draw of timesteps, the loss weights, the call.

The functions are pure; `Process` binds those of one kind of prediction, `TimeConfig` adds how training spreads over t.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Literal, Self

import numpy as np
import torch
from diffusers.models import PixArtTransformer2DModel, PRXTransformer2DModel
from pydantic import Field, model_validator
from torch import Tensor

from sd_mini.config import Config, check
from sd_mini.errors import UserError

STEPS = 1000  # of the discrete schedule, and the scale on which diffusers' networks and schedulers count time

Schedule = Literal["linear", "scaled_linear", "cosine"]
# diffusers' fields. linear: Ho et al. 2020, sec. 4; scaled_linear: Rombach et al. 2022; cosine: Nichol & Dhariwal 2021
BETAS: dict[str, dict[str, Any]] = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}


# x_t = (1 - t) x_0 + t eps: the linear path of rectified flow. Liu et al. 2023, eq. 1; Lipman et al. 2023, eq. 22
def flow_noise(latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """latents, noise (B, C, h, w), timesteps (B,) in [0, 1] => noised latents; t 0 is the picture, 1 the noise."""
    t = per_sample(timesteps, latents)
    return (1 - t) * latents + t * noise


# d x_t / d t = eps - x_0
def flow_target(latents: Tensor, noise: Tensor) -> Tensor:
    """The velocity that the network learns, (B, C, h, w)."""
    return noise - latents


# v = (x_t - x_0) / t, with t held away from 0: Li & He 2025 ("Back to Basics", JiT), eq. 6 and sec. 4.2
def velocity_of(sample: Tensor, noised: Tensor, timesteps: Tensor, floor: float = 0.05) -> Tensor:
    """A clean sample (predicted, or the true one) and the noised latents at `timesteps` (B,) in [0, 1] => velocity."""
    return (noised - sample) / per_sample(timesteps, noised).clamp(min=floor)


def alphas_cumprod(schedule: Schedule, zero_snr: bool = False) -> Tensor:
    """(STEPS,) float32: the part of the picture's variance left at each step, as in diffusers' schedulers.

    `zero_snr`: rescaled so that nothing is left at the last one, Lin et al. 2024 ("Common Diffusion Noise Schedules
    and Sample Steps are Flawed"), algorithm 1.
    """
    return torch.from_numpy(_alphas_cumprod(schedule, zero_snr))


@lru_cache
def _alphas_cumprod(schedule: Schedule, zero_snr: bool) -> np.ndarray:
    fields = BETAS[schedule]
    if schedule == "cosine":  # eq. 17, with betas of at most 0.999
        at = np.cos((np.arange(STEPS + 1) / STEPS + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - at[1:] / at[:-1], 0.999)
    else:
        power = 0.5 if schedule == "scaled_linear" else 1.0
        betas = np.linspace(fields["beta_start"] ** power, fields["beta_end"] ** power, STEPS) ** (1 / power)
    roots = np.sqrt(np.cumprod(1 - betas))
    if zero_snr:
        roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    return (roots**2).astype(np.float32)


# x_t = sqrt(a) x_0 + sqrt(1 - a) eps. Ho et al. 2020, eq. 4
def discrete_noise(latents: Tensor, noise: Tensor, alphas: Tensor) -> Tensor:
    """latents, noise (B, C, h, w), alphas_cumprod of each sample's step (B,) => noised latents."""
    a = per_sample(alphas, latents)
    return a.sqrt() * latents + (1 - a).sqrt() * noise


# v = sqrt(a) eps - sqrt(1 - a) x_0. Salimans & Ho 2022, app. D
def v_target(latents: Tensor, noise: Tensor, alphas: Tensor) -> Tensor:
    a = per_sample(alphas, latents)
    return a.sqrt() * noise - (1 - a).sqrt() * latents


# Hang et al. 2023 ("Min-SNR"), eq. 8 and sec. 3.4: min(SNR, gamma) as a weight of the clean sample's squared error
def min_snr_weights(snr: Tensor, gamma: float, prediction: str) -> Tensor:
    """Signal-to-noise ratios (B,) => (B,) weights of the squared error of what is predicted.

    One rule in the units of each: the squared error of eps is SNR times that of the clean sample, of v 1 + SNR times,
    and of the linear path's velocity (1 + sqrt(SNR))^2 times (x_0's error is t times the velocity's, and
    t = 1 / (1 + sqrt(SNR))).
    """
    kept = snr.clamp(max=gamma)
    if prediction == "sample":
        return kept
    if prediction == "epsilon":
        return (gamma / snr).clamp(max=1)  # kept / snr, for an infinite ratio too
    if prediction == "v_prediction":
        return kept / (snr + 1)
    return kept / (1 + snr.sqrt()) ** 2


# Esser et al. 2024 (SD3), eq. 21 ("CosMap"): the weight that the cosine schedule's density has on the linear path
def cosmap_weights(timesteps: Tensor) -> Tensor:
    """timesteps (B,) in [0, 1] => (B,) weights, 2 / pi at both ends and twice that in the middle; their mean is 1."""
    return 2 / (math.pi * (1 - 2 * timesteps + 2 * timesteps**2))


# immiscible diffusion, in its form with k draws a sample: Li et al. 2024
def nearest_noise(latents: Tensor, draws: Tensor) -> Tensor:
    """latents (B, C, h, w), draws (B, k, C, h, w) => the draw nearest to each sample, (B, C, h, w).

    Fewer pictures are then paired with one region of noise, so the velocity at a point averages over fewer of them.
    In d dimensions the noise stays close to N(0, I): for k = 4 its variance is 1 - 0.84 / sqrt(d).
    """
    distance = (draws - latents[:, None]).square().flatten(2).sum(2)
    return draws[torch.arange(len(draws)), distance.argmin(1)]


# 1 - cos of the angle between two velocities: Yao et al. 2024 ("FasterDiT"), eq. 7
def direction_losses(velocity: Tensor, target: Tensor) -> Tensor:
    """(B, C, h, w) each => (B,), from 0 (the same direction) to 2."""
    return 1 - torch.nn.functional.cosine_similarity(velocity.flatten(1), target.flatten(1))


Density = Literal["uniform", "logit_normal", "mode"]


def sample_timesteps(
    uniform: Tensor,
    density: Density = "logit_normal",
    uniform_share: float = 0.1,
    shift: float = 1.0,
    mode_scale: float = 1.29,
) -> Tensor:
    """`uniform` (B,): draws from U[0, 1) => timesteps (B,) in [0, 1], float32.

    logit_normal and mode: Esser et al. 2024, eq. 19 and 20, mixed with a fraction `uniform_share` of uniform samples so
    that every t is trained. One draw chooses the component and, rescaled, is the quantile in it. `shift` > 1 moves
    weight towards the noisy end, for larger latents: t' = s t / (1 + (s - 1) t), eq. 23.
    """
    quantile = uniform.double()
    timesteps = quantile
    if density != "uniform":
        within = ((quantile - uniform_share) / max(1 - uniform_share, 1e-12)).clamp(0, 1)
        # the normal distribution's quantile, through the logistic function
        drawn = torch.sigmoid(torch.special.ndtri(within)) if density == "logit_normal" else mode_of(within, mode_scale)
        timesteps = torch.where(quantile < uniform_share, quantile / max(uniform_share, 1e-12), drawn)
    return (shift * timesteps / (1 + (shift - 1) * timesteps)).float()


# Esser et al. 2024, eq. 20
def mode_of(uniform: Tensor, scale: float) -> Tensor:
    """U(0, 1) => timesteps that are dense in the middle for `scale` > 0 (up to 2 / (pi - 2)), at both ends below 0."""
    return 1 - uniform - scale * (torch.cos(math.pi / 2 * uniform) ** 2 - 1 + uniform)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """(B,) => (B, 1, 1, ...) with as many axes as `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))


FLOW = ("flow", "flow_x")


class Process(Config):
    """What a network predicts, on which path. Timesteps: [0, 1] on the linear path, 0 to 999 on a schedule.

    Raises UserError for combinations in which nothing could be learnt or sampled.
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
            raise UserError(f"objective.kind {self.kind}: expected a schedule, one of {', '.join(BETAS)}; it has none")
        if self.kind == "epsilon" and self.zero_snr:
            raise UserError(
                "objective.kind epsilon: with zero_snr the last step is the noise itself, so predicting it teaches "
                "nothing; choose v_prediction or sample, or leave zero_snr out"
            )
        return self

    @classmethod
    def of(cls, contract: dict[str, Any]) -> Self:
        """The process in a stage's contract or a pipeline's config; flow if there is none."""
        recorded = contract.get("objective") or {}
        return check(cls, {name: recorded[name] for name in cls.model_fields if name in recorded}, "recorded objective")

    @property
    def is_flow(self) -> bool:
        return self.kind in FLOW

    def times(self, drawn: Tensor) -> Tensor:
        """Draws in [0, 1] (B,) => timesteps: the same on the linear path, else the steps of the schedule."""
        return drawn if self.is_flow else (drawn * STEPS).long().clamp(max=STEPS - 1)

    def scaled(self, timesteps: Tensor) -> Tensor:
        """Timesteps => the scale of diffusers' networks and schedulers, 0 to 1000 (the noise)."""
        return timesteps * STEPS if self.is_flow else timesteps

    def alphas(self, timesteps: Tensor) -> Tensor:
        assert self.schedule is not None
        return alphas_cumprod(self.schedule, self.zero_snr).to(timesteps.device)[timesteps]

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if self.is_flow:
            return flow_noise(latents, noise, timesteps)
        return discrete_noise(latents, noise, self.alphas(timesteps))

    def target(self, latents: Tensor, noise: Tensor, noised: Tensor, timesteps: Tensor) -> Tensor:
        """What `answer` is compared with, (B, C, h, w)."""
        if self.kind == "flow":
            return flow_target(latents, noise)
        if self.kind == "flow_x":
            return velocity_of(latents, noised, timesteps)
        if self.kind == "v_prediction":
            return v_target(latents, noise, self.alphas(timesteps))
        return noise if self.kind == "epsilon" else latents

    def answer(self, predicted: Tensor, noised: Tensor, timesteps: Tensor, floor: float = 0.05) -> Tensor:
        """The network's output => what the loss and the scheduler use: of flow_x the velocity.

        `floor`: smallest t to divide by; below it the last bit of noise would dominate the loss. A sampler passes a
        smaller one, so that its last step ends in the latents that the network predicts.
        """
        return velocity_of(predicted, noised, timesteps, floor) if self.kind == "flow_x" else predicted

    def clean(self, answer: Tensor, noised: Tensor, timesteps: Tensor) -> Tensor:
        """What `answer` says the clean latents are, (B, C, h, w): the inverse of `target`."""
        if self.is_flow:
            return noised - per_sample(timesteps, noised) * answer
        if self.kind == "sample":
            return answer
        a = per_sample(self.alphas(timesteps), noised)
        if self.kind == "v_prediction":
            return a.sqrt() * noised - (1 - a).sqrt() * answer
        return (noised - (1 - a).sqrt() * answer) / a.sqrt()

    def snr(self, timesteps: Tensor) -> Tensor:
        """(B,) signal-to-noise ratio of the noised latents, which have unit variance."""
        if self.is_flow:
            return ((1 - timesteps) / timesteps) ** 2
        alphas = self.alphas(timesteps)
        return alphas / (1 - alphas)


Weighting = Literal["none", "min_snr", "cosmap", "log"]


class TimeConfig(Process):
    """The process, and the distribution of its training over noise levels."""

    density: Density = "logit_normal"
    """how timesteps are drawn"""
    uniform_share: float = Field(0.1, ge=0, le=1)
    """fraction of timesteps drawn uniformly"""
    mode_scale: float = Field(1.29, ge=-1, le=1.75)
    """of density mode: above 0 the middle is drawn more often, below 0 the ends"""
    shift: float = Field(1.0, gt=0)
    """above 1 trains more on the noisy end"""
    weighting: Weighting = "none"
    """of the losses: min_snr (Min-SNR-gamma), cosmap (Stable Diffusion 3's); log: the logarithm of each
    sample's loss, so that noise levels and pictures have the same weight"""
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
        return self.times(sample_timesteps(uniform, self.density, self.uniform_share, self.shift, self.mode_scale))

    def weights(self, timesteps: Tensor) -> Tensor | None:
        """(B,) weights of the squared errors; None where time gives none."""
        if self.weighting == "cosmap":
            return cosmap_weights(timesteps)
        if self.weighting == "min_snr":
            prediction = "flow" if self.is_flow else self.kind
            return min_snr_weights(self.snr(timesteps), self.min_snr_gamma, prediction)
        return None


def unwrapped(network: torch.nn.Module) -> Any:
    """The network itself of what torch.compile made of it."""
    return getattr(network, "_orig_mod", network)


def predict(
    network: torch.nn.Module, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor, prompt_mask: Tensor
) -> Tensor:
    """latents (B, C, h, w), timesteps (B,) from 0 to 1000 (the noise), prompt_embeds (B, L, D), prompt_mask (B, L) bool
    => (B, C, h, w). PRX alone counts time in [0, 1]."""
    kind = unwrapped(network)
    if isinstance(kind, PRXTransformer2DModel):
        return network(latents, timesteps / STEPS, prompt_embeds, attention_mask=prompt_mask, return_dict=False)[0]
    more: dict[str, Any] = {}
    if isinstance(kind, PixArtTransformer2DModel):
        more["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return network(
        latents,
        timestep=timesteps,
        encoder_hidden_states=prompt_embeds,
        encoder_attention_mask=prompt_mask,
        return_dict=False,
        **more,
    )[0]
