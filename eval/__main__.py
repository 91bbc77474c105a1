"""Measure a pipeline and write the report.

python -m eval runs/shapes/pipeline --data shapes --out runs/shapes/report
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

from eval import report
from eval.generate import Sampling
from eval.measure import FIRST_SCENE_SEED, Measured, measure_captions, measure_shapes
from eval.text import TextProbe
from sd_mini.cli import Parser, check_target, open_pipeline, whole
from sd_mini.config import command
from sd_mini.data import DataConfig
from sd_mini.guidance import Guidance
from sd_mini.pipeline import Pipeline


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m eval ...` => exit code: 0, or 2 after one line on stderr that says what to mend."""
    return command(_main, argv)


def _main(argv: Sequence[str]) -> None:
    started = time.perf_counter()
    options = _parser().parse_args(argv)
    check_target(options.out, report.REPORT)
    if options.data == "shapes" and options.split is not None:
        raise ValueError(f"--split {options.split}: shapes is measured on all its splits; leave --split out")
    pipeline = open_pipeline(options.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    sampling = Sampling(
        steps=pipeline.config.default_steps if options.steps is None else options.steps,
        guidance=Guidance(
            pipeline.config.default_guidance if options.guidance is None else options.guidance,
            options.rescale,
            *(pipeline.config.default_interval if options.interval is None else options.interval),
        ),
        batch=options.batch,
    )
    stages = report.stages_beside(options.pipeline, pipeline.config.stages)
    probe = TextProbe(stages["text_encoder"]) if "text_encoder" in stages else None
    if options.data == "shapes":
        measured = measure_shapes(pipeline, options.prompts, options.seed, sampling, probe)
    else:
        data = DataConfig(source=options.data, split=options.split or "test", resolution=pipeline.config.resolution)
        measured = measure_captions(pipeline, data, options.prompts, sampling, probe)
    full = {
        **measured.scores,
        "seconds": report.seconds(stages, time.perf_counter() - started),
        "protocol": _protocol(pipeline, options, sampling, measured),
    }
    report.write(options.out, full, measured.galleries)
    print(report.table(full))
    print(options.out / report.PAGE)


def _parser() -> Parser:
    parser = Parser(prog="python -m eval", description="Measure a pipeline: report.json, report.html and grid.png.")
    parser.add_argument("pipeline", metavar="PIPELINE", type=Path, help="a pipeline folder, or a run folder")
    parser.add_argument("--data", required=True, help="'shapes', a .parquet file or a folder of captioned pictures")
    parser.add_argument("--out", required=True, type=Path, help="report folder; an older report is replaced")
    parser.add_argument("--split", help="of data other than shapes (test)")
    parser.add_argument("--prompts", type=whole(1), help="a split (shapes: 500 of test, 300 of the others; else 48)")
    parser.add_argument("--seed", type=whole(0), default=0, help="of the scenes that are asked for (%(default)s)")
    parser.add_argument("--steps", type=whole(1), help="of the scheduler; the recipe's own if left out")
    parser.add_argument("--guidance", type=float, help="guidance scale, 1 is none; the recipe's own if left out")
    parser.add_argument("--rescale", type=float, default=0.0, help="guidance rescale, 0 to 1 (%(default)s)")
    parser.add_argument(
        "--interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="noise levels between which steps are guided"
    )
    parser.add_argument("--batch", type=whole(1), default=64, help="pictures made at a time (%(default)s)")
    return parser


def _protocol(
    pipeline: Pipeline, options: argparse.Namespace, sampling: Sampling, measured: Measured
) -> dict[str, Any]:
    """Everything needed to measure the same again."""
    protocol = {
        "data": options.data,
        "prompts": measured.prompts,
        "generator_seed": "the picture's index within its split",
        "steps": sampling.steps,
        "guidance": sampling.guidance.scale,
        "guidance_rescale": sampling.guidance.rescale,
        "guidance_interval": [sampling.guidance.low, sampling.guidance.high],
        "batch": sampling.batch,
        "scheduler": type(pipeline.scheduler).__name__,
        "resolution": pipeline.config.resolution,
        "stages": dict(pipeline.config.stages),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        "device": str(pipeline.device),
        "cpu_count": os.cpu_count(),
    }
    if options.data != "shapes":
        return protocol
    return {**protocol, "scene_seed": FIRST_SCENE_SEED + options.seed, "phrasing": "the index modulo their number"}


if __name__ == "__main__":
    sys.exit(main())
