"""Pixels <=> latents. `model_index.json` of a saved pipeline names the class by this package."""

from diffusers import ModelMixin  # diffusers' loader looks up a component's base class in this module

from sd_mini.autoencoder.model import Autoencoder

__all__ = ["Autoencoder", "ModelMixin"]
