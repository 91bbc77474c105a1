"""Where pictures come from: a pipeline of ours, any diffusers text-to-image folder, or a folder of pictures."""

from __future__ import annotations

import inspect
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import nn

from sd_mini import images
from sd_mini.autoencoder import KINDS, Autoencoder
from sd_mini.cli import PIPELINE_MARK, open_pipeline
from sd_mini.data_folder import is_hidden, path_key
from sd_mini.data_metadata import is_metadata, read_metadata, some
from sd_mini.errors import UserError
from sd_mini.guidance import Guidance
from sd_mini.load_autoencoder import wrapped
from sd_mini.memory import check_room
from sd_mini.pipeline import Pipeline
from sd_mini.samplers import OwnDraws
from sd_mini.stages import KINDS as STAGE_KINDS
from sd_mini.stages import combined_hash, file_hash, file_hashes, written
from sd_mini.texts import read_lines, shown
from sd_mini.weights import load_components, pipeline_variant, reason

CARD = "README.md"  # which an evaluation writes into a pipeline's folder, and which makes no picture


@dataclass(frozen=True)
class Sampling:
    """How pictures are made: scheduler steps, guidance, pictures a batch, and whether an earlier snapshot guides."""

    steps: int
    guidance: Guidance
    batch: int
    autoguidance: bool = False


