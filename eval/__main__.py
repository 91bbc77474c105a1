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
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm

from eval.analysis.sweep import PROMPTS as SWEEP_PROMPTS
from eval.analysis.sweep import sweep_jobs, sweep_scores
from eval.analysis.text import TextProbe
from eval.data_options import COLUMNS, SHAPES, asked_data, recorded_data
from eval.features.features import open_all
from eval.judge.objects import MIN_SIDE
from eval.makers.generate import Job, Kept
from eval.makers.questions import Question, captions_question, folder_question, shapes_question, training_data
from eval.makers.repeated import REPEATED, Repeated, several_of_each
from eval.makers.sources import GeneratedFolder, Ours, PictureSource, Sampling, open_source
from eval.measure import Measured, Tools, measure
from eval.metrics.clip_score import Clip
from eval.metrics.reconstruction import FIRST_SCENE_SEED
from eval.options import BATCH, check_data, check_source, parser, swept_scales
from eval.options import sampling as asked_sampling
from eval.report import card, report
from sd_mini.cli.arguments import check_target
from sd_mini.config import command
from sd_mini.data.captioned import DataConfig
from sd_mini.errors import UserError
from sd_mini.files import check_writable
from sd_mini.memory import keep_freed_memory
from sd_mini.stages.contract import read_contract


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m eval ...` => exit code: 0, or 2 after one line on stderr that says what to mend."""
    return command(_main, argv)


def _main(argv: Sequence[str]) -> None:
    started = time.perf_counter()
    keep_freed_memory()
    options = parser().parse_args(argv)
    check_target(options.out, report.REPORT)
    recorded = recorded_data(report.drawer_folder(options.pipeline))
    data = asked_data(options, recorded, "valid", "test")
    options.data = data.source
    check_writable(_cache(options) / "features", "--out" if options.cache is None else "--cache")
    check_data(options)
    # one process needs no group, and leaves the environment's rank alone
    has_gpu, many = torch.cuda.is_available(), int(os.environ.get("WORLD_SIZE", "1")) > 1
    # one may make pictures for hours longer than the others
    state = PartialState(cpu=not has_gpu, timeout=timedelta(days=365)) if many else None
    device = str(state.device) if state is not None else "cuda" if has_gpu else "cpu"
    source = open_source(options.pipeline, options.resolution, device)
    check_source(options, source)
    if isinstance(source, Ours):
        source.use(options.sampler, bool(options.autoguidance))
    data = data.model_copy(update={"resolution": source.resolution})
    question = _question(options, source, data)
    stages = (
        report.stages_beside(options.pipeline, source.facts["stages"])
        if not isinstance(source, GeneratedFolder)
        else {}
    )
    tools = _tools(options, source, data, stages, device)
    if isinstance(source, GeneratedFolder):
        if state is not None and not state.is_main_process:
            return  # there is nothing to share out
        rows = several_of_each(source.prompts)
        repeated = source.pictures[rows] if question.repeated is not None else None
        made = {a.split: source.pictures if a.rows is None else source.pictures[a.rows] for a in question.splits}
        measured = measure(question, made, None, tools, repeated)
        protocol: dict[str, Any] = {"pictures": str(source.folder)}
    else:
        sampling = asked_sampling(options, source)
        jobs, swept = _jobs(question, sampling, options, source, tools)
        kept = Kept(options.out, source, jobs + swept)
        kept.make(*((state.process_index, state.num_processes) if state is not None else ()))
        if state is not None:
            state.wait_for_everyone()
            is_main = state.is_main_process
            state.destroy_process_group()  # what is left is for one
            if not is_main:
                return
        made = {job.name: kept.read(job.name) for job in jobs + swept}
        measured = measure(question, made, source, tools, made.get(REPEATED))
        if swept:
            measured.scores["sweep"] = sweep_scores(swept, made, question, tools, sampling.guidance.scale)
        protocol = {
            "pipeline_hash": source.hash,
            **_made_by(options, source, sampling),
            "weights": report.training_facts(stages),
        }
    if looks := report.reward_looks(stages):
        exported = read_contract(stages["reward"], "noise_predictor")
        best = exported.get("best", {}).get("step", exported.get("steps"))
        measured.scores["reward"] = {**exported["reward"], "looks": looks, "exported_step": best}
    full = {
        **measured.scores,
        "remarks": measured.remarks,
        "seconds": report.seconds(stages, time.perf_counter() - started),
        "protocol": {**_protocol(options, question, tools, data), **protocol},
    }
    _write(options, full, measured, source, stages)
    if not isinstance(source, GeneratedFolder):
        kept.delete()


def _question(options: argparse.Namespace, source: PictureSource | GeneratedFolder, data: DataConfig) -> Question:
    if isinstance(source, GeneratedFolder):
        return folder_question(data, source.prompts, options.seed or 0, options.reference, _pictures_cache(options))
    if options.data != SHAPES:
        return captions_question(data, options.prompts, options.reference, _pictures_cache(options))
    if source.resolution < MIN_SIDE:
        raise UserError(f"the pipeline makes {source.resolution} px pictures; the judge reads {MIN_SIDE} px or more")
    return shapes_question(options.prompts, options.seed or 0, source.resolution, options.reference, data.level)


def _cache(options: argparse.Namespace) -> Path:
    """The folder for the features of reference pictures."""
    return options.cache or options.out.parent / "cache" / "features"


def _pictures_cache(options: argparse.Namespace) -> Path:
    """The folder for the data's decoded pictures; beside a run's pipeline that of its trainings."""
    return (options.cache or options.out.parent / "cache") / "pictures"


def _scene_seed(options: argparse.Namespace) -> int:
    return FIRST_SCENE_SEED + (options.seed or 0)


def _jobs(
    question: Question, sampling: Sampling, options: argparse.Namespace, maker: PictureSource, tools: Tools
) -> tuple[list[Job], ...]:
    jobs = [Job(asked.split, asked.captions, sampling) for asked in question.splits]
    if question.repeated is not None:
        jobs.append(Job(REPEATED, question.repeated.captions, sampling))
    is_judged = question.splits[0].scenes is not None or tools.clip is not None
    scales = swept_scales(options, maker, is_judged)
    return jobs, sweep_jobs(question, scales, options.sweep_prompts or SWEEP_PROMPTS, sampling)


def _tools(
    options: argparse.Namespace,
    source: PictureSource | GeneratedFolder,
    data: DataConfig,
    stages: dict[str, Path],
    device: str,
) -> Tools:
    trained_in = report.drawer_folder(options.pipeline) if options.training == "run" and len(stages) > 2 else None
    return Tools(
        networks=open_all(options.features, device),
        cache=_cache(options),
        pictures=_pictures_cache(options),
        batch=options.batch or BATCH,
        clip=Clip(options.clip, device) if options.clip is not None else None,
        probe=TextProbe(stages["text_encoder"]) if "text_encoder" in stages else None,
        training=training_data(trained_in, _pictures_cache(options)),
        data=data.model_copy(update={"seed": _scene_seed(options)}) if data.source == SHAPES else data,
        blame=options.blame == "all",
    )


def _write(
    options: argparse.Namespace,
    full: dict[str, Any],
    measured: Measured,
    source: PictureSource | GeneratedFolder,
    stages: dict[str, Path],
) -> None:
    for remark in measured.remarks:
        tqdm.write(f"note: {remark}", file=sys.stderr)
    # before anything is written, which may fail: what was measured is not lost with the disk
    print(report.table(full), flush=True)
    curves = report.training_curves(report.run_of(options.pipeline), stages)
    report.write(options.out, full, measured.galleries, curves)
    if not isinstance(source, GeneratedFolder):
        card.write(source, full, options.out)
    print(options.out / report.PAGE)


def _made_by(options: argparse.Namespace, maker: PictureSource, sampling: Sampling) -> dict[str, Any]:
    """How the pictures were made: of guidance, what the pipeline takes."""
    guidance = sampling.guidance
    asked = {
        "guidance_scale": ("guidance", guidance.scale),
        "guidance_rescale": ("guidance_rescale", guidance.rescale),
        "guidance_interval": ("guidance_interval", [guidance.low, guidance.high]),
        "autoguidance": ("autoguidance", sampling.autoguidance),
    }
    return {
        **maker.facts,
        **({"sampler": options.sampler} if options.sampler is not None else {}),
        "generator_seed": "the picture's index within its split",
        "steps": sampling.steps,
        **dict(named for taken, named in asked.items() if taken in maker.takes),
        "batch": sampling.batch,
    }


def _several(repeated: Repeated) -> str:
    return f"{len(repeated.captions)} pictures of {len(set(repeated.captions))} prompts"


def _protocol(options: argparse.Namespace, question: Question, tools: Tools, data: DataConfig) -> dict[str, Any]:
    """Everything needed to measure the same again."""
    resize = "short side by Lanczos, antialiased; the centre kept" if options.data != SHAPES else "drawn at that size"
    protocol = {
        "data": options.data,
        "prompts": {asked.split: len(asked.captions) for asked in question.splits},
        **({"several_of_each": _several(question.repeated)} if question.repeated is not None else {}),
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
        return {**protocol, "columns": {name: getattr(data, name) for name in COLUMNS}}
    return {
        **protocol,
        "level": data.level,
        "scene_seed": _scene_seed(options),
        "phrasing": "the index modulo their number",
    }


if __name__ == "__main__":
    sys.exit(main())
