"""Pictures and what was asked => every score of the report, and the pictures the page shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.analysis.blame import AUTOENCODER, MADE, REAL, Sets, picture_sets, share_out_each
from eval.features.reference import reference
from eval.judge.judge import Verdict, judge_found, read_picture, summarise
from eval.makers.questions import PromptSet, Question
from eval.makers.sources import PictureSource
from eval.metrics.all import METRICS
from eval.metrics.bootstrap import few_prompts
from eval.metrics.clip_score import cosines
from eval.metrics.memorisation import nearest
from eval.metrics.registry import Sample, Tools
from eval.report.gallery import Gallery, pick_galleries, pick_pairs
from sd_mini.data.captioned import CaptionedPictures, load


@dataclass(frozen=True)
class Measured:
    """`scores` are report.json's measured parts; galleries[0] is the saved grid; `remarks` are said to the user."""

    scores: dict[str, Any]
    galleries: list[Gallery]
    remarks: list[str]


def measure(
    question: Question,
    made: dict[str, np.ndarray],
    maker: PictureSource | None,
    tools: Tools,
    repeated: np.ndarray | None = None,
) -> Measured:
    """`made`: (N, 3, R, R) uint8 by split; of the first one everything is measured, of the others the judge's verdict.
    `repeated`: the pictures of `question.repeated`.

    Raises ValueError where a score cannot be taken; what is left out by rule is among the remarks.
    """
    scores: dict[str, Any] = {}
    first, pictures = question.splits[0], made[question.splits[0].split]
    verdicts: list[Verdict] = []
    remarks: list[str] = []
    if (few := few_prompts(first.captions)) is not None:
        scores["different_captions"] = few
        remarks.append(
            f"only {few} different captions for {len(first.captions)} pictures: intervals are over pictures of these "
            "captions, not over captions; binding and recall of captions are left out, and the text stage's share of a "
            "distance rests on so few captions"
        )
    for asked in question.splits:
        data = _text_scores(scores, asked, question, tools)
        sets = _sets(asked, made[asked.split], maker, tools, data)
        judged = _judge_split(scores, asked, sets) if asked.scenes is not None else []
        if asked is first:
            verdicts, sample = judged, Sample(question, pictures, sets, maker, tools, remarks, repeated=repeated)
    for name, metric in METRICS.items():
        part = metric.measure(sample)
        if part is not None:
            scores[name] = part
    if sample.blame:
        scores.setdefault("blame", {}).setdefault(first.split, {}).update(sample.blame)
    galleries = pick_galleries(pictures, first.captions, *_ranking(verdicts, pictures, question, tools))
    if sample.nearest is not None:
        assert tools.training is not None  # the pictures among which the nearest are
        galleries.append(pick_pairs(pictures, first.captions, tools.training, sample.nearest))
    return Measured(scores, galleries, sample.remarks)


def _put(scores: dict[str, Any], part: str, split: str, value: Any) -> None:
    if value is not None:
        scores.setdefault(part, {})[split] = value


def _text_scores(
    scores: dict[str, Any], asked: PromptSet, question: Question, tools: Tools
) -> CaptionedPictures | None:
    """The text stage alone on the asked split; its rows as that stage takes them, where it looks at pixels."""
    probe = tools.probe
    if probe is None or asked.pictures is None:
        return None
    if not probe.sees_pixels:
        _put(scores, "text", asked.split, probe.recorded(question.name))
        return None
    wanted = {"split": asked.split, "resolution": probe.resolution}
    if asked.scenes is not None:
        wanted["count"] = len(asked.captions)
    data = load(tools.data.model_copy(update=wanted), folder=tools.pictures)
    if not all(data.captions):
        return None
    _put(scores, "text", asked.split, probe.scores(data))
    rows = list(range(len(asked.captions))) if asked.rows is None else asked.rows
    return data.select(rows)


def _sets(
    asked: PromptSet, made: np.ndarray, maker: PictureSource | None, tools: Tools, data: CaptionedPictures | None
) -> Sets:
    if asked.pictures is None or maker is None:
        return {MADE: made}
    return picture_sets(asked, made, maker.autoencoder, tools.probe, data, tools.batch)


def _judge_split(scores: dict[str, Any], asked: PromptSet, sets: Sets) -> list[Verdict]:
    """Composition, ceiling, chance (each picture judged by the next prompt) and, where there is a true set, the blame.

    The verdicts on the made pictures."""
    scenes = asked.scenes
    assert scenes is not None  # else there is nothing to judge by
    looked: dict[bytes, Any] = {}  # most pictures of one set stand in the next, too
    level = scenes[0].level
    found = {name: [_once(looked, picture, level) for picture in pictures] for name, pictures in sets.items()}
    verdicts = {name: _verdicts(objects, scenes) for name, objects in found.items()}
    shuffled = summarise(_verdicts(found[MADE], scenes[1:] + scenes[:1]))
    _put(scores, "composition", asked.split, summarise(verdicts[MADE]))
    _put(scores, "chance", asked.split, shuffled)
    if AUTOENCODER in sets:
        _put(scores, "ceiling", asked.split, summarise(verdicts[AUTOENCODER]))
    if REAL in sets:
        wrong = {name: np.array([not v.exact for v in judged], dtype=np.float64) for name, judged in verdicts.items()}
        entry = {"shares": share_out_each(wrong, asked.captions), "shuffled": 1 - shuffled["all"]["exact"]}
        scores.setdefault("blame", {}).setdefault(asked.split, {})["not exact"] = entry
    return verdicts[MADE]


def _once(looked: dict[bytes, Any], picture: np.ndarray, level: int) -> Any:
    key = picture.tobytes()
    if key not in looked:
        looked[key] = read_picture(picture, level)
    return looked[key]


def _verdicts(found: list, scenes: Sequence) -> list[Verdict]:
    return [judge_found(objects, scene) for objects, scene in zip(found, scenes, strict=True)]


def _ranking(
    verdicts: list[Verdict], pictures: np.ndarray, question: Question, tools: Tools
) -> tuple[np.ndarray, str, list[str]]:
    """By what pictures are called best and worst: each one's value, its name, and what is noted under it."""
    if verdicts:
        values = np.array([verdict.soft for verdict in verdicts])
        return values, "the share of the prompt's facts that hold", [_note(verdict) for verdict in verdicts]
    if tools.clip is not None:
        values = cosines(tools.clip.pictures(pictures), tools.clip.texts(question.splits[0].captions))
        return values, "CLIP score", [f"cosine {value:.3f}" for value in values]
    known = reference(tools.networks[0], question.reference, tools.cache)
    away = nearest(tools.networks[0](pictures), known.features).distances
    name = tools.networks[0].name
    return -away, f"nearness to a reference picture in the features of {name}", [f"{value:.3g} away" for value in away]


def _note(verdict: Verdict) -> str:
    """A verdict => "exact", or what is wrong, in words."""
    if verdict.exact:
        return "exact"
    return "cannot be read" if verdict.abstain else f"{verdict.soft:.0%} of the facts hold"
