"""A pipeline as a folder of diffusers' own classes alone: `StableDiffusionPipeline.from_pretrained(FOLDER)`.

The stock pipeline has no adapter and no statistics of the latents, and both are affine here: the adapter becomes the
UNet's `encoder_hid_proj`, mean and standard deviation go into the autoencoder's 1 x 1 convolutions.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from sd_mini.autoencoder.model import Autoencoder
from sd_mini.diffusion.objective import unwrapped
from sd_mini.errors import UserError
from sd_mini.files import atomic_folder, forget_origins, written_to
from sd_mini.pipelines import standalone
from sd_mini.pipelines.joining import JoinedPipeline
from sd_mini.text_encoder.adapter import TextAdapter
from sd_mini.text_encoder.encoder import OPEN_CLIP_CLEANING

_SIDE = 8  # px: the stock pipeline refuses pictures whose sides it does not divide


def write(pipeline: JoinedPipeline, folder: Path, run: Path | None = None, license_name: str | None = None) -> None:
    """Write `pipeline` as a stock folder, all or nothing, with a model card; see `standalone.write` for the arguments.

    Raises UserError for a pipeline that diffusers' own classes cannot be (`stable_diffusion`).
    """
    stock = stable_diffusion(pipeline)
    with written_to(folder), atomic_folder(folder, keep=True) as partial:
        stock.save_pretrained(partial)
        forget_origins(partial)
        standalone.describe(pipeline, partial, _usage(pipeline), run, license_name)


def stable_diffusion(pipeline: JoinedPipeline) -> StableDiffusionPipeline:
    """The same pictures of the same latents, prompts and settings, by diffusers' own pipeline.

    Raises UserError, one line, that names what it has no place for.
    """
    check(pipeline)
    tokenizer: Any = copy.deepcopy(pipeline.tokenizer)
    tokenizer.model_max_length = pipeline.text_adapter.length
    autoencoder: Any = pipeline.autoencoder
    network, side = unwrapped(pipeline.noise_predictor), pipeline.config.resolution // autoencoder.stride
    parts: dict[str, Any] = {
        "vae": with_statistics(autoencoder),
        "text_encoder": pipeline.text_encoder,
        "tokenizer": tokenizer,
        "unet": with_projection(network, pipeline.text_adapter, side),
        "scheduler": pipeline.scheduler,
        **dict.fromkeys(("safety_checker", "feature_extractor")),
    }
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


def check(pipeline: JoinedPipeline) -> None:
    """Raises UserError unless every part has a counterpart in StableDiffusionPipeline."""
    network, autoencoder, adapter = unwrapped(pipeline.noise_predictor), pipeline.autoencoder, pipeline.text_adapter
    tokenizer, encoder = pipeline.tokenizer, pipeline.text_encoder
    refusals = {
        f"text_encoder: {type(encoder).__name__}, expected a CLIPTextModel": type(encoder) is not CLIPTextModel,
        f"tokenizer: {type(tokenizer).__name__}, expected a CLIPTokenizer without open_clip's cleaning": (
            not isinstance(tokenizer, CLIPTokenizer) or tokenizer.init_kwargs.get(OPEN_CLIP_CLEANING)
        ),
        "text_adapter: attends to words alone and has a null condition of its own; train stage 1 with --adapter.plain "
        "true --adapter.depth 0 --adapter.identity_scale 0, then stage 3": not adapter.config.plain,
        f"noise_predictor: {type(network).__name__}, expected a UNet2DConditionModel": (
            type(network) is not UNet2DConditionModel
        ),
        "noise_predictor: a LoRA is loaded; fuse_lora() and unload_lora_weights() first": (
            pipeline.get_list_adapters()["noise_predictor"]
        ),
        "noise_predictor: is made for a few steps without guidance, and needs sd_mini's loop": pipeline.few_steps,
        "noise_predictor: has a projection of its own (encoder_hid_dim_type)": (
            network.config.get("encoder_hid_dim_type") is not None
        ),
        f"noise_predictor: predicts the clean latents on the linear path ({pipeline.process.kind}); expected flow, "
        "epsilon, v_prediction or sample": pipeline.process.kind == "flow_x",
        f"autoencoder: kind {autoencoder.config.kind}, expected kl": autoencoder.config.kind != "kl",
        f"autoencoder: patch_size {autoencoder.config.patch_size} folds pixels; expected 1": (
            autoencoder.config.patch_size != 1
        ),
        f"scheduler: {type(pipeline.scheduler).__name__} is not called by it; choose --sampler dpm++ or unipc": (
            not hasattr(pipeline.scheduler, "init_noise_sigma")
        ),
        f"resolution: {pipeline.config.resolution} px, expected a multiple of {_SIDE}": (
            pipeline.config.resolution % _SIDE
        ),
    }
    for reason, is_refused in refusals.items():
        if is_refused:
            raise UserError(f"StableDiffusionPipeline cannot be made of this: {reason}")


@torch.no_grad()
def with_projection(network: UNet2DConditionModel, adapter: TextAdapter, side: int) -> UNet2DConditionModel:
    """The UNet on latents of `side` cells, with a plain adapter before its cross-attention.

    tokens = (residual_scale * (W states + b) - mean) / std, which is a linear layer.
    """
    width = adapter.config.state_dims[0]
    unet = _like(network, encoder_hid_dim_type="text_proj", encoder_hid_dim=width, sample_size=side)
    read: Any = adapter.inputs[0]
    scale = adapter.config.residual_scale / adapter.token_std
    projection = {
        "encoder_hid_proj.weight": scale[:, None] * read.state_in.weight,
        "encoder_hid_proj.bias": scale * read.state_in.bias - adapter.token_mean / adapter.token_std,
    }
    unet.load_state_dict(network.state_dict() | projection)
    return unet.eval()


@torch.no_grad()
def with_statistics(autoencoder: Autoencoder) -> AutoencoderKL:
    """The network whose own latents are the standardised ones: scaling_factor 1, and the statistics in its 1 x 1
    convolutions, which are made where it has none."""
    network: Any = autoencoder.network
    mean, std = autoencoder.mean.flatten(), autoencoder.std.flatten()
    vae = _like(network, scaling_factor=1.0, use_quant_conv=True, use_post_quant_conv=True)
    vae.load_state_dict(network.state_dict(), strict=False)
    channels = len(mean)
    # (z - mean) / std of the posterior's mean; its log variance loses 2 log std
    weight, bias = _pointwise(network.quant_conv, 2 * channels)
    scale = torch.cat([1 / std, torch.ones_like(std)])
    shift = torch.cat([mean / std, 2 * std.log()])
    _set(vae.quant_conv, scale[:, None] * weight, scale * bias - shift)
    # std * z + mean
    weight, bias = _pointwise(network.post_quant_conv, channels)
    _set(vae.post_quant_conv, weight * std, bias + weight @ mean)
    return vae.eval()


def _like(network: Any, **changes: Any) -> Any:
    """A new network of the same class and fields, some of them changed; from_config would take defaults for these."""
    fields = {name: value for name, value in network.config.items() if not name.startswith("_")}
    return type(network)(**fields | changes)


def _pointwise(convolution: nn.Conv2d | None, channels: int) -> tuple[Tensor, Tensor]:
    """A 1 x 1 convolution => its weight (C, C) and bias (C,); where there is none the identity's."""
    if convolution is None:
        return torch.eye(channels), torch.zeros(channels)
    assert convolution.bias is not None
    return convolution.weight[:, :, 0, 0], convolution.bias


def _set(convolution: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    assert convolution.bias is not None
    convolution.weight.copy_(weight[:, :, None, None])
    convolution.bias.copy_(bias)


def _usage(pipeline: JoinedPipeline) -> list[str]:
    """The lines of the card: the stock pipeline's own defaults are 50 steps and guidance 7.5."""
    config = pipeline.config
    low, high = config.default_interval
    interval = [] if (low, high) == (0, 1) else [f"The recipe guides between noise levels {low:g} and {high:g} alone."]
    return [
        "```python",
        "from diffusers import StableDiffusionPipeline",
        "",
        'pipeline = StableDiffusionPipeline.from_pretrained("FOLDER")',
        f'picture = pipeline("a prompt", num_inference_steps={config.default_steps}, '
        f"guidance_scale={config.default_guidance:g}).images[0]",
        "```",
        "",
        *interval,
    ]
