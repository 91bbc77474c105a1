"""A noise predictor that exists already: from a diffusers folder or hub name, checked against the two other stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import ModelMixin, UNet2DConditionModel

from sd_mini.errors import UserError
from sd_mini.fused import speed_up
from sd_mini.noise_predictor import check_call, class_of, condition_field
from sd_mini.weights import load_complete, reason

_SUBFOLDERS = ("unet", "transformer", "noise_predictor")  # where a diffusers pipeline keeps its denoiser


def load_network(name: str, latent_shape: tuple[int, int, int], dim: int) -> ModelMixin:
    """A denoiser's folder, a diffusers pipeline's folder, or a hub name of either => the network, in float32.

    Weights come from safetensors only. Raises ValueError, one line, both numbers in it where one does not fit: no such
    thing, files cut short, latents of other channels, prompt embeddings of another width.
    """
    config = _config(name)
    cls = class_of(config.pop("_class_name"))
    subfolder = config.pop("subfolder")
    _check_widths(name, cls, config, latent_shape, dim)
    what = f"network.pretrained {name}"
    try:
        options = {"subfolder": subfolder, "low_cpu_mem_usage": False}
        complaint = "its weights file lacks"
        network = load_complete(cls, name, what, has_only=True, complaint=complaint, **options).float()
    except UserError:
        raise
    except Exception as error:  # the libraries raise whatever their parsers do, bare Exceptions among it
        raise UserError(f"{what}: cannot be loaded ({reason(error)}); give a whole folder") from error
    try:
        check_call(network, latent_shape, dim)
    except Exception as error:  # whatever a network says that wants more than it is given
        raise UserError(
            f"network.pretrained {name}: {cls.__name__} cannot be called with latents {latent_shape} and prompt "
            f"embeddings of width {dim} alone ({reason(error)}); give a network without further conditions"
        ) from error
    return speed_up(network)


def _config(name: str) -> dict[str, Any]:
    """The network's config.json, and the `subfolder` that it lies in."""
    folder = Path(name)
    if not folder.is_dir():
        return _hub_config(name)
    for subfolder in ("", *_SUBFOLDERS):
        path = folder / subfolder / "config.json"
        if path.is_file():
            try:
                config = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"network.pretrained {path}: not readable as JSON ({error})") from error
            if "_class_name" in config:
                return {**config, "subfolder": subfolder or None}
    raise UserError(
        f"network.pretrained {name}: no diffusers network here (config.json is missing); expected its folder, or a "
        f"pipeline's with {', '.join(_SUBFOLDERS)}"
    )


def _hub_config(name: str) -> dict[str, Any]:
    reasons = []
    for subfolder in (None, *_SUBFOLDERS):
        try:
            config = dict(UNet2DConditionModel.load_config(name, subfolder=subfolder))  # which any class could do
        except Exception as error:  # offline, no such name, no such folder: the hub's client has a class for each
            reasons.append(" ".join(str(error).split()))
            continue
        if "_class_name" in config:
            return {**config, "subfolder": subfolder}
    raise UserError(
        f"network.pretrained {name}: neither a folder nor a network that the hub gives now ({reasons[-1]}); check the "
        "name, or give a folder"
    )


def _check_widths(
    name: str, cls: type[ModelMixin], config: dict[str, Any], latent_shape: tuple[int, int, int], dim: int
) -> None:
    channels, condition = latent_shape[0], condition_field(cls)
    expected = {"in_channels": channels, "out_channels": channels}
    if condition is not None:
        expected[condition] = dim
    what = {"in_channels": "latents", "out_channels": "latents", condition: "prompt embeddings"}
    for field, wanted in expected.items():
        found = config.get(field)
        if found is not None and found != wanted:
            raise UserError(
                f"network.pretrained {name}: {field} is {found}, but the {what[field]} have {wanted}; train the other "
                "stages to fit it, or give a network that fits them"
            )
    patch = config.get("patch_size", 1)
    if isinstance(patch, int) and any(side % patch for side in latent_shape[1:]):
        raise UserError(
            f"network.pretrained {name}: patch_size {patch} does not divide the latent grid {latent_shape[1:]}"
        )
