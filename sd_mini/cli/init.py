"""`sd-mini init`: a commented recipe, sized for the pictures and the machine at hand."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sd_mini.cli.recipe import STAGES, Machine, Recipe
from sd_mini.config import read
from sd_mini.errors import UserError
from sd_mini.files import check_writable, written_to
from sd_mini.remarks import remark

_LITTLE_MEMORY = 2.0  # GB, of a stage's training
_FEWEST = 8  # rows of which some are held out


def add_command(commands: Any) -> None:
    parser = commands.add_parser("init", help="write a recipe for your pictures and this machine")
    parser.set_defaults(run_command=run, takes_fields=True)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where three YAML files and a README are written")
    parser.add_argument(
        "--data", metavar="SOURCE", required=True, help="as data.source; further options are its fields: --text_column"
    )


def run(options: argparse.Namespace) -> None:
    folder = options.folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is there already and would be overwritten; give a new folder")
    check_writable(folder, "FOLDER")
    if options.data == "shapes":
        raise UserError("--data shapes: has its recipe already, training/configs/shapes; give pictures of yours")
    from sd_mini.data.captioned import DataConfig
    from sd_mini.data.preflight import counted

    source = Path(options.data)
    name = str(source.absolute()) if source.exists() else options.data  # a recipe is launched from the checkout
    config = read(DataConfig, None, ["--source", name, *options.rest])
    rows, sizes = counted(config.model_copy(update={"max_aspect": 1.0}))  # squares will do to look at them
    side = int(sorted(min(size) for size in sizes.tolist())[len(sizes) // 2])
    if rows < _FEWEST:
        raise UserError(
            f"--data {options.data}: has {rows} rows; expected at least {_FEWEST}, of which some are held out"
        )
    if config.side != "all":
        raise UserError("--side: is decided by the recipe, which holds a share out; leave it out")
    recipe = Recipe(folder, config, rows, side, Machine.here())
    if recipe.machine.memory < _LITTLE_MEMORY:
        remark(f"{recipe.machine.memory:.1f} GB of memory, and a stage takes up to {_LITTLE_MEMORY:g}: halve batches")
    texts = {f"{stage}.yaml": getattr(recipe, stage)() for stage in STAGES} | {"README.md": recipe.readme()}
    with written_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in texts.items():
            (folder / file).write_text(text, encoding="utf-8")
    print(*recipe.summary(), sep="\n")
