"""`sd-mini export`: a run's three stages joined to a pipeline folder, for sd_mini or for everybody."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd_mini.cli.arguments import check_target
from sd_mini.cli.opening import check_run, hide_loading_bars
from sd_mini.errors import UserError
from sd_mini.files import PIPELINE_MARK
from sd_mini.stages.contract import DRAWERS

if TYPE_CHECKING:
    from sd_mini.pipelines.text_to_image import Pipeline

FORMATS = ("standalone", "stable-diffusion")


def add_command(commands: Any) -> None:
    parser = commands.add_parser("export", help="join a run's three stages to a pipeline folder")
    parser.set_defaults(run_command=run)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder")
    parser.add_argument("--out", type=Path, help="pipeline folder (default: RUN/pipeline)")
    parser.add_argument(
        "--to",
        metavar="FOLDER",
        type=Path,
        help="write a folder that stock diffusers loads without sd_mini, with a model card (default: none)",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="of --to: standalone, with sd_mini's code in it; stable-diffusion, without any code, for diffusers' "
        "StableDiffusionPipeline, from a run with adapter.plain, a UNet and a KL autoencoder (default: standalone)",
    )
    parser.add_argument("--sampler", help="euler, heun, dpm++, unipc, ddim or ddpm (default: the recipe's)")
    parser.add_argument(
        "--license",
        metavar="NAME",
        help="of the weights, for the card of --to, such as cc-by-4.0 (default: not stated)",
    )
    parser.add_argument(
        "--push-to-hub", metavar="USER/NAME", help="upload the folder of --to to the hub (default: it stays here)"
    )
    parser.add_argument(
        "--private", action="store_true", help="for a repository made by --push-to-hub (default: public)"
    )
    parser.add_argument(
        "--predictor",
        choices=DRAWERS,
        default=DRAWERS[0],
        help="the stage that draws the latents (default: noise_predictor)",
    )
    parser.add_argument(
        "--guide",
        metavar="FOLDER",
        type=Path,
        help="an earlier noise predictor of the run, for autoguidance (default: none)",
    )


def run(options: argparse.Namespace) -> None:
    check_run(options.run, options.predictor)
    if options.to is not None:
        _export_for_all(options)
        return
    for name in ("format", "license", "push_to_hub", "private"):
        if getattr(options, name):
            raise UserError(f"--{name.replace('_', '-')}: goes with a folder for everybody; give it by --to FOLDER")
    out = check_target(options.out or options.run / "pipeline", PIPELINE_MARK)
    hide_loading_bars()
    _joined(options).save(out)
    print(out)


def _joined(options: argparse.Namespace) -> Pipeline:
    from sd_mini.pipelines.text_to_image import Pipeline

    pipeline = Pipeline.from_run(options.run, options.predictor, guide=options.guide)
    if options.sampler is not None:
        pipeline.use_sampler(options.sampler)
    return pipeline


def _export_for_all(options: argparse.Namespace) -> None:
    if options.out is not None:
        raise UserError("--out: goes without --to; give one of them")
    if options.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", options.license):
        raise UserError(f"--license {options.license}: expected a name as the hub spells it, such as cc-by-4.0")
    is_stock = options.format == FORMATS[1]
    if is_stock and options.guide is not None:
        raise UserError(f"--guide: StableDiffusionPipeline has no autoguidance; leave it out of --format {FORMATS[1]}")
    folder = check_target(options.to, PIPELINE_MARK, "--to")
    from sd_mini.pipelines import standalone, stock

    hide_loading_bars()
    (stock if is_stock else standalone).write(_joined(options), folder, options.run, options.license)
    print(folder)
    if options.push_to_hub is not None:
        print(standalone.push(folder, options.push_to_hub, options.private))
