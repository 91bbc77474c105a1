"""The evaluators in the loop: the scores of `python -m eval`, of the pipeline as it is at that step."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from pydantic import Field

from sd_mini.config import Config
from sd_mini.data.captioned import DataConfig
from sd_mini.errors import UserError
from sd_mini.pipelines.text_to_image import Pipeline
from sd_mini.processes import alone, process_device
from sd_mini.progress import progress

Scores = dict[str, float]
DISTANCES = ("kid", "precision", "recall", "density", "coverage")  # logged as NETWORK/NAME, beside the Fréchet distance


class EvaluateConfig(Config):
    """The evaluators in the loop, on the first captions of `valid`; of shapes, on the first that `python -m eval` has.

    Only the main process evaluates; the others wait.
    """

    every: int | None = Field(None, ge=1)
    """steps between two evaluations of the pipeline; null: off"""
    prompts: int = Field(64, ge=2)
    """pictures an evaluation"""
    batch: int = Field(64, ge=1)
    """pictures generated at a time"""
    features: tuple[str, ...] = ("mini",)
    """networks whose features are compared, as `python -m eval --features`"""
    clip: str | None = None
    """open_clip model for the CLIP score, as `python -m eval --clip`"""


class Evaluator:
    """Scores of a pipeline, bit for bit those of `python -m eval` of the same pipeline saved to a folder.

    With `config.every`, the main process opens the data and the networks here, so that what is wrong with them is
    reported before the first update: raises UserError of one line. `cache`: the run's folder
    of caches.
    """

    def __init__(self, config: EvaluateConfig, data: DataConfig, cache: Path):
        self._evaluate: Callable[[Pipeline], Scores] | None = None
        if config.every is not None and PartialState().is_main_process:
            with reported_as_evaluation(), untouched_training(), alone():
                self._evaluate = open_evaluators(config, data, cache)

    def scores(self, pipeline: Pipeline) -> Scores:
        """One number a name. Raises UserError where the pipeline cannot be scored, such as for NaN in its pictures."""
        assert self._evaluate is not None, "scores are for the main process, and only with evaluate.every"
        with reported_as_evaluation(), untouched_training():
            return self._evaluate(pipeline)


def open_evaluators(config: EvaluateConfig, data: DataConfig, cache: Path) -> Callable[[Pipeline], Scores]:
    """Open the prompts, the reference pictures and the networks => a function from a pipeline to its scores."""
    # the door from training to eval: a run that does not evaluate imports none of it
    from eval.features.features import open_all
    from eval.makers.generate import generate
    from eval.makers.sources import Ours, Sampling
    from eval.measure import measure
    from eval.metrics.clip_score import Clip
    from eval.metrics.registry import Tools
    from eval.report.report import check_finite

    device = process_device().type
    networks = open_all(config.features, device)
    clip = Clip(config.clip, device) if config.clip is not None else None
    tools = Tools(networks, cache / "features", batch=config.batch, clip=clip)
    question = open_prompts(config.prompts, data, cache / "pictures")
    (asked,) = question.splits

    def evaluate(pipeline: Pipeline) -> Scores:
        source = Ours(pipeline)
        with progress(total=len(asked.captions), desc="pictures", delay=2, leave=False) as bar:
            pictures = generate(source, asked.captions, Sampling(source.steps, source.guidance, config.batch), bar)
        scores = named_scores(measure(question, {asked.split: pictures}, source, tools).scores)
        check_finite(scores, "scores")
        return scores

    return evaluate


def open_prompts(count: int, data: DataConfig, pictures: Path | None = None) -> Any:
    """The first `count` prompts of `python -m eval` and its reference pictures: an `eval.makers.questions.Question`."""
    from eval.makers.questions import SHAPES, PromptSet, Question, captions_question, shapes_question

    is_shapes = data.source == SHAPES
    offline = (
        shapes_question(count, 0, data.resolution, level=data.level)
        if is_shapes
        else captions_question(data, count, folder=pictures)
    )
    # the first split alone, and without its true pictures: what they score does not depend on the pipeline
    first = offline.splits[0]
    asked = PromptSet(first.split, first.captions, scenes=first.scenes)
    return Question([asked], offline.reference, True, offline.name, offline.fingerprint)


def named_scores(report: Mapping[str, Any]) -> Scores:
    """The first split's scores of report.json => one number a name."""
    scores: Scores = {}
    for composition in list(report.get("composition", {}).values())[:1]:
        scores |= {"exact": composition["all"]["exact"], "soft": composition["all"]["soft"]}
    for name, distances in report["distances"].items():
        scores[name] = distances["fd"]
        scores |= {f"{name}/{kind}": distances[kind] for kind in DISTANCES if kind in distances}
    if "clip" in report:
        scores |= {"clip_score": report["clip"]["x100"]["mean"], "cmmd": report["clip"]["cmmd"]}
    return scores


@contextmanager
def reported_as_evaluation() -> Generator[None]:
    """A user's mistake inside is one line that names the part of the config it comes from."""
    try:
        yield
    except UserError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"evaluate: {reason}; mend it, or leave evaluate.every out") from error


@contextmanager
def untouched_training() -> Generator[None]:
    """Leaves every random state, the number of threads and the grad mode of the training as they were.

    Denormal numbers are kept inside, as in `python -m eval`; training flushes them to zero on a CPU.
    """
    flushes_denormals = not bool(torch.full((1,), 1e-38) * 0.1)
    python_state, numpy_state, threads = random.getstate(), np.random.get_state(), torch.get_num_threads()
    # of this process's GPU alone: asking the others for their state would open a context on each
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    torch.set_flush_denormal(False)
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_num_threads(threads)
        torch.set_flush_denormal(flushes_denormals)
