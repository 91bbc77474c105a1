"""Measure what a pipeline makes, and write the report.

python -m eval runs/shapes/pipeline --data shapes --out runs/shapes/report

PIPELINE is a run, a pipeline folder of ours, any diffusers text-to-image folder, or a folder of pictures and prompts.
Started by torchrun the processes share out the pictures; killed and started again it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm

from eval import card, report
from eval.asked import SHAPES, Question, ask_captions, ask_lying, ask_shapes, training_data
from eval.clip_score import Clip
from eval.composition_objects import MIN_SIDE
from eval.features import open_all
from eval.generate import Job, Kept
from eval.measure import Measured, Tools, measure
from eval.reconstruction import FIRST_SCENE_SEED
from eval.sources import Lying, Maker, Sampling, open_source
from eval.sweep import PROMPTS as SWEEP_PROMPTS
from eval.sweep import SCALES, sweep_jobs, sweep_scores
from eval.text import TextProbe
from sd_mini.cli import Parser, check_target, whole
from sd_mini.config import command
from sd_mini.data import DataConfig
from sd_mini.guidance import Guidance


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m eval ...` => exit code: 0, or 2 after one line on stderr that says what to mend."""
    return command(_main, argv)


def _main(argv: Sequence[str]) -> None:
    started = time.perf_counter()
    options = _parser().parse_args(argv)
    check_target(options.out, report.REPORT)
    if options.data == SHAPES and options.split is not None:
        raise ValueError(f"--split {options.split}: shapes is measured on all its splits; leave --split out")
    # one process needs no group, and leaves the environment's rank alone
    has_gpu, many = torch.cuda.is_available(), int(os.environ.get("WORLD_SIZE", "1")) > 1
    state = PartialState(cpu=not has_gpu) if many else None
    device = str(state.device) if state is not None else "cuda" if has_gpu else "cpu"
    source = open_source(options.pipeline, options.resolution, device)
    data = DataConfig(source=options.data, split=options.split or "test", resolution=source.resolution)
    question = _question(options, source, data)
    stages = report.stages_beside(options.pipeline, source.facts["stages"]) if not isinstance(source, Lying) else {}
    tools = _tools(options, source, data, stages, device)
    if isinstance(source, Lying):
        if state is not None and not state.is_main_process:
            return  # there is nothing to share out
        measured = measure(question, {question.splits[0].split: source.pictures}, None, tools)
        protocol: dict[str, Any] = {"pictures": str(source.folder)}
    else:
        sampling = _sampling(options, source)
        jobs, swept = _jobs(question, sampling, options, tools)
        kept = Kept(options.out, source, jobs + swept)
        kept.make(*((state.process_index, state.num_processes) if state is not None else ()))
        if state is not None:
            state.wait_for_everyone()
            is_main = state.is_main_process
            state.destroy_process_group()  # what is left is for one
            if not is_main:
                return
        made = {job.name: kept.read(job.name) for job in jobs + swept}
        measured = measure(question, made, source, tools)
        if swept:
            measured.scores["sweep"] = sweep_scores(swept, made, question, tools, sampling.guidance.scale)
        protocol = {
            "pipeline_hash": source.hash,
            **_made_by(source, sampling),
            "weights": report.training_facts(stages),
        }
    full = {
        **measured.scores,
        "remarks": measured.remarks,
        "seconds": report.seconds(stages, time.perf_counter() - started),
        "protocol": {**_protocol(options, question, tools), **protocol},
    }
    _write(options, full, measured, source, stages)
    if not isinstance(source, Lying):
        kept.delete()


def _question(options: argparse.Namespace, source: Maker | Lying, data: DataConfig) -> Question:
    if isinstance(source, Lying):
        return ask_lying(data, source.prompts, options.seed)
    if options.data != SHAPES:
        return ask_captions(data, options.prompts)
    if source.resolution < MIN_SIDE:
        raise ValueError(f"the pipeline makes {source.resolution} px pictures; the judge reads {MIN_SIDE} px or more")
    return ask_shapes(options.prompts, options.seed, source.resolution)


def _sampling(options: argparse.Namespace, maker: Maker) -> Sampling:
    usual = maker.guidance
    low, high = (usual.low, usual.high) if options.interval is None else options.interval
    scale = usual.scale if options.guidance is None else options.guidance
    steps = maker.steps if options.steps is None else options.steps
    return Sampling(steps, Guidance(scale, options.rescale, low, high), options.batch)


def _jobs(question: Question, sampling: Sampling, options: argparse.Namespace, tools: Tools) -> tuple[list[Job], ...]:
    jobs = [Job(asked.split, asked.captions, sampling) for asked in question.splits]
    judged = question.splits[0].scenes is not None or tools.clip is not None
    if options.sweep and not judged:
        raise ValueError(f"--sweep: nothing says how well pictures fit the captions of {options.data}; give --clip")
    scales = SCALES if options.sweep is None and judged else options.sweep or ()
    return jobs, sweep_jobs(question.splits[0], scales, options.sweep_prompts, sampling)


