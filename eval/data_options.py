"""Which data an evaluation reads: options that all its programs share, and a run's own data where they are left out."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from sd_mini.config import check, read_yaml
from sd_mini.data.captioned import DataConfig, ValidConfig
from sd_mini.data.parts import resolved
from sd_mini.errors import UserError
from sd_mini.shapes import LEVELS

SHAPES = "shapes"
COLUMNS = ("image_column", "text_column", "aliases_column", "template")


def add_data(parser: argparse.ArgumentParser, own: str, split: str, columns: tuple[str, ...] = COLUMNS) -> None:
    """--data, --split and the columns; `own` says what is read where --data is left out, `split` where that is."""
    add = parser.add_argument
    add("--data", help=f"'shapes', a .parquet file, a folder of pictures or a hub name; {own} if left out")
    add("--level", type=int, choices=LEVELS, help="of shapes; the run's own if left out, else 1")
    add("--split", help=f"of data other than shapes; the run's own where the data are, else {split}")
    helps = {
        "image_column": "of the pictures; the run's own where the data are, else image",
        "text_column": "of the captions; the run's own where the data are, else text",
        "template": "makes captions of labels, as data.template; the run's own where the data are",
        "aliases_column": "of lists of further captions; the run's own where the data are, else there is none",
    }
    for name in columns:
        names = [f"--{name}", *(["--aliases"] if name == "aliases_column" else [])]
        add(*names, dest=name, metavar="TEXT" if name == "template" else "COLUMN", help=helps[name])


def recorded_data(stage: Path, squares: bool = True) -> dict[str, DataConfig]:
    """`data` and `valid` of the config that a stage, RUN/STAGE, was trained with, none where it is not there; as
    `squares`, which evaluations draw and compare, or as they were.

    Raises UserError for one that cannot be read.
    """
    path = stage / "config.yaml"
    values = read_yaml(path) if path.is_file() else {}
    if "data" not in values:
        return {}
    train = check(DataConfig, values["data"], str(path))
    valid = check(ValidConfig, values.get("valid", {}), str(path))
    parts = resolved(train, valid)
    return dict(zip(("data", "valid"), (part.squares for part in parts) if squares else parts, strict=True))


def asked_data(options: argparse.Namespace, recorded: Mapping[str, DataConfig], part: str, split: str) -> DataConfig:
    """The data of the command line.

    What its options leave out is, of the run's own data, as `recorded` for `part`, and of any other data `split` and
    the usual columns.

    Raises UserError where neither says which data.
    """
    if options.data is None and part not in recorded:
        raise UserError("--data: expected it, as no config of a run says what this was trained on")
    source = options.data if options.data is not None else recorded[part].source
    if source == SHAPES:
        known = recorded.get(part)
        level = known.level if known is not None and options.level is None else options.level or 1
        return DataConfig(source=SHAPES, split=options.split or split, level=level)
    own = recorded.get(part)
    if own is None or not _is_same(own.source, source):
        other = next((one for one in recorded.values() if _is_same(one.source, source)), DataConfig(source=source))
        own = other.model_copy(update={"split": split, "count": None, "side": "all", "mirror": False})
    changes = {"source": source}
    changes |= {name: given for name in COLUMNS if (given := getattr(options, name, None)) is not None}
    changes |= {"split": options.split, "count": None, "side": "all"} if options.split is not None else {}
    return own.model_copy(update=changes)


def _is_same(recorded: object, given: object) -> bool:
    if not isinstance(recorded, str) or not isinstance(given, str):  # several sources as one
        return recorded == given
    return recorded == given or (Path(given).exists() and Path(recorded).resolve() == Path(given).resolve())


def check_columns(options: argparse.Namespace, source: object) -> None:
    """Raises UserError for a column of data that have none."""
    if source != SHAPES and getattr(options, "level", None) is not None:
        raise UserError(f"--level {options.level}: is of shapes, {source} has none; leave it out")
    for name in COLUMNS if source == SHAPES else ():
        if getattr(options, name, None) is not None:
            raise UserError(f"--{name} {getattr(options, name)}: shapes has no columns; leave it out")
