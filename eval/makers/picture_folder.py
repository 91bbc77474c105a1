"""A folder of pictures that were made elsewhere, each with the prompt it was made for."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sd_mini import images
from sd_mini.data.folder import is_hidden, list_files, path_key, read_listed
from sd_mini.data.metadata import is_metadata, some
from sd_mini.errors import UserError
from sd_mini.memory import check_room
from sd_mini.remarks import remark
from sd_mini.texts import read_lines, shown

_PROMPTS = "prompts.txt"


@dataclass(frozen=True, eq=False)
class GeneratedFolder:
    """Pictures that were made elsewhere, (N, 3, R, R) uint8, and their prompts."""

    folder: Path
    pictures: np.ndarray
    prompts: list[str]

    @property
    def resolution(self) -> int:
        return self.pictures.shape[-1]


def is_picture_folder(folder: Path) -> bool:
    """Whether pictures, or metadata of them, lie in this very folder."""
    return folder.is_dir() and any(
        (images.is_picture(path) or is_metadata(path)) and not is_hidden(path.name) and path.is_file()
        for path in folder.iterdir()
    )


def lying(folder: Path) -> GeneratedFolder:
    """A folder of pictures with prompts.txt, a line a picture in the order of their names as numbers count, or with
    metadata (metadata.jsonl of {"file_name": ..., "text": ...}, .csv, .tsv or .parquet).

    prompts.txt is of the pictures beside it; metadata may list those of sub-folders, and may lie in them. Pictures of
    folders that neither speaks of are left out, which is remarked.

    Raises UserError, one line: no picture, those that cannot be read, sizes that differ or are not square, more than
    memory holds, and prompts and pictures that do not belong together.
    """
    there = list_files(folder)
    prompts = next((path for path in there if path.parent == folder and path.name.lower() == _PROMPTS), None)
    if prompts is not None:
        files, texts = _in_order(folder, prompts, there)
    elif any(map(is_metadata, there)):
        files, texts = _listed(folder, there)
    else:
        number = sum(map(images.is_picture, there))
        raise UserError(f"{folder}: {number} pictures, but neither {_PROMPTS} nor metadata.jsonl says what was asked")
    if not files:
        raise UserError(
            f"{folder}: no pictures here; expected pictures and {_PROMPTS} or metadata.jsonl, or a pipeline"
        )
    return GeneratedFolder(folder, _read_alike(folder, files), texts)


def _in_order(folder: Path, source: Path, there: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """The pictures beside prompts.txt, each with its line."""
    pictures = [path for path in there if images.is_picture(path)]
    files = sorted((path for path in pictures if path.parent == folder), key=_natural)
    _remark_left_out(folder, [path for path in pictures if path.parent != folder], f"not beside {source.name}")
    metadata = [path for path in there if is_metadata(path)]
    _remark_left_out(folder, metadata, f"{source.name} says what was asked")
    prompts = read_lines(source)
    if len(files) != len(prompts):
        raise UserError(f"{folder}: {len(files)} pictures and {len(prompts)} prompts, expected one prompt a picture")
    _check(source, {"without a text": [f.name for f, text in zip(files, prompts, strict=True) if not text.strip()]})
    return files, prompts


def _listed(folder: Path, there: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """The pictures that metadata lists, in its order, each with its text."""
    every = list(read_listed(there))
    listed = [(file, row, path) for file, row, path in every if row.fault is None]
    files = [path for _, _, path in listed]
    texts: list[Any] = [row.fields.get("text") for _, row, _ in listed]
    times = Counter(map(path_key, files))
    unlisted = [path for path in there if images.is_picture(path) and path_key(path) not in times]
    # of a folder that metadata lists pictures of, or lies in, all pictures are to be listed
    spoken_of = {path.parent for path in files} | {path.parent for path in there if is_metadata(path)}
    without_text = [
        f"{_within(folder, path)} ({shown(text)})"
        for path, text in zip(files, texts, strict=True)
        if not isinstance(text, str) or not text.strip()
    ]
    faults = {
        "unreadable": [f"{file.name}, {row.fault}" for file, row, _ in every if row.fault is not None],
        "not listed": [_within(folder, path) for path in unlisted if path.parent in spoken_of],
        "listed but not there": [row.file_name for _, row, path in listed if not path.is_file()],
        "listed more than once": [_within(folder, path) for path in dict.fromkeys(files) if times[path_key(path)] > 1],
        "without a text": without_text,
    }
    sources = list(dict.fromkeys(file for file, _, _ in listed))
    _check(sources[0] if len(sources) == 1 else folder, faults)
    _remark_left_out(folder, [path for path in unlisted if path.parent not in spoken_of], "not in the metadata")
    return files, texts


def _check(source: Path, faults: dict[str, list[str]]) -> None:
    """Raises UserError where there are `faults`, kind => names."""
    said = [f"{kind}: {some(names, ', ')}" for kind, names in faults.items() if names]
    if said:
        raise UserError(f"{source}: expected a text for each picture beside it, once; {'; '.join(said)}")


def _remark_left_out(folder: Path, files: Sequence[Path], why: str) -> None:
    if files:
        named = some([_within(folder, path) for path in files], ", ")
        remark(f"{folder}: left out {len(files):,} {'files' if len(files) > 1 else 'file'} ({why}): {named}")


def _within(folder: Path, path: Path) -> str:
    return os.path.relpath(path, folder)


def _read_alike(folder: Path, files: Sequence[Path]) -> np.ndarray:
    """Square pictures of one size => (N, 3, R, R) uint8."""
    pictures: np.ndarray | None = None
    faults = []
    for i, file in enumerate(files):
        try:
            picture = images.decode(file)
        except UserError as error:
            faults.append(str(error))
            continue
        if pictures is None:
            if picture.shape[1] != picture.shape[2]:
                raise UserError(f"{file}: not square; cut the pictures to squares, as the reference pictures are")
            check_room(str(folder), len(files), picture.shape[-1])
            pictures, first = np.empty((len(files), *picture.shape), dtype=np.uint8), file
        if picture.shape != pictures.shape[1:]:
            sizes = [" x ".join(map(str, shape[:0:-1])) for shape in (picture.shape, pictures.shape[1:])]
            faults.append(f"{file}: {sizes[0]} px, but {first.name} {sizes[1]} px; make all of one size")
            continue
        pictures[i] = picture
    if faults:
        raise UserError(some(faults))
    assert pictures is not None  # as `files` is not empty
    return pictures


def _natural(path: Path) -> list[Any]:
    """Names as numbers count: 2.png before 10.png."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]
