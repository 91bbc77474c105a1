"""Measure one pipeline after another, as a training makes them: the evaluators in the loop.

python -m eval.serve --data '{"source": "shapes", "resolution": 64}' --cache FOLDER

First it opens all that it measures with, and says {"ready": true} or {"error": "..."} and no more. Then it reads a
pipeline's folder a line from stdin and writes its scores, a JSON line each, to stdout: {"scores": {...}}, or
{"error": "..."}. It is a program of its own, so that training imports no evaluator and both see the same pictures.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from eval.features.features import open_all
from eval.makers.asked import SHAPES, Asked, Question, ask_captions, ask_shapes
from eval.makers.generate import generate
from eval.makers.sources import Ours, Sampling, open_source
from eval.measure import Tools, measure
from eval.metrics.clip_score import Clip
from eval.report.report import check_finite
from sd_mini.cli.main import Parser, whole
from sd_mini.config import check, command
from sd_mini.data.captioned import DataConfig
from sd_mini.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    return command(_main, argv)


def _main(argv: Sequence[str]) -> None:
    options = _parser().parse_args(argv)
    answers = sys.stdout
    with redirect_stdout(sys.stderr):  # nothing but answers may stand between the answers
        serve(options, sys.stdin, answers)


def serve(options: Any, folders: TextIO, answers: TextIO) -> None:
    """Until the end of `folders`. What cannot be opened or measured is answered with why, on one line."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        data = _data(options.data)
        tools, question = _tools(options, device), _question(options, data)
    except UserError as error:
        _answer({"error": " ".join(str(error).split())}, answers)
        return
    _answer({"ready": True}, answers)
    for line in folders:
        try:
            maker = open_source(Path(line.rstrip("\n")), None, device)
            assert isinstance(maker, Ours)
            if maker.resolution != data.resolution:
                raise UserError(f"the pipeline makes {maker.resolution} px, --data has {data.resolution}; give it so")
            answer = {"scores": scores(maker, question, tools)}
        except UserError as error:
            answer = {"error": " ".join(str(error).split())}
        _answer(answer, answers)


def _answer(answer: Mapping[str, Any], answers: TextIO) -> None:
    print(json.dumps(answer, allow_nan=False), file=answers, flush=True)


def _data(text: str) -> DataConfig:
    try:
        values = json.loads(text)
    except ValueError:
        raise UserError(f'--data {text}: expected JSON, such as {{"source": "shapes"}}') from None
    return check(DataConfig, values, source="--data")


def scores(maker: Ours, question: Question, tools: Tools) -> dict[str, float]:
    """What `python -m eval` says of the same prompts, by name."""
    (asked,) = question.splits
    with tqdm(total=len(asked.captions), desc="pictures", delay=2, leave=False) as bar:
        made = generate(maker, asked.captions, Sampling(maker.steps, maker.guidance, tools.batch), bar)
    found = flat(measure(question, {asked.split: made}, maker, tools).scores)
    check_finite(found, "scores")
    return found


def flat(found: Mapping[str, Any]) -> dict[str, float]:
    """report.json's scores of the first split => one number a name."""
    named = {}
    for judged in list(found.get("composition", {}).values())[:1]:
        named |= {"exact": judged["all"]["exact"], "soft": judged["all"]["soft"]}
    for name, one in found["distances"].items():
        named[name] = one["fd"]
        kinds = ("kid", "precision", "recall", "density", "coverage")
        named |= {f"{name}/{kind}": one[kind] for kind in kinds if kind in one}
    if "clip" in found:
        named |= {"clip_score": found["clip"]["x100"]["mean"], "cmmd": found["clip"]["cmmd"]}
    return named


def _question(options: Any, data: DataConfig) -> Question:
    """The first split alone, and without its true pictures: those say nothing of a pipeline."""
    if data.source == SHAPES:
        whole_question = ask_shapes(options.prompts, 0, data.resolution)
    else:
        whole_question = ask_captions(data, options.prompts)
    first = whole_question.splits[0]
    asked = Asked(first.split, first.captions, scenes=first.scenes)
    return Question([asked], whole_question.reference, True, whole_question.name, whole_question.fingerprint)


def _tools(options: Any, device: str) -> Tools:
    return Tools(
        networks=open_all(options.features, device),
        cache=options.cache,
        batch=options.batch,
        clip=Clip(options.clip, device) if options.clip is not None else None,
    )


def _parser() -> Parser:
    parser = Parser(prog="python -m eval.serve", description="Folders of pipelines on stdin => scores on stdout.")
    add = parser.add_argument
    add("--data", required=True, metavar="JSON", help="the fields of the data's config; of shapes, its test split")
    add("--prompts", type=whole(2), default=64, help="of the split (%(default)s)")
    add("--features", nargs="+", default=["mini"], metavar="NAME", help="networks to compare by, as in python -m eval")
    add("--clip", metavar="NAME", help="as in python -m eval")
    add("--batch", type=whole(1), default=64, help="pictures made at a time (%(default)s)")
    add("--cache", required=True, type=Path, help="folder for the features of reference pictures")
    return parser


if __name__ == "__main__":
    sys.exit(main())
