"""Where pictures come from: a pipeline of ours, any diffusers text-to-image folder, or a folder of pictures."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from eval.makers.picture_folder import GeneratedFolder, is_picture_folder, lying
from sd_mini import images
from sd_mini.autoencoder.model import KINDS, Autoencoder
from sd_mini.cli.opening import open_pipeline
from sd_mini.cpu import accelerate
from sd_mini.errors import UserError
from sd_mini.files import PIPELINE_MARK, combined_hash, file_hash, file_hashes, written
from sd_mini.pipelines.text_to_image import Pipeline
from sd_mini.sampling.loop import Guidance, OwnDraws
from sd_mini.stages.contract import KINDS as STAGE_KINDS
from sd_mini.stages.start import wrapped
from sd_mini.weights import load_components, own_index, pipeline_variant, reason

CARD = "README.md"  # which an evaluation writes into a pipeline's folder, and which makes no picture


@dataclass(frozen=True)
class Sampling:
    """How pictures are made: scheduler steps, guidance, pictures a batch, and whether an earlier snapshot guides."""

    steps: int
    guidance: Guidance
    batch: int
    autoguidance: bool = False


class PictureSource(Protocol):
    """What makes pictures of prompts."""

    folder: Path | None
    """the saved pipeline, if it was read from one"""
    resolution: int
    hash: str
    """SHA-256 of everything that a picture depends on beside the prompt, the seed and the sampling"""
    steps: int
    guidance: Guidance
    """what the pipeline does when nothing else is asked for"""
    takes: frozenset[str]
    """by which of guidance_scale, guidance_rescale, guidance_interval, sampler and autoguidance it can be led"""
    autoencoder: Autoencoder | None
    text_encoders: list[nn.Module]
    facts: dict[str, Any]
    """for the protocol"""

    def check(self, prompts: Sequence[str]) -> None:
        """Raises ValueError for the first prompt that no picture can be made of."""
        ...

    def make(self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling) -> np.ndarray:
        """n prompts => (n, 3, R, R) uint8, each from its own seed's noise. Raises ValueError for NaN."""
        ...


class Ours:
    """A `Pipeline`. `folder` is where it was saved, if it was."""

    takes: frozenset[str] = frozenset(
        {"guidance_scale", "guidance_rescale", "guidance_interval", "sampler", "autoguidance"}
    )

    def __init__(self, pipeline: Pipeline, folder: Path | None = None):
        pipeline.set_progress_bar_config(disable=True)
        own = [] if pipeline.latent_generator is None else pipeline.latent_generator.noise_predictors
        for network in (pipeline.noise_predictor, pipeline.guide, *own):
            if network is not None:
                accelerate(network)
        if pipeline.few_steps is not None:  # it cannot be guided, and carries its own sampler
            self.takes = frozenset()
        if (generator := pipeline.latent_generator) is not None:
            self.takes = frozenset({"guidance_scale"} if generator.is_guided else ())
        config = pipeline.config
        self.pipeline, self.folder, self.resolution = pipeline, folder, config.resolution
        self.steps, self.guidance = (
            config.default_steps,
            Guidance(config.default_guidance, 0.0, *config.default_interval),
        )
        self.autoencoder = pipeline.autoencoder
        self.text_encoders = text_encoders(pipeline)
        self._describe()

    def use(self, sampler: str | None, autoguidance: bool) -> None:
        """Step by another sampler. Raises ValueError for one that does not fit, and for a guide that is not there."""
        if sampler is not None:
            try:
                self.pipeline.use_sampler(sampler)
            except ValueError as error:
                raise UserError(f"--sampler: {error}") from None
            self._describe()
        if autoguidance and self.pipeline.guide is None:
            raise UserError("--autoguidance: this pipeline has no guide; join one: sd-mini export RUN --guide FOLDER")

    def _describe(self) -> None:
        """`hash` and `facts`, which the sampler is part of."""
        pipeline, folder, config = self.pipeline, self.folder, self.pipeline.config
        scheduler = {} if pipeline.scheduler is None else dict(pipeline.scheduler.config)
        scheduler = {"class": type(pipeline.scheduler).__name__, **scheduler}
        # of an older folder, which lists none, all files
        named = (written(folder) or file_hashes(folder, CARD)) if folder is not None else dict(config.stages)
        if folder is not None:  # the index may have been edited since
            named = {**named, PIPELINE_MARK: file_hash(folder / PIPELINE_MARK)}
        self.hash = combined_hash({"parts": named, "scheduler": str(sorted(scheduler.items()))})
        self.facts = {
            "scheduler": type(pipeline.scheduler).__name__,
            "resolution": config.resolution,
            "stages": dict(config.stages),
        }

    def check(self, prompts: Sequence[str]) -> None:
        self.pipeline.text_stage.tokenize(list(prompts))

    def make(self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling) -> np.ndarray:
        guidance = sampling.guidance
        made = self.pipeline(
            list(prompts),
            num_inference_steps=sampling.steps,
            guidance_scale=guidance.scale,
            guidance_rescale=guidance.rescale,
            guidance_interval=(guidance.low, guidance.high),
            autoguidance=sampling.autoguidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        )
        return np.stack([images.decode(picture) for picture in made.images])


