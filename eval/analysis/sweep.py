"""How far to guide: what pictures gain in fit and lose in likeness (Saharia et al. 2022, "Imagen", section 4.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from eval.features.reference import FeatureSet, reference
from eval.judge.judge import judge, wilson
from eval.makers.generate import Job
from eval.makers.questions import PromptSet, Question
from eval.makers.sources import Sampling
from eval.metrics.bootstrap import prompt_interval
from eval.metrics.clip_score import cosines
from eval.metrics.registry import Tools

SCALES = (1.0, 1.5, 2.5, 4.0, 6.0)
PROMPTS = 64


def sweep_jobs(asked: PromptSet, scales: Sequence[float], count: int, sampling: Sampling) -> list[Job]:
    """The first `count` prompts at each scale but the one that the whole evaluation is made with."""
    others = sorted({*scales} - {sampling.guidance.scale})
    return [
        Job(
            f"guidance-{scale:g}",
            asked.captions[:count],
            replace(sampling, guidance=replace(sampling.guidance, scale=scale)),
        )
        for scale in others
    ]


def sweep_scores(
    jobs: Sequence[Job], made: Mapping[str, np.ndarray], question: Question, tools: Tools, chosen: float
) -> dict[str, Any]:
    """=> points in order of scale: fit (`exact`, else CLIP score) with its 95 % interval, and the Frechet distance.

    The point of the `chosen` scale is of the first of the whole evaluation's pictures.
    """
    asked, extractor = question.splits[0], tools.networks[0]
    known, count = reference(extractor, question.reference, tools.cache), len(jobs[0].prompts)
    sets = {job.sampling.guidance.scale: made[job.name] for job in jobs} | {chosen: made[asked.split][:count]}
    points = [
        {
            "guidance": scale,
            "n": count,
            **_fit(sets[scale], asked, tools),
            "fd": FeatureSet.of(extractor(sets[scale])).distance(known),
        }
        for scale in sorted(sets)
    ]
    return {
        "fit": "exact" if asked.scenes is not None else "CLIP score",
        "distance": extractor.distance,
        "chosen": chosen,
        "points": points,
    }


def _fit(pictures: np.ndarray, asked: PromptSet, tools: Tools) -> dict[str, float]:
    if asked.scenes is not None:
        right = sum(judge(p, scene).exact for p, scene in zip(pictures, asked.scenes, strict=False))
        low, high = wilson(right, len(pictures))
        return {"fit": right / len(pictures), "low": low, "high": high}
    assert tools.clip is not None
    prompts = asked.captions[: len(pictures)]
    values = 100 * np.maximum(cosines(tools.clip.pictures(pictures), tools.clip.texts(prompts)), 0)
    low, high = prompt_interval(values, prompts)
    return {"fit": float(values.mean()), "low": low, "high": high}
