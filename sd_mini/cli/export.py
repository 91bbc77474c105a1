"""`sd-mini export`: a run's three stages joined to a pipeline folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sd_mini.cli.arguments import check_target
from sd_mini.cli.opening import check_run, hide_loading_bars
from sd_mini.files import PIPELINE_MARK


def add_command(commands: Any) -> None:
    parser = commands.add_parser("export", help="join a run's three stages to a pipeline folder")
    parser.set_defaults(run_command=run)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder")
    parser.add_argument("--out", type=Path, help="pipeline folder (default: RUN/pipeline)")
    parser.add_argument(
        "--guide",
        metavar="FOLDER",
        type=Path,
        help="an earlier noise predictor of the run, for autoguidance (default: none)",
    )


def run(options: argparse.Namespace) -> None:
    check_run(options.run)
    out = check_target(options.out or options.run / "pipeline", PIPELINE_MARK)
    from sd_mini.pipelines.text_to_image import Pipeline

    hide_loading_bars()
    Pipeline.from_run(options.run, guide=options.guide).save(out)
    print(out)
