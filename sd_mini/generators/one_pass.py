"""Text and one normal draw => latents in one call of a network: what a GAN and a VAE train, and a regression too.

The network is one of the noise predictors' (PRX by default), called once with the draw in the place of noised latents,
so that the families differ in how they are trained alone.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from sd_mini.draws import Draws, normals
from sd_mini.generators.base import Condition, LatentGenerator
from sd_mini.noise_predictor.network import build, predict

STEP = 1000.0  # the time that the network is told: that of pure noise


class OnePassGenerator(LatentGenerator):
    """Fields: `family` (gan, vae, regression); `latent_shape` (C, h, w); `dim`, the width of prompt embeddings; `kind`
    and `network`, as of a noise predictor. A regression has no draw: it is called with zeros."""

    @register_to_config
    def __init__(
        self,
        family: str = "gan",
        latent_shape: tuple[int, int, int] = (8, 8, 8),
        dim: int = 128,
        kind: str = "prx",
        network: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.body = build(kind, dict(network or {}), tuple(latent_shape), dim)

    def forward(self, draw: Tensor, prompt_embeds: Tensor, prompt_mask: Tensor) -> Tensor:
        """A draw N(0, I) (B, C, h, w), prompt_embeds (B, L, D), prompt_mask (B, L) => latents (B, C, h, w)."""
        if self.family == "regression":
            draw = torch.zeros_like(draw)
        timesteps = torch.full((len(draw),), STEP, device=draw.device)
        return predict(self.body, draw, timesteps, prompt_embeds, prompt_mask)

    @property
    def noise_predictors(self) -> list[Any]:
        return [self.body]

    def passes(self, guidance: float) -> int:
        return 1

    def sample(self, prompt: Condition, null: Condition | None, draws: Draws, guidance: float) -> Tensor:
        draw = normals(tuple(self.config.latent_shape), draws)
        return self(draw.to(self.device, self.dtype), *prompt)
