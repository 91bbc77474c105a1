"""The latent noise predictor: a stock diffusers network from its config, and one way to call each of them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from diffusers import ModelMixin, PixArtTransformer2DModel, PRXTransformer2DModel, UNet2DConditionModel
from torch import Tensor

from sd_mini.fused import speed_up

KINDS = {"prx": PRXTransformer2DModel, "pixart": PixArtTransformer2DModel, "unet": UNet2DConditionModel}


def build(kind: str, network: dict[str, Any], latent_shape: tuple[int, int, int], dim: int) -> ModelMixin:
    """Config => the untrained network for latents (C, h, w) and prompt embeddings of width `dim`.

    The fields that the two other stages decide (latent channels, grid, conditioning width) are filled in here; one that
    is given all the same has to agree. Raises ValueError with both numbers when it does not.
    """
    if kind not in KINDS:
        raise ValueError(f"noise predictor: kind {kind!r} is unknown; expected one of {', '.join(KINDS)}")
    cls = KINDS[kind]
    known = inspect.signature(cls.__init__).parameters
    if unknown := sorted(set(network) - set(known)):
        raise ValueError(f"noise predictor: network field {unknown[0]!r} is unknown to {cls.__name__}")
    try:
        return speed_up(_build(kind, network, latent_shape, dim, known))
    except (AssertionError, IndexError, RuntimeError, TypeError, ZeroDivisionError) as error:
        shown = ", ".join(f"{k}={v}" for k, v in network.items())
        reason = " ".join(str(error).split()) or "the fields do not fit together"
        raise ValueError(f"noise predictor: {cls.__name__}({shown}) cannot be built: {reason}") from error


def _build(
    kind: str, network: dict[str, Any], latent_shape: tuple[int, int, int], dim: int, known: Mapping[str, Any]
) -> ModelMixin:
    given = dict(network)
    for field, value in _decided(kind, given, latent_shape, dim).items():
        if given.setdefault(field, value) != value:
            raise ValueError(
                f"noise predictor: {field} is {given[field]}, but the other stages decide {value}; leave the field out"
            )
    patch = given.get("patch_size", known["patch_size"].default) if "patch_size" in known else 1
    if any(side % patch for side in latent_shape[1:]):
        raise ValueError(f"noise predictor: patch_size {patch} does not divide the latent grid {latent_shape[1:]}")
    return KINDS[kind](**given)


def _decided(kind: str, network: dict[str, Any], latent_shape: tuple[int, int, int], dim: int) -> dict[str, Any]:
    channels, height, _ = latent_shape
    if kind == "prx":
        head = network.get("hidden_size", 1792) // network.get("num_heads", 28)
        return {"in_channels": channels, "context_in_dim": dim, "axes_dim": network.get("axes_dim", [head // 2] * 2)}
    grid = {"in_channels": channels, "out_channels": channels, "sample_size": height}
    if kind == "unet":
        return grid | {"cross_attention_dim": dim}
    width = network.get("num_attention_heads", 16) * network.get("attention_head_dim", 72)
    return grid | {"caption_channels": dim, "cross_attention_dim": width, "use_additional_conditions": False}


def predict(
    network: ModelMixin, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor, prompt_mask: Tensor
) -> Tensor:
    """latents (B, C, h, w), timesteps (B,) in [0, 1], prompt_embeds (B, L, D), prompt_mask (B, L) bool => (B, C, h, w).

    The networks count time differently: PRX in [0, 1], PixArt and the UNet in [0, 1000].
    """
    if isinstance(network, PRXTransformer2DModel):
        return network(latents, timesteps, prompt_embeds, attention_mask=prompt_mask, return_dict=False)[0]
    if isinstance(network, PixArtTransformer2DModel):
        return network(
            latents,
            prompt_embeds,
            timestep=timesteps * 1000,
            encoder_attention_mask=prompt_mask,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
    return network(latents, timesteps * 1000, prompt_embeds, encoder_attention_mask=prompt_mask, return_dict=False)[0]
