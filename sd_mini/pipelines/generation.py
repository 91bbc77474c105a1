"""Settings => a picture, and the settings with every value that it was made with: the command line's and the page's."""

from __future__ import annotations

import hashlib
import inspect
from typing import Any

import torch
from PIL import Image

from sd_mini import __version__
from sd_mini.errors import UserError
from sd_mini.files import combined_hash
from sd_mini.pipelines.image_to_image import ImageToImagePipeline
from sd_mini.pipelines.inpainting import InpaintingPipeline
from sd_mini.pipelines.text_to_image import Callback, Pipeline
from sd_mini.png import Settings
from sd_mini.sampling import samplers


def generate(
    pipeline: Pipeline,
    settings: Settings,
    image: Image.Image | None = None,
    mask_image: Image.Image | None = None,
    strict: bool = False,
    callback_on_step_end: Callback | None = None,
) -> tuple[Image.Image, Settings]:
    """Make the one picture of `settings`; the same settings give the same bits with the same stages on one machine.

    Args:
        image, mask_image: what to start from, and where to repaint it; without them the picture starts from noise.
        strict: refuse a prompt that is too long, instead of cutting it with a warning.
        callback_on_step_end: as of `Pipeline.__call__`; the pipeline that it is called with is a copy for this call.

    Returns:
        the picture, and its settings with the pipeline's values for what was None.

    Raises:
        UserError: as of the pipeline's call.
    """
    if image is None and (mask_image is not None or settings.strength is not None):
        raise UserError("a mask and a strength go with a picture to start from; give one, or leave them out")
    kind = Pipeline if image is None else ImageToImagePipeline if mask_image is None else InpaintingPipeline
    # a sampler and a tile are this call's alone, whoever else uses the pipeline
    own = kind.from_pipe(pipeline)
    if settings.sampler not in (None, samplers.name_of(own.scheduler)):
        own.use_sampler(settings.sampler)
    if settings.tile is not None:
        own.enable_vae_tiling(settings.tile)
    edit: dict[str, Any] = {"image": image, "mask_image": mask_image, "strength": settings.strength}
    made = own(
        settings.prompt,
        negative_prompt=settings.negative_prompt,
        height=settings.height,
        width=settings.width,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        guidance_rescale=settings.guidance_rescale,
        guidance_interval=settings.guidance_interval,
        autoguidance=settings.autoguidance,
        strict=strict,
        # a picture a call: in a batch the last bits, and so a pixel's rounding, would depend on the neighbours
        generator=torch.Generator().manual_seed(settings.seed),
        callback_on_step_end=callback_on_step_end,
        **{name: value for name, value in edit.items() if value is not None},
    )
    picture = made.images[0]
    return picture, completed(own, settings, picture, image, mask_image)


def completed(
    pipeline: Pipeline,
    settings: Settings,
    picture: Image.Image,
    image: Image.Image | None = None,
    mask_image: Image.Image | None = None,
) -> Settings:
    """`settings` with the values that `pipeline` has made `picture` with in the place of None."""
    config = pipeline.config
    strength = inspect.signature(type(pipeline).__call__).parameters.get("strength")
    own = {
        "num_inference_steps": config.default_steps,
        "guidance_scale": config.default_guidance,
        "guidance_interval": tuple(config.default_interval),
        "sampler": samplers.name_of(pipeline.scheduler),
        "tile": pipeline.tile,
        "strength": None if strength is None else strength.default,
    }
    missing = {name: value for name, value in own.items() if getattr(settings, name) is None}
    stages, adapters = {k: v for k, v in config.stages.items() if v}, pipeline.adapter_hash
    if adapters is not None:  # no stage's own weights any more
        stages["noise_predictor"] = combined_hash({"into": stages.get("noise_predictor"), "adapters": adapters})
    made = {"height": picture.height, "width": picture.width, "stages": stages, "version": __version__}
    sources = {"image": fingerprint(image), "mask_image": fingerprint(mask_image)}
    return settings.model_copy(update=missing | made | sources)


def fingerprint(image: Image.Image | None) -> str | None:
    """SHA-256 of a picture's mode, size and pixels; none of none."""
    if image is None:
        return None
    return hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()
