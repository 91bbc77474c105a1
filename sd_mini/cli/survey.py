"""`sd-mini data`: what a data source holds, before anything is trained on it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sd_mini.cli.arguments import check_picture_file
from sd_mini.config import read
from sd_mini.errors import UserError


def add_command(commands: Any) -> None:
    parser = commands.add_parser("data", help="show what a data source holds, before anything is trained on it")
    parser.set_defaults(run_command=run, takes_fields=True)
    parser.add_argument(
        "source", metavar="SOURCE", help="as data.source; further options are its fields: --text_column"
    )
    parser.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="an encoder's folder or hub name: lengths in tokens and broken words (default: neither is counted)",
    )
    parser.add_argument(
        "--sheet", metavar="FILE", type=Path, help="a picture of 40 rows with their captions (default: none)"
    )


def run(options: argparse.Namespace) -> None:
    if options.source == "shapes":
        raise UserError("shapes: is drawn, not read; give a file, a folder or a hub name")
    if options.sheet is not None:
        check_picture_file(options.sheet)
    from sd_mini.data.captioned import DataConfig
    from sd_mini.data.preflight import survey

    config = read(DataConfig, None, ["--source", options.source, *options.rest])
    print(*survey(config, options.tokenizer, options.sheet), sep="\n")
