"""Folders written by `save_to_disk` of `datasets`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import datasets

from sd_mini.data.file_states import FileStates
from sd_mini.data.splits import TRAIN, Part, asked_splits
from sd_mini.data.stored import NO_ROWS, DatasetRows, reading

if TYPE_CHECKING:
    from sd_mini.data.captioned import DataConfig


def is_saved(source: str, config: DataConfig) -> bool:
    return any(os.path.exists(os.path.join(source, name)) for name in ("dataset_dict.json", "state.json"))


def open_saved(source: str, config: DataConfig, part: Part) -> DatasetRows:
    splits = _splits(Path(source))
    folder = splits[asked_splits(config, part, splits)[0]]
    files = FileStates.of(Path(source), sorted(path for path in folder.iterdir() if path.is_file()))
    return DatasetRows(_read(folder), repr(source), files, str)


def _splits(folder: Path) -> dict[str, Path]:
    """The splits of a saved set, each in a folder."""
    with reading(repr(str(folder))):
        if (folder / "dataset_dict.json").exists():
            names = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            return {name: folder / name for name in names}
        return {json.loads((folder / "state.json").read_text(encoding="utf-8"))["_split"] or TRAIN: folder}


def _read(folder: Path) -> datasets.Dataset:
    with reading(repr(str(folder))):
        if not json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]:
            return NO_ROWS
        rows = datasets.load_from_disk(folder)
    assert isinstance(rows, datasets.Dataset)  # as the folder has a state.json
    return rows
