"""What the user decides about the family `normalizing_flow`."""

from __future__ import annotations

from pydantic import Field

from sd_mini.config import Config
from training.generators.task import GeneratorConfig


class NetworkConfig(Config):
    """Affine blocks, each a causal transformer (transformers' Llama decoder) over patches of the latents."""

    patch_size: int = Field(2, ge=1)
    """latent cells a side of a token"""
    width: int = Field(128, ge=2)
    depths: tuple[int, ...] = (1, 1, 1, 4)
    """layers of each block, from the latents to the noise; the last block alone has the prompt"""
    heads: int = Field(4, ge=1)
    mlp_width: int = Field(344, ge=1)
    """of the gated layers, 8/3 of the width in Llama"""


class DrawConfig(Config):
    """How noise is drawn; of a joined pipeline it is an attribute of its `latent_generator`."""

    temperature: float = Field(1.0, ge=0)
    """standard deviation of the noise that latents are made of"""


class FlowConfig(GeneratorConfig):
    network: NetworkConfig = NetworkConfig()
    sampling: DrawConfig = DrawConfig()
    noise_std: float = Field(0.1, ge=0)
    """standard deviation of the noise on the standardised latents, in training and in the held-out likelihood; without
    it the density of latents that repeat has no bound (TarFlow, section 3.2)"""
    guidance: float = Field(2.0, ge=0)
    """the pipeline's guidance scale, used by the previews too; 1 is none"""
