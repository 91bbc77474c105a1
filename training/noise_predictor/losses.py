"""Stage 3's loss: the squared error of the prediction, its weights, and the terms that may be added."""

from __future__ import annotations

from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from sd_mini import diffusion, noise_predictor
from sd_mini.diffusion.objective import Process, TimeConfig
from sd_mini.errors import UserError
from training.noise_predictor.representation import Alignment, RepaConfig, layers_of, outputs_of


class ObjectiveConfig(TimeConfig):
    caption_dropout: float = Field(0.1, ge=0, le=1)
    """fraction of samples trained on the null condition"""
    direction: float = Field(0.0, ge=0)
    """weight of 1 - the cosine between the velocity and its target, beside their squared distance"""
    noise_draws: int = Field(1, ge=1)
    """draws of noise a sample, of which the nearest to its latents is used (immiscible diffusion)"""
    repa: RepaConfig = RepaConfig()

    @model_validator(mode="after")
    def _direction_of_a_velocity(self) -> Self:
        if self.direction and self.kind in ("epsilon", "sample"):
            raise UserError(
                f"objective.direction {self.direction:g}: is that of a velocity, which {self.kind} does not predict; "
                "choose flow, flow_x or v_prediction, or leave it out"
            )
        return self

    @property
    def process(self) -> Process:
        return Process(kind=self.kind, schedule=self.schedule, zero_snr=self.zero_snr)


class PredictorObjective(nn.Module):
    """The network with its loss. `alignment`: the REPA term's projection, trained with the network."""

    def __init__(self, network: nn.Module, config: ObjectiveConfig, alignment: Alignment | None = None):
        super().__init__()
        self.network, self.config, self.alignment = network, config, alignment

    def forward(
        self,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        prompt_embeds: Tensor,
        prompt_mask: Tensor,
        features: Tensor | None = None,
        feature_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """=> losses (b,), and means to log: beside weights or further terms the squared error, and each term."""
        config, hidden = self.config, None

        # Add noise, call the network; with REPA also read the hidden states of one block.
        inputs = (latents, noise, timesteps, prompt_embeds, prompt_mask)
        if self.alignment is not None:
            with outputs_of(layers_of(self.network)[self.alignment.number]) as outputs:
                answer, target = answer_and_target(self.network, config, *inputs)
            hidden = outputs[-1]
        else:
            answer, target = answer_and_target(self.network, config, *inputs)

        # Squared error, weighted by timestep.
        errors = (answer - target).square().mean((1, 2, 3))
        losses, weights, metrics = errors, config.weights(timesteps), {}
        if weights is not None:
            losses = weights * errors
        if config.weighting == "log":
            losses = log_losses(errors)

        # Further terms: the velocity's direction (FasterDiT), alignment of hidden states (REPA).
        if config.direction:
            direction = diffusion.direction_losses(answer, target)
            losses, metrics["direction"] = losses + config.direction * direction, direction.mean()
        if hidden is not None and self.alignment is not None:
            unaligned = self.alignment(hidden, features)
            losses, metrics["alignment"] = losses + feature_weights * unaligned, unaligned.mean()
        if losses is not errors:
            metrics["error"] = errors.mean()
        return losses, metrics


def log_losses(errors: Tensor) -> Tensor:
    """Mean squared errors (B,) => their logarithms: the negative log-likelihood of a Gaussian (Kendall et al. 2018, eq.
    5) with the best variance for each sample. Karras et al. 2024 (EDM2) learn one for each noise level."""
    return errors.clamp(min=torch.finfo(errors.dtype).tiny).log()


def answer_and_target(
    network: nn.Module,
    process: Process,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    prompt_embeds: Tensor,
    prompt_mask: Tensor,
) -> tuple[Tensor, Tensor]:
    """(answer, target), (B, C, h, w) each: what `process` predicts; of flow_x the velocity."""
    noised = process.noised(latents, noise, timesteps)
    predicted = noise_predictor.predict(network, noised, process.scaled(timesteps), prompt_embeds, prompt_mask)
    answer = process.answer(predicted, noised, timesteps)
    return answer, process.target(latents, noise, noised, timesteps)
