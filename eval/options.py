"""The command line of `python -m eval`, and which options have a use for what is measured: no other is let pass."""

from __future__ import annotations

import argparse
from pathlib import Path

from eval.analysis.sweep import PROMPTS as SWEEP_PROMPTS
from eval.analysis.sweep import SCALES
from eval.data_options import SHAPES, add_data, check_columns
from eval.makers.sources import GeneratedFolder, PictureSource, Sampling
from sd_mini.cli.arguments import Parser, whole_number
from sd_mini.errors import UserError
from sd_mini.sampling.loop import Guidance

BATCH = 64
_MAKING = ("prompts", "steps", "guidance", "rescale", "interval", "sampler", "autoguidance", "resolution", "batch",
           "sweep", "sweep_prompts")  # fmt: skip
# what a pipeline has to take for an option to reach it
_TAKEN = {
    "guidance": "guidance_scale",
    "rescale": "guidance_rescale",
    "interval": "guidance_interval",
    "sampler": "sampler",
    "autoguidance": "autoguidance",
}


def parser() -> Parser:
    """An option that is left out is None, so that one that was given and has no use is told from it."""
    made = Parser(prog="python -m eval", description="Measure a pipeline: report.json, report.html and grid.png.")
    add = made.add_argument
    add("pipeline", metavar="PIPELINE", type=Path, help="a pipeline folder, a run, or a folder of pictures and prompts")
    add_data(made, "the `valid` part of the run that PIPELINE lies in", "test")
    add("--out", required=True, type=Path, help="report folder; an older report is replaced")
    add(
        "--prompts",
        type=whole_number(2),
        help="a split (shapes: 500 of test, 300 of the others; else half of the rows, evenly spread, at most 500)",
    )
    add(
        "--reference",
        type=whole_number(2),
        help="at most so many pictures to compare with (shapes: 1000; else all others)",
    )
    add("--seed", type=whole_number(0), help="of the scenes that shapes asks for (0)")
    add("--steps", type=whole_number(1), help="of the scheduler; the recipe's own if left out")
    add("--guidance", type=float, help="guidance scale, 1 is none; the recipe's own if left out")
    add("--rescale", type=float, help="guidance rescale, 0 to 1; the recipe's own if left out")
    add("--interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="noise levels between which steps are guided")
    add("--sampler", metavar="NAME", help="euler, heun, dpm++, unipc, ddim or ddpm; the recipe's own if left out")
    add("--autoguidance", action="store_true", default=None, help="lead away from the snapshot joined as --guide")
    add("--resolution", type=whole_number(1), help="px, of a diffusers pipeline that does not say")
    add("--batch", type=whole_number(1), help=f"pictures made at a time ({BATCH})")
    add("--features", nargs="+", default=["mini"], metavar="NAME", help="networks to compare by: mini, inception, ...")
    add("--clip", metavar="NAME", help="CLIP score by this open_clip model: ARCHITECTURE=FILE or local-dir:FOLDER")
    add("--sweep", type=float, nargs="*", metavar="SCALE", help="guidance scales to compare; none after it: no sweep")
    add("--sweep_prompts", type=whole_number(2), help=f"at each of them ({SWEEP_PROMPTS})")
    add("--blame", choices=("all", "none"), default="all", help="none: no stage's share of each distance, to save time")
    add("--training", choices=("run", "none"), default="run", help="whether to look for copies of training pictures")
    add("--cache", type=Path, help="folder for the features of reference pictures (OUT/../cache/features)")
    return made


def check_data(options: argparse.Namespace) -> None:
    """Raises ValueError, the option named, for one that the data has no use for."""
    check_columns(options, options.data)
    if options.data == SHAPES and options.split is not None:
        raise UserError(f"--split {options.split}: shapes is measured on all its splits; leave --split out")
    if options.data != SHAPES and options.seed is not None:
        raise UserError(f"--seed {options.seed}: draws the scenes of shapes, {options.data} has none; leave it out")


def check_source(options: argparse.Namespace, source: PictureSource | GeneratedFolder) -> None:
    """Raises ValueError, the option named, for one that has no use for what is measured."""
    if isinstance(source, GeneratedFolder):
        for name in _MAKING:
            if getattr(options, name) is not None:
                raise UserError(f"--{name}: {source.folder} holds pictures that are made already; leave it out")
        return
    for name, taken in _TAKEN.items():
        if getattr(options, name) is not None and taken not in source.takes:
            raise UserError(f"--{name}: {options.pipeline} is a pipeline that takes no {taken}; leave it out")
    if options.sweep and "guidance_scale" not in source.takes:
        raise UserError(f"--sweep: {options.pipeline} is a pipeline that takes no guidance_scale; leave it out")
    if options.sweep is not None and set(options.sweep) == {sampling(options, source).guidance.scale}:
        raise UserError(
            f"--sweep {options.sweep[0]:g}: is the scale that all pictures are made with; give others beside it"
        )


def sampling(options: argparse.Namespace, maker: PictureSource) -> Sampling:
    """What is asked for, and the pipeline's own for the rest."""
    usual = maker.guidance
    low, high = (usual.low, usual.high) if options.interval is None else options.interval
    scale = usual.scale if options.guidance is None else options.guidance
    rescale = usual.rescale if options.rescale is None else options.rescale
    steps = maker.steps if options.steps is None else options.steps
    guidance = Guidance(scale, rescale, low, high)
    return Sampling(steps, guidance, options.batch or BATCH, bool(options.autoguidance))


def swept_scales(options: argparse.Namespace, maker: PictureSource, is_judged: bool) -> tuple[float, ...]:
    """The scales to compare. Raises ValueError where they are asked for and nothing says how well pictures fit."""
    if options.sweep and not is_judged:
        raise UserError(f"--sweep: nothing says how well pictures fit the captions of {options.data}; give --clip")
    usual = SCALES if is_judged and "guidance_scale" in maker.takes else ()
    scales = usual if options.sweep is None else tuple(options.sweep)
    if options.sweep_prompts is not None and not scales:
        raise UserError(f"--sweep_prompts {options.sweep_prompts}: there is no sweep; leave it out")
    return scales
