"""What the user decides about the family `autoregressive`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sd_mini.config import Config
from training.generators.task import GeneratorConfig


class NetworkConfig(Config):
    """transformers' Llama decoder."""

    width: int = Field(160, ge=2)
    layers: int = Field(4, ge=1)
    heads: int = Field(5, ge=1)
    mlp_width: int = Field(480, ge=1)
    """of the gated layer"""


class DrawConfig(Config):
    """How codes are drawn; of a joined pipeline they are attributes of its `latent_generator`."""

    temperature: float = Field(1.0, ge=0)
    """divides the guided logits; 0 takes the likeliest code"""
    top_k: int = Field(0, ge=0)
    """draw from so many of the likeliest codes; 0: from all"""


class AutoregressiveConfig(GeneratorConfig):
    cache_dtype: Literal["float16", "float32"] = "float32"
    """format of latents and prompt embeddings on disk; rounding to float16 moves some latents to another code"""
    palette: int = Field(0, ge=0)
    """over a small_picture autoencoder: colours, found among the training pixels, that stand for its pixels; the
    picture is drawn pixel by pixel; 0: the codes of a vq autoencoder"""
    network: NetworkConfig = NetworkConfig()
    sampling: DrawConfig = DrawConfig()
    guidance: float = Field(2.0, ge=0)
    """the pipeline's guidance scale on the logits, used by the previews too; 1 is none"""
