"""The negative log-likelihood of latents with noise."""

from __future__ import annotations

from torch import Tensor, nn

from sd_mini.generators.normalizing_flow import NormalizingFlow


class FlowObjective(nn.Module):
    """`noise_std`: of the noise that is added to standardised latents (TarFlow, section 3.2)."""

    def __init__(self, network: NormalizingFlow, noise_std: float):
        super().__init__()
        self.network, self.noise_std = network, noise_std

    def forward(
        self, latents: Tensor, noise: Tensor, prompt_embeds: Tensor, prompt_mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents and noise (b, C, h, w) => losses (b,): nats a latent value."""
        noised = latents + self.noise_std * noise
        losses = -self.network.log_likelihoods(noised, prompt_embeds, prompt_mask) / latents[0].numel()
        return losses, {}