class Stock:
    """Any other diffusers pipeline that takes a prompt. Of guidance it has the scale and the rescale, if it takes them.

    Raises ValueError, one line, for a pipeline that takes none, and where its size has to be given.
    """

    def __init__(self, folder: Path, resolution: int | None, device: str):
        try:
            options = {"use_safetensors": True, "variant": pipeline_variant(folder)}
            networks = load_components(folder, options)
            pipeline = DiffusionPipeline.from_pretrained(folder, **options, **networks).to(device)
        except UserError:
            raise
        except Exception as error:  # whatever the libraries' parsers raise
            raise UserError(f"{folder}: cannot be loaded: {reason(error)}") from error
        pipeline.set_progress_bar_config(disable=True)
        self.pipeline: Any = pipeline
        self.folder: Path | None = folder
        known = inspect.signature(type(pipeline).__call__).parameters
        missing = {"prompt", "generator", "output_type", "num_inference_steps"} - set(known)
        if missing:
            raise UserError(
                f"{folder}: {type(pipeline).__name__} takes no {', '.join(sorted(missing))}; give a "
                "text-to-image pipeline"
            )
        self.takes: frozenset[str] = frozenset({"guidance_scale", "guidance_rescale"} & set(known))
        self.resolution = resolution or _own_side(pipeline, folder)
        self._sides = {side: self.resolution for side in ("height", "width") if side in known}
        self.steps = known["num_inference_steps"].default
        scale, rescale = (
            float(known[name].default) if name in known else usual
            for name, usual in (("guidance_scale", 1.0), ("guidance_rescale", 0.0))
        )
        self.guidance = Guidance(scale, rescale)
        vae: Any = getattr(pipeline, "vae", None)
        is_plain = type(vae) in KINDS.values() and vae.config.in_channels == 3
        self.autoencoder: Autoencoder | None = wrapped(vae).to(device).eval() if is_plain else None
        self.text_encoders = text_encoders(pipeline)
        self.hash = combined_hash({"files": file_hashes(folder, CARD), "side": self.resolution})
        self.facts: dict[str, Any] = {
            "pipeline": type(pipeline).__name__,
            "scheduler": type(pipeline.scheduler).__name__,
            "resolution": self.resolution,
            "stages": {"pipeline": self.hash},
        }

    def check(self, prompts: Sequence[str]) -> None:
        if not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
            raise UserError(f"{self.folder}: got an empty prompt, expected a text for each picture")

    def make(self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling) -> np.ndarray:
        asked = {"guidance_scale": sampling.guidance.scale, "guidance_rescale": sampling.guidance.rescale}
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with OwnDraws(generators):  # a scheduler that draws noise may be given none by its pipeline
            made = self.pipeline(
                prompt=list(prompts),
                num_inference_steps=sampling.steps,
                generator=generators,
                output_type="pt",
                **{name: value for name, value in asked.items() if name in self.takes},
                **self._sides,
            ).images
        return images.to_uint8(torch.as_tensor(made).float() * 2 - 1).cpu().numpy()  # in [0, 1]; refuses NaN


def _own_side(pipeline: Any, folder: Path) -> int:
    for network in ("unet", "transformer"):
        cells = getattr(getattr(getattr(pipeline, network, None), "config", None), "sample_size", None)
        if isinstance(cells, int):
            return cells * getattr(pipeline, "vae_scale_factor", 1)
    raise UserError(f"{folder}: does not say how large its pictures are; give --resolution")


def text_encoders(pipeline: Any) -> list[nn.Module]:
    parts = pipeline.components.items()
    return [part for name, part in parts if name.startswith("text_encoder") and isinstance(part, nn.Module)]


def _class_of(index: Path) -> str | None:
    try:
        return own_index(json.loads(index.read_text(encoding="utf-8"))).get("_class_name")
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{index}: not readable as JSON ({error}); save the pipeline again") from None


def open_source(folder: Path, resolution: int | None, device: str) -> PictureSource | GeneratedFolder:
    """A run, a pipeline folder of ours or of diffusers, or a folder of pictures => what stands in it.

    Raises ValueError, one line, where it is none of these or is damaged.
    """
    index = folder / PIPELINE_MARK
    if index.is_file() and _class_of(index) != Pipeline.__name__:
        return Stock(folder, resolution, device)
    is_run = any((folder / kind).is_dir() for kind in STAGE_KINDS)
    if not index.is_file() and not is_run and is_picture_folder(folder):
        return lying(folder)
    pipeline = open_pipeline(folder).to(device)
    if resolution not in (None, pipeline.config.resolution):
        raise UserError(f"--resolution {resolution}: this pipeline was trained at {pipeline.config.resolution} px")
    saved = next((f for f in (folder, folder / "pipeline") if (f / PIPELINE_MARK).is_file()), None)
    return Ours(pipeline, saved)
