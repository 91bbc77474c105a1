"""From noise to clean latents: a sampler's steps over a network, guided or not."""

from __future__ import annotations

import copy
import dataclasses

import torch
from diffusers import ModelMixin, SchedulerMixin
from torch import Tensor

from sd_mini import diffusion, noise_predictor
from sd_mini.diffusion.objective import Process, levels
from sd_mini.sampling import samplers
from sd_mini.sampling.guidance import Guidance
from sd_mini.sampling.inputs import Generators

Condition = tuple[Tensor, Tensor]  # prompt_embeds (B, L, D), prompt_mask (B, L)


class Denoising:
    """One way down from noise: where the steps are, and what each of them computes.

    `guide`: an earlier snapshot of `network`, whose prediction with the prompt then stands in for the one without
    (autoguidance, Karras et al. 2024 "Guiding a Diffusion Model with a Bad Version of Itself", eq. 3).

    Raises ValueError, one line, for a scheduler that does not fit what the network predicts.
    """

    def __init__(
        self,
        network: ModelMixin,
        scheduler: SchedulerMixin,
        process: Process,
        guidance: Guidance,
        steps: int,
        device: torch.device | str | None = None,
        guide: ModelMixin | None = None,
    ):
        samplers.check(scheduler, process)
        # a scheduler keeps its place and its last predictions: of several calls at a time each needs its own
        scheduler = copy.deepcopy(scheduler)
        self.network, self.scheduler, self.process = network, scheduler, process
        self.guidance, self.guide = guidance, guide
        self.timesteps = samplers.set_timesteps(scheduler, steps, device)
        self._levels, self._grain = levels(self.timesteps).tolist(), samplers.level_grain(scheduler)

    @property
    def is_guided(self) -> list[bool]:
        """Which steps are guided."""
        return [self.guidance.is_active(level, self._grain) for level in self._levels]

    def set_scale(self, scale: float) -> None:
        """Guide by another scale from the next step on. Raises ValueError, one line, for one that is none."""
        self.guidance = dataclasses.replace(self.guidance, scale=scale)

    @property
    def needs_null(self) -> bool:
        """Whether any step asks for a prediction without the prompt."""
        return self.guide is None and any(self.is_guided)

    def start(self, noise: Tensor) -> Tensor:
        """Noise N(0, I) => what the scheduler begins with."""
        return noise * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def step(
        self, number: int, latents: Tensor, prompt: Condition, null: Condition | None, generator: Generators = None
    ) -> Tensor:
        """Latents (B, C, h, w) before step `number` => after it."""
        t = self.timesteps[number]
        seen = latents
        if hasattr(self.scheduler, "scale_model_input"):
            seen = self.scheduler.scale_model_input(latents, t)
        answer = self._answer(number, seen, prompt, null)
        return samplers.step(self.scheduler, answer, t, latents, generator)

    def _answer(self, number: int, latents: Tensor, prompt: Condition, null: Condition | None) -> Tensor:
        if not self.guidance.is_active(self._levels[number], self._grain):
            return self._predict(self.network, number, latents, prompt)
        if self.guide is not None:
            good, bad = (self._predict(one, number, latents, prompt) for one in (self.network, self.guide))
            return self.guidance.join(good, bad)
        assert null is not None
        both = (torch.cat([null[0], prompt[0]]), torch.cat([null[1], prompt[1]]))
        # both predictions in one pass
        unconditional, conditional = self._predict(self.network, number, torch.cat([latents] * 2), both).chunk(2)
        return self.guidance.join(conditional, unconditional)

    def _predict(self, network: ModelMixin, number: int, latents: Tensor, condition: Condition) -> Tensor:
        # in float32 whatever the network's dtype: bfloat16 does not tell 999 from 1000
        time = self.timesteps[number].float().expand(len(latents))
        predicted = noise_predictor.predict(network, latents, time, *condition)
        return self.process.answer(predicted, latents, time / diffusion.STEPS, floor=1e-4).to(latents.dtype)
