"""How far to guide: what pictures gain in fit and lose in likeness (Saharia et al. 2022, "Imagen", section 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from eval.asked import Asked, Question
from eval.bootstrap import prompt_interval
from eval.clip_score import cosines
from eval.composition import judge, wilson
from eval.generate import Job
from eval.measure import Tools
from eval.reference import Seen, reference
from eval.sources import Sampling

SCALES = (1.0, 1.5, 2.5, 4.0, 6.0)
PROMPTS = 100


def sweep_jobs(asked: Asked, scales: Sequence[float], count: int, sampling: Sampling) -> list[Job]:
    """The first `count` prompts at each scale, and at the one that the whole evaluation is made with."""
    every = sorted({*scales, sampling.guidance.scale}) if scales else []
    return [
        Job(f"guidance-{scale:g}", asked.captions[:count], replace(sampling, guidance=_at(sampling, scale)))
        for scale in every
    ]


def _at(sampling: Sampling, scale: float) -> Any:
    return replace(sampling.guidance, scale=scale)


def sweep_scores(
    jobs: Sequence[Job], made: dict[str, np.ndarray], question: Question, tools: Tools, chosen: float
) -> Any:
    """=> points in order of scale: fit (`exact`, else CLIP score) with its 95 % interval, and the Frechet distance.

    Raises ValueError where there is neither a judge nor a CLIP model to say how well a picture fits.
    """
    asked, extractor = question.splits[0], tools.networks[0]
    known, points = reference(extractor, question.reference, tools.cache), []
    for job in jobs:
        pictures = made[job.name]
        point = {"guidance": job.sampling.guidance.scale, "n": len(pictures)}
        point |= _fit(pictures, asked, tools)
        point["fd"] = Seen.of(extractor(pictures)).distance(known)
        points.append(point)
    return {
        "fit": "exact" if asked.scenes is not None else "CLIP score",
        "distance": extractor.distance,
        "chosen": chosen,
        "points": points,
    }


def _fit(pictures: np.ndarray, asked: Asked, tools: Tools) -> dict[str, float]:
    if asked.scenes is not None:
        right = sum(judge(p, scene).exact for p, scene in zip(pictures, asked.scenes, strict=False))
        low, high = wilson(right, len(pictures))
        return {"fit": right / len(pictures), "low": low, "high": high}
    assert tools.clip is not None
    prompts = asked.captions[: len(pictures)]
    values = 100 * np.maximum(cosines(tools.clip.pictures(pictures), tools.clip.texts(prompts)), 0)
    low, high = prompt_interval(values, prompts)
    return {"fit": float(values.mean()), "low": low, "high": high}
