"""A discriminator of latents with their prompt: R3GAN's relativistic loss, behind any generator that draws in one pass.

Huang et al. 2024 (arXiv 2501.05441, "The GAN is dead; long live the GAN!"): the relativistic pairing loss with
zero-centred penalties on the gradients at real and at drawn samples. Reference: github.com/brownvc/R3GAN, Trainer.py.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import softplus

from sd_mini.config import Config
from sd_mini.generators.base import LatentGenerator
from sd_mini.noise_predictor.network import build, predict
from training.engine.learner import Others, fixed
from training.optim.optimizer import OptimizerConfig

STEP = 1.0  # the time that the network is told; it sees no noise


class DiscriminatorNetwork(Config):
    hidden_size: int = Field(128, ge=16, multiple_of=16)
    depth: int = Field(3, ge=1)
    num_heads: int = Field(4, ge=1)
    patch_size: int = Field(2, ge=1)


class AdversaryConfig(OptimizerConfig):
    """The discriminator and how it learns."""

    weight: float = Field(0.0, ge=0)
    """of the adversarial term in the generator's loss; 0: no discriminator"""
    gradient_penalty: float = Field(1.0, ge=0)
    """weight gamma of R1 and R2; the loss has half of it"""
    step: float = Field(0.01, gt=0, le=0.1)
    """length of the random steps by which the squared gradients of R1 and R2 are estimated"""
    mismatched: float = Field(0.0, ge=0)
    """weight of the real latents with another sample's prompt as further false ones (Reed et al. 2016, GAN-CLS)"""
    network: DiscriminatorNetwork = DiscriminatorNetwork()


class Discriminator(nn.Module):
    """Latents (B, C, h, w) with their prompt => logits (B,): a transformer that reads both, and the mean over its
    output."""

    def __init__(self, latent_shape: tuple[int, int, int], dim: int, config: DiscriminatorNetwork):
        super().__init__()
        self.network = build("prx", {**config.model_dump(), "mlp_ratio": 3.0}, latent_shape, dim)
        # its last layer begins at zero, and with it the gradient of all that lies before it
        nn.init.normal_(self.network.final_layer.linear.weight, std=0.02)
        self.logit = nn.Linear(latent_shape[0], 1)

    def forward(self, latents: Tensor, prompt_embeds: Tensor, prompt_mask: Tensor) -> Tensor:
        timesteps = torch.full((len(latents),), STEP, device=latents.device)
        features = predict(self.network, latents, timesteps, prompt_embeds, prompt_mask)
        return self.logit(features.float().mean((2, 3)))[:, 0]


# Huang et al. 2024, eq. 2 (Jolicoeur-Martineau 2019): f(D(fake) - D(real)), f(t) = softplus(t)
def relativistic_losses(winner: Tensor, loser: Tensor) -> Tensor:
    """Logits of those who should be higher, and of those they are paired with, (B,) each => (B,)."""
    return softplus(loser - winner)


# R1 and R2, Mescheder et al. 2018, eq. 9: E |dD/dx|^2. Along a random direction n ~ N(0, I), (D(x + s n) - D(x)) / s
# has that mean square as s goes to 0; no second derivative is needed (Lin et al. 2025, arXiv 2501.08316, eq. 6)
def gradient_penalties(stepped: Tensor, logits: Tensor, step: float) -> Tensor:
    """Logits at x + step n and at x, (B,) each => (B,): estimates of the squared norm of the logit's gradient."""
    return ((stepped - logits) / step).square()


def adversarial_losses(discriminator: nn.Module, latents: Tensor, drawn: Tensor, *prompt: Tensor) -> Tensor:
    """The generator's losses (B,): its draws against the real latents of the same prompts."""
    with torch.no_grad():
        real = discriminator(latents, *prompt)
    return relativistic_losses(fixed(discriminator, drawn, *prompt), real)


class DiscriminatorObjective(nn.Module):
    """Latents, a draw, two directions and the prompts (with `mismatched` other samples' prompts too) => the
    discriminator's losses (b,).

    `generator`: (draw, prompt_embeds, prompt_mask) => latents; it is not trained here.
    """

    def __init__(self, discriminator: Discriminator, generator: LatentGenerator, config: AdversaryConfig):
        super().__init__()
        self.discriminator, self.config = discriminator, config
        self.others = Others([generator])

    def forward(
        self,
        latents: Tensor,
        draw: Tensor,
        direction: Tensor,
        false_direction: Tensor,
        prompt_embeds: Tensor,
        prompt_mask: Tensor,
        **more: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config, b = self.config, len(latents)
        with torch.no_grad():
            drawn = self.others[0](draw, prompt_embeds, prompt_mask)
        # one call for the real ones, the drawn ones, both a step aside, and the real ones with another prompt
        inputs = [latents, drawn]
        if config.gradient_penalty:
            inputs += [latents + config.step * direction, drawn + config.step * false_direction]
        embeds, mask = [prompt_embeds] * len(inputs), [prompt_mask] * len(inputs)
        if config.mismatched:
            inputs, embeds, mask = [*inputs, latents], [*embeds, more["other_embeds"]], [*mask, more["other_mask"]]
        logits = self.discriminator(torch.cat(inputs), torch.cat(embeds), torch.cat(mask)).split(b)

        real, false = logits[:2]
        losses = relativistic_losses(real, false)
        metrics = {"margin": (real - false).mean()}
        if config.gradient_penalty:
            r1, r2 = (gradient_penalties(logits[i + 2], logits[i], config.step) for i in range(2))
            losses = losses + config.gradient_penalty / 2 * (r1 + r2)
            metrics |= {"r1": r1.mean(), "r2": r2.mean()}
        if config.mismatched:
            losses = losses + config.mismatched * relativistic_losses(real, logits[-1])
        return losses, metrics
