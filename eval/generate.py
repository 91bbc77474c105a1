"""Prompts => pictures through the pipeline, each picture from a seed of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from sd_mini import images
from sd_mini.guidance import Guidance
from sd_mini.pipeline import Pipeline


@dataclass(frozen=True)
class Sampling:
    """How pictures are made: scheduler steps, guidance, and pictures a batch."""

    steps: int
    guidance: Guidance
    batch: int


def generate(pipeline: Pipeline, prompts: Sequence[str], sampling: Sampling, bar: tqdm) -> np.ndarray:
    """N prompts => (N, 3, R, R) uint8 at the training resolution R; picture i starts from the noise of seed i.

    Raises ValueError for the first prompt that the pipeline does not take, before any picture is made.
    """
    pipeline.text_stage.tokenize(prompts)
    pictures = []
    for start in range(0, len(prompts), sampling.batch):
        part = prompts[start : start + sampling.batch]
        made = pipeline(
            list(part),
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance.scale,
            guidance_rescale=sampling.guidance.rescale,
            guidance_interval=(sampling.guidance.low, sampling.guidance.high),
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(part))],
        )
        pictures += [images.decode(picture) for picture in made.images]
        bar.update(len(part))
    return np.stack(pictures)
