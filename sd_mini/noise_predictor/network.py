"""The latent noise predictor: a diffusers network from its config or a folder, and one way to call each of them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from diffusers.models import PixArtTransformer2DModel, PRXTransformer2DModel, UNet2DConditionModel
from diffusers.models.modeling_utils import ModelMixin

from sd_mini.diffusion.objective import predict
from sd_mini.errors import UserError

KINDS = {"prx": PRXTransformer2DModel, "pixart": PixArtTransformer2DModel, "unet": UNet2DConditionModel}
_ARGUMENTS = {"hidden_states", "sample", "timestep", "encoder_hidden_states"}  # all that its call may require
# raised by diffusers' constructors for fields that do not fit together
_BUILD_ERRORS = (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError, ZeroDivisionError)


def class_of(kind: str) -> type[ModelMixin]:
    """One of KINDS, or the class name of another diffusers denoiser with the same call => the class.

    The same call: latents, `timestep`, `encoder_hidden_states` and `encoder_attention_mask`, and nothing else that it
    could not do without. Raises ValueError for any other.
    """
    if kind in KINDS:
        return KINDS[kind]
    cls = getattr(diffusers, kind, None) if kind[:1].isupper() else None
    if not (isinstance(cls, type) and issubclass(cls, ModelMixin)):
        raise UserError(
            f"noise predictor: kind {kind!r} is unknown; expected one of {', '.join(KINDS)}, or the class name of a "
            "diffusers denoiser such as SanaTransformer2DModel"
        )
    if cls in KINDS.values():
        return cls
    call = inspect.signature(cls.forward).parameters
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    required = {n for n, p in call.items() if p.default is p.empty and p.kind in plain} - {"self"}
    lacking = {"timestep", "encoder_hidden_states", "encoder_attention_mask"} - set(call)
    if lacking or required - _ARGUMENTS:
        what = f"has no {sorted(lacking)[0]}" if lacking else f"requires {sorted(required - _ARGUMENTS)[0]} too"
        raise UserError(
            f"noise predictor: {kind} {what}; expected a denoiser that is called with latents, timestep, "
            "encoder_hidden_states and encoder_attention_mask"
        )
    return cls


def build(kind: str, network: dict[str, Any], latent_shape: tuple[int, int, int], dim: int) -> ModelMixin:
    """Config => the untrained network for latents (C, h, w) and prompt embeddings of width `dim`.

    Fields that the two other stages determine (latent channels, grid, conditioning width) are filled in; a given one
    has to agree. Raises UserError with both numbers where it does not.
    """
    cls = class_of(kind)
    known = inspect.signature(cls.__init__).parameters
    if unknown := sorted(set(network) - set(known)):
        raise UserError(f"noise predictor: network field {unknown[0]!r} is unknown to {cls.__name__}")
    fields = dict(network)
    try:
        decided = _shared_fields(cls, fields, latent_shape, dim)
    except (TypeError, ZeroDivisionError) as error:
        raise UserError(_build_error(cls, network, error)) from error
    for field, value in decided.items():
        if fields.setdefault(field, value) != value:
            raise UserError(
                f"noise predictor: {field} is {fields[field]}, but the other stages decide {value}; leave the field out"
            )
    _check_patch(fields, known, latent_shape)
    for field in ("depth", "num_layers"):  # the classes accept less, and build no blocks
        if isinstance(fields.get(field), int) and fields[field] < 1:
            raise UserError(f"noise predictor: {field} is {fields[field]}; expected at least 1 block")
    try:
        model = cls(**fields)
        if cls not in KINDS.values():
            check_call(model, latent_shape, dim)
    except _BUILD_ERRORS as error:
        raise UserError(_build_error(cls, network, error)) from error
    return model


def _build_error(cls: type, network: dict[str, Any], error: Exception) -> str:
    shown = ", ".join(f"{k}={v}" for k, v in network.items())
    reason = " ".join(str(error).split()) or "the fields do not fit together"
    return f"noise predictor: {cls.__name__}({shown}) cannot be built: {reason}"


def _check_patch(fields: Mapping[str, Any], known: Mapping[str, Any], latent_shape: tuple[int, int, int]) -> None:
    patch = fields.get("patch_size", known["patch_size"].default) if "patch_size" in known else 1
    if isinstance(patch, int) and patch > 0 and any(side % patch for side in latent_shape[1:]):
        raise UserError(f"noise predictor: patch_size {patch} does not divide the latent grid {latent_shape[1:]}")


def check_call(network: ModelMixin, latent_shape: tuple[int, int, int], dim: int) -> None:
    """Call it once on zeros: its output has to be (1, C, h, w). Raises UserError, or what the network raises."""
    latents = torch.zeros(1, *latent_shape)
    with torch.no_grad():
        output = predict(network, latents, torch.ones(1), torch.zeros(1, 2, dim), torch.ones(1, 2, dtype=torch.bool))
    if output.shape != latents.shape:
        raise UserError(f"it makes {tuple(output.shape[1:])} of latents of {latent_shape}; expected the same shape")


def _shared_fields(
    cls: type[ModelMixin], network: dict[str, Any], latent_shape: tuple[int, int, int], dim: int
) -> dict[str, Any]:
    channels, height, _ = latent_shape
    if cls is PRXTransformer2DModel:
        head = network.get("hidden_size", 1792) // network.get("num_heads", 28)
        return {"in_channels": channels, "context_in_dim": dim, "axes_dim": network.get("axes_dim", [head // 2] * 2)}
    known = inspect.signature(cls.__init__).parameters
    grid = {"in_channels": channels, "out_channels": channels, "sample_size": height}
    decided = {field: value for field, value in grid.items() if field in known}
    width = condition_field(cls)
    if width is not None:
        decided[width] = dim
    if cls is PixArtTransformer2DModel:
        inner = network.get("num_attention_heads", 16) * network.get("attention_head_dim", 72)
        decided |= {"cross_attention_dim": inner, "use_additional_conditions": False}
    return decided


def condition_field(cls: type[ModelMixin]) -> str | None:
    """The field of its config that holds the width of the prompt embeddings."""
    known = inspect.signature(cls.__init__).parameters
    names = ("context_in_dim", "caption_channels", "cross_attention_dim", "joint_attention_dim")
    return next((name for name in names if name in known), None)
