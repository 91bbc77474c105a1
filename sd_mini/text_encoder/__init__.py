"""Prompts => prompt embeddings. `model_index.json` of a saved pipeline names the class by this package."""

from diffusers import ModelMixin  # diffusers' loader looks up a component's base class in this module

from sd_mini.text_encoder.adapter import TextAdapter

__all__ = ["ModelMixin", "TextAdapter"]