class Maker(Protocol):
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

    takes = frozenset({"guidance_scale", "guidance_rescale", "guidance_interval", "sampler", "autoguidance"})

    def __init__(self, pipeline: Pipeline, folder: Path | None = None):
        pipeline.set_progress_bar_config(disable=True)
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
        scheduler = {"class": type(pipeline.scheduler).__name__, **pipeline.scheduler.config}
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
        self.pipeline, self.folder = pipeline, folder
        known = inspect.signature(type(pipeline).__call__).parameters
        missing = {"prompt", "generator", "output_type", "num_inference_steps"} - set(known)
        if missing:
            raise UserError(
                f"{folder}: {type(pipeline).__name__} takes no {', '.join(sorted(missing))}; give a "
                "text-to-image pipeline"
            )
        self.takes = frozenset({"guidance_scale", "guidance_rescale"} & set(known))
        self.resolution = resolution or _own_side(pipeline, folder)
        self._sides = {side: self.resolution for side in ("height", "width") if side in known}
        self.steps = known["num_inference_steps"].default
        scale, rescale = (
            float(known[name].default) if name in known else usual
            for name, usual in (("guidance_scale", 1.0), ("guidance_rescale", 0.0))
        )
        self.guidance = Guidance(scale, rescale)
        vae = getattr(pipeline, "vae", None)
        is_plain = type(vae) in KINDS.values() and vae.config.in_channels == 3
        self.autoencoder = wrapped(vae).to(device).eval() if is_plain else None
        self.text_encoders = text_encoders(pipeline)
        self.hash = combined_hash({"files": file_hashes(folder, CARD), "side": self.resolution})
        self.facts = {
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


@dataclass(frozen=True, eq=False)
class Lying:
    """Pictures that were made elsewhere, (N, 3, R, R) uint8, and their prompts."""

    folder: Path
    pictures: np.ndarray
    prompts: list[str]

    @property
    def resolution(self) -> int:
        return self.pictures.shape[-1]


_PROMPTS = "prompts.txt"


def lying(folder: Path) -> Lying:
    """A folder of pictures with prompts.txt, a line a picture in the order of their names as numbers count, or with
    metadata (metadata.jsonl of {"file_name": ..., "text": ...}, .csv, .tsv or .parquet).

    Raises UserError, one line: no picture, those that cannot be read, sizes that differ or are not square, more than
    memory holds, and prompts and pictures that do not belong together.
    """
    files = sorted(filter(_is_picture, folder.iterdir()), key=_natural)
    if not files:
        raise UserError(
            f"{folder}: no pictures here; expected pictures and {_PROMPTS} or metadata.jsonl, or a pipeline"
        )
    files, prompts = _prompts(folder, files)
    return Lying(folder, _read_alike(files), prompts)


def _read_alike(files: list[Path]) -> np.ndarray:
    """Square pictures of one size => (N, 3, R, R) uint8."""
    pictures, faults = [], []
    for file in files:
        try:
            picture = images.decode(file)
        except UserError as error:
            faults.append(str(error))
            continue
        if not pictures and picture.shape[1] != picture.shape[2]:
            raise UserError(f"{file}: not square; cut the pictures to squares, as the reference pictures are")
        if not pictures:
            check_room(str(file.parent), len(files), picture.shape[-1])
            first = file
        elif picture.shape != pictures[0].shape:
            sizes = [" x ".join(map(str, p.shape[:0:-1])) for p in (picture, pictures[0])]
            faults.append(f"{file}: {sizes[0]} px, but {first.name} {sizes[1]} px; make all of one size")
            continue
        pictures.append(picture)
    if faults:
        raise UserError(some(faults))
    return np.stack(pictures)


def _natural(path: Path) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _prompts(folder: Path, files: list[Path]) -> tuple[list[Path], list[str]]:
    """Each picture with its prompt."""
    if (folder / _PROMPTS).is_file():
        prompts = read_lines(folder / _PROMPTS)
        if len(files) != len(prompts):
            raise UserError(
                f"{folder}: {len(files)} pictures and {len(prompts)} prompts, expected one prompt a picture"
            )
        pairs = zip(files, prompts, strict=True)
        return _checked(
            folder / _PROMPTS, {"without a text": [f.name for f, text in pairs if not text.strip()]}, files, prompts
        )
    metadata = [path for path in sorted(folder.iterdir()) if is_metadata(path)]
    if not metadata:
        raise UserError(
            f"{folder}: {len(files)} pictures, but neither {_PROMPTS} nor metadata.jsonl says what was asked"
        )
    if len(metadata) > 1:
        raise UserError(f"{folder}: holds {' and '.join(path.name for path in metadata)}; keep one of them")
    rows, on_disk = read_metadata(metadata[0]), {path_key(file): file for file in files}
    keys = [path_key(folder / row.file_name) for row in rows]
    times = Counter(keys)
    texts = [row.fields.get("text") for row in rows]
    faults = {
        "not listed": [file.name for key, file in on_disk.items() if key not in times],
        "listed but not there": [row.file_name for row, key in zip(rows, keys, strict=True) if key not in on_disk],
        "listed more than once": [Path(key).name for key, number in times.items() if number > 1],
        "without a text": [
            f"{row.file_name} ({shown(text)})"
            for row, text in zip(rows, texts, strict=True)
            if not isinstance(text, str) or not text.strip()
        ],
    }
    return _checked(metadata[0], faults, [on_disk.get(key) for key in keys], texts)


def _checked(source: Path, faults: dict[str, list[str]], files: list, prompts: list) -> tuple[list[Path], list[str]]:
    """Raises UserError where there are `faults`, kind => names; else what is given."""
    said = [f"{kind}: {some(names, ', ')}" for kind, names in faults.items() if names]
    if said:
        raise UserError(f"{source}: expected a text for each picture beside it, once; {'; '.join(said)}")
    return files, prompts


def _is_picture(path: Path) -> bool:
    return images.is_picture(path) and not is_hidden(path.name) and path.is_file()


def _class_of(index: Path) -> str | None:
    try:
        return json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{index}: not readable as JSON ({error}); save the pipeline again") from None


def open_source(folder: Path, resolution: int | None, device: str) -> Maker | Lying:
    """A run, a pipeline folder of ours or of diffusers, or a folder of pictures => what stands in it.

    Raises ValueError, one line, where it is none of these or is damaged.
    """
    index = folder / PIPELINE_MARK
    if index.is_file() and _class_of(index) != Pipeline.__name__:
        return Stock(folder, resolution, device)
    is_run = any((folder / kind).is_dir() for kind in STAGE_KINDS)
    if folder.is_dir() and not index.is_file() and not is_run and any(map(_is_picture, folder.iterdir())):
        return lying(folder)
    pipeline = open_pipeline(folder).to(device)
    if resolution not in (None, pipeline.config.resolution):
        raise UserError(f"--resolution {resolution}: this pipeline was trained at {pipeline.config.resolution} px")
    saved = next((f for f in (folder, folder / "pipeline") if (f / PIPELINE_MARK).is_file()), None)
    return Ours(pipeline, saved)
