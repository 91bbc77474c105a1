"""The ways from text to latents other than a noise predictor; each family is one file and one class."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sd_mini.generators.base import LatentGenerator

# family => its class in the module of that name; a regression is a VAE without a draw
CLASSES = {
    "autoregressive": "AutoregressiveGenerator",
    "normalizing_flow": "NormalizingFlow",
    "gan": "OnePassGenerator",
    "vae": "OnePassGenerator",
    "regression": "OnePassGenerator",
}
_MODULES = {"gan": "one_pass", "vae": "one_pass", "regression": "one_pass"}


def __getattr__(name: str) -> Any:
    """The classes as a saved pipeline names them, and the base class that diffusers' loader looks for here."""
    if name == "ModelMixin":
        return import_module("diffusers").ModelMixin
    if (found := class_named(name)) is None:
        raise AttributeError(f"module {__name__} has no {name}")
    return found


def class_named(name: str) -> type[LatentGenerator] | None:
    """The class of that name, as a stage's config.json has it; none where there is none."""
    family = next((family for family, cls in CLASSES.items() if cls == name), None)
    if family is None:
        return None
    return getattr(import_module(f"sd_mini.generators.{_MODULES.get(family, family)}"), name)
