"""A conditional VAE in latent space: text and a normal draw => latents in one pass, by the evidence lower bound.

accelerate launch -m training.generators.vae --config training/configs/shapes/vae.yaml --run runs/shapes
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from pydantic import Field
from torch import Tensor, nn

from sd_mini.data.captioned import CaptionedPictures
from sd_mini.generators.one_pass import OnePassGenerator
from sd_mini.noise_predictor.network import build, predict
from training.engine import launch
from training.generators.one_pass import OnePassConfig, OnePassObjective, OnePassTask, on_cpu

_STEP = 1.0  # the time that the encoder is told; it sees no noise
_LOG_SCALES = -6.0, 4.0  # within which the standard deviations' logarithms are held


class VaeConfig(OnePassConfig):
    kl_weight: float = Field(1.0, ge=0)
    """weight of the divergence from the prior (beta); at 1 the loss is the evidence lower bound"""


class VaeObjective(OnePassObjective):
    """The decoder (`network`), the encoder, and the spread of the decoder's Gaussian, one learnt number.

    Kingma & Welling 2014; Sohn et al. 2015 for the condition; Rybkin et al. 2021 (sigma-VAE) for the learnt spread.
    """

    def __init__(self, network: OnePassGenerator, encoder: ModelMixin, kl_weight: float, *adversary: Any):
        super().__init__(network, *adversary)
        self.encoder, self.kl_weight = encoder, kl_weight
        self.log_spread = nn.Parameter(torch.zeros(()))

    def forward(
        self, latents: Tensor, draw: Tensor, prompt_embeds: Tensor, prompt_mask: Tensor, **more: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents and draws (b, C, h, w), prompts => minus the bound (b,), in nats a dimension."""
        prompt = prompt_embeds, prompt_mask
        drawn, errors, divergence = self.parts(latents, draw, *prompt)
        losses = errors + self.kl_weight * divergence
        if self.discriminator is not None:  # of draws from the prior, which is what is sampled
            drawn = self.network(draw, *prompt)
        losses, metrics = self.with_adversary(losses, latents, drawn, *prompt)
        return losses, metrics | {"divergence": divergence.mean(), "spread": self.log_spread.exp()}

    # Kingma & Welling 2014, eq. 10, of a Gaussian p(x | z, text)
    def parts(self, latents: Tensor, draw: Tensor, *prompt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """=> the reconstruction (b, C, h, w), - log p(x | z) (b,) and the divergence (b,), in nats a dimension."""
        # the posterior's mean and log standard deviation, by a network that reads the latents in half of its channels
        timesteps = torch.full((len(latents),), _STEP, device=latents.device)
        inputs = torch.cat([latents, torch.zeros_like(latents)], dim=1)
        mean, log_scale = predict(self.encoder, inputs, timesteps, *prompt).float().chunk(2, dim=1)
        log_scale = log_scale.clamp(*_LOG_SCALES)
        decoded = self.network(mean + log_scale.exp() * draw, *prompt)

        squares = ((decoded.float() - latents) / self.log_spread.exp()).square()
        errors = (squares / 2 + self.log_spread + math.log(2 * math.pi) / 2).mean((1, 2, 3))
        divergence = ((mean.square() + (2 * log_scale).exp() - 1) / 2 - log_scale).mean((1, 2, 3))
        return decoded, errors, divergence


class VaeTask(OnePassTask):
    family = "vae"

    def make_objective(self, network: Any, pictures: CaptionedPictures) -> VaeObjective:
        config, (channels, height, width) = self.config, self.latent_shape
        encoder = build(config.network.kind, config.network.network, (2 * channels, height, width), self.dim)
        on_cpu(encoder)
        return VaeObjective(network, encoder, config.kl_weight, self.make_discriminator(), config.adversary.weight)

    def held_out(self, objective: Any, latents: Tensor, draw: Tensor, prompt: Any) -> dict[str, Tensor]:
        """`bits`: minus the bound in bits a dimension, which the likelihood is at least."""
        _, errors, divergence = objective.parts(latents, draw, *prompt)
        return {"bits": (errors + divergence) / math.log(2)}


main = launch.Program(VaeConfig, "vae", lambda launched: VaeTask(launched.config, launched.run))
