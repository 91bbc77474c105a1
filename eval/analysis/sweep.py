"""How far to guide: what pictures gain in fit and lose in likeness (Saharia et al. 2022, "Imagen", section 4.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from eval.features.features import Extractor
from eval.features.reference import FeatureSet, reference
from eval.judge.judge import judge, wilson
from eval.makers.generate import Job
from eval.makers.questions import PromptSet, Question
from eval.makers.repeated import EACH, REPEATED, Repeated
from eval.makers.sources import Sampling
from eval.metrics.bootstrap import prompt_interval
from eval.metrics.clip_score import cosines
from eval.metrics.diversity import within_prompts
from eval.metrics.registry import Tools

SCALES = (1.0, 1.5, 2.5, 4.0, 6.0)
PROMPTS = 64


def sweep_jobs(question: Question, scales: Sequence[float], count: int, sampling: Sampling) -> list[Job]:
    """The first `count` prompts at each scale but the one that the whole evaluation is made with; where several
    pictures of a prompt are compared, those of the first prompts, `count` at most, too."""
    sets = {"guidance": question.splits[0].captions[:count]}
    if question.repeated is not None:
        sets[REPEATED] = question.repeated.captions[: count // EACH * EACH]
    others = sorted({*scales} - {sampling.guidance.scale})
    jobs = []
    for scale in others:
        at = replace(sampling, guidance=replace(sampling.guidance, scale=scale))
        jobs += [Job(f"{name}-{scale:g}", captions, at) for name, captions in sets.items() if captions]
    return jobs


def sweep_scores(
    jobs: Sequence[Job], made: Mapping[str, np.ndarray], question: Question, tools: Tools, chosen: float
) -> dict[str, Any]:
    """=> points in order of scale: fit (`exact`, else CLIP score) with its 95 % interval, and the Frechet distance.

    The point of the `chosen` scale is of the first of the whole evaluation's pictures. `diversity`: the Vendi score
    within a prompt, as a share of the real pictures'.
    """
    asked, extractor = question.splits[0], tools.networks[0]
    known, count = reference(extractor, question.reference, tools.cache), len(jobs[0].prompts)
    own = [job for job in jobs if not job.name.startswith(REPEATED)]
    sets = {job.sampling.guidance.scale: made[job.name] for job in own} | {chosen: made[asked.split][:count]}
    several = {job.sampling.guidance.scale: made[job.name] for job in jobs if job not in own}
    if question.repeated is not None and several:
        several[chosen] = made[REPEATED][: len(next(iter(several.values())))]
    points = [
        {
            "guidance": scale,
            "n": count,
            **_fit(sets[scale], asked, tools),
            "fd": FeatureSet.of(extractor(sets[scale])).distance(known),
            **(_diversity(several[scale], question.repeated, extractor) if scale in several else {}),
        }
        for scale in sorted(sets)
    ]
    return {
        "fit": "exact" if asked.scenes is not None else "CLIP score",
        "distance": extractor.distance,
        "chosen": chosen,
        "points": points,
    }


def _diversity(pictures: np.ndarray, repeated: Repeated | None, extractor: Extractor) -> dict[str, Any]:
    assert repeated is not None  # as there are pictures of it
    count = len(pictures)
    real = extractor(np.asarray(repeated.real[:count]))
    vendi = within_prompts(extractor(pictures), real, repeated.captions[:count])["vendi"]
    return {"diversity": vendi} if vendi is not None else {}


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