def _tools(
    options: argparse.Namespace, source: Maker | Lying, data: DataConfig, stages: dict[str, Path], device: str
) -> Tools:
    run = report.run_of(options.pipeline)
    return Tools(
        networks=open_all(options.features, device),
        cache=options.cache or options.out.parent / "cache" / "features",
        batch=options.batch,
        clip=Clip(options.clip, device) if options.clip is not None else None,
        probe=TextProbe(stages["text_encoder"]) if "text_encoder" in stages else None,
        training=training_data(run) if options.training == "run" and "noise_predictor" in stages else None,
        data=data.model_copy(update={"seed": FIRST_SCENE_SEED + options.seed}) if data.source == SHAPES else data,
    )


def _write(
    options: argparse.Namespace,
    full: dict[str, Any],
    measured: Measured,
    source: Maker | Lying,
    stages: dict[str, Path],
) -> None:
    curves = report.training_curves(report.run_of(options.pipeline), stages)
    report.write(options.out, full, measured.galleries, curves)
    if not isinstance(source, Lying):
        card.write(source, full, options.out)
    for remark in measured.remarks:
        tqdm.write(f"note: {remark}", file=sys.stderr)
    print(report.table(full))
    print(options.out / report.PAGE)


def _parser() -> Parser:
    parser = Parser(prog="python -m eval", description="Measure a pipeline: report.json, report.html and grid.png.")
    add = parser.add_argument
    add("pipeline", metavar="PIPELINE", type=Path, help="a pipeline folder, a run, or a folder of pictures and prompts")
    add("--data", required=True, help="'shapes', a .parquet file or a folder of captioned pictures")
    add("--out", required=True, type=Path, help="report folder; an older report is replaced")
    add("--split", help="of data other than shapes (test)")
    add("--prompts", type=whole(2), help="a split (shapes: 500 of test, 300 of the others; else half, at most 500)")
    add("--seed", type=whole(0), default=0, help="of the scenes that are asked for (%(default)s)")
    add("--steps", type=whole(1), help="of the scheduler; the recipe's own if left out")
    add("--guidance", type=float, help="guidance scale, 1 is none; the recipe's own if left out")
    add("--rescale", type=float, default=0.0, help="guidance rescale, 0 to 1 (%(default)s)")
    add("--interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="noise levels between which steps are guided")
    add("--resolution", type=whole(1), help="px, of a diffusers pipeline that does not say")
    add("--batch", type=whole(1), default=64, help="pictures made at a time (%(default)s)")
    add("--features", nargs="+", default=["mini"], metavar="NAME", help="networks to compare by: mini, inception, ...")
    add("--clip", metavar="NAME", help="CLIP score by this open_clip model: ARCHITECTURE=FILE or local-dir:FOLDER")
    add("--sweep", type=float, nargs="*", metavar="SCALE", help="guidance scales to compare; none after it: no sweep")
    add("--sweep_prompts", type=whole(2), default=SWEEP_PROMPTS, help="at each of them (%(default)s)")
    add("--training", choices=("run", "none"), default="run", help="whether to look for copies of training pictures")
    add("--cache", type=Path, help="folder for the features of reference pictures (OUT/../cache/features)")
    return parser


def _made_by(maker: Maker, sampling: Sampling) -> dict[str, Any]:
    return {
        **maker.facts,
        "generator_seed": "the picture's index within its split",
        "steps": sampling.steps,
        "guidance": sampling.guidance.scale,
        "guidance_rescale": sampling.guidance.rescale,
        "guidance_interval": [sampling.guidance.low, sampling.guidance.high],
        "batch": sampling.batch,
    }


def _protocol(options: argparse.Namespace, question: Question, tools: Tools) -> dict[str, Any]:
    """Everything needed to measure the same again."""
    resize = "short side by Lanczos, antialiased; the centre kept" if options.data != SHAPES else "drawn at that size"
    protocol = {
        "data": options.data,
        "prompts": {asked.split: len(asked.captions) for asked in question.splits},
        "reference": question.name,
        "reference_count": len(question.reference),
        "reference_hash": question.fingerprint,
        "reference_resize": resize,
        "extractors": {network.distance: network.hash for network in tools.networks},
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "open_clip_torch", "timm")},
        "device": report.device_name(),
        "cpu_count": os.cpu_count(),
    }
    if options.data != SHAPES:
        return protocol
    return {**protocol, "scene_seed": FIRST_SCENE_SEED + options.seed, "phrasing": "the index modulo their number"}


if __name__ == "__main__":
    sys.exit(main())
