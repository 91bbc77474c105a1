"""Parquet: one file, or a folder of shards. Read through the Arrow cache of `datasets`, or as a stream."""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from sd_mini.data.file_states import FileStates, relative_id
from sd_mini.data.folder import is_hidden, list_pictures
from sd_mini.data.metadata import is_metadata
from sd_mini.data.splits import TRAIN, Part, asked_splits, is_split
from sd_mini.data.stored import NO_ROWS, DatasetRows, reading, without_bars
from sd_mini.data.stream import StreamedRows, checked_count
from sd_mini.data.table import SourceRows
from sd_mini.remarks import remark

if TYPE_CHECKING:
    from sd_mini.data.captioned import DataConfig

# train-00000-of-00002.parquet is a part of the split train, with or without the hash that older hub sets have behind it
_SHARD = re.compile(r"-\d{5,}-of-\d{5,}(-[0-9a-f]+)?$")
# 00000.parquet (img2dataset), 0000.parquet (the hub's conversion), part-00000-HASH-c000.snappy.parquet (Spark)
_UNNAMED = re.compile(
    r"\d+|(part|shard|chunk|data|file)[-_.]?\d+(-of-\d+)?([-_][0-9a-f-]{8,})?([-_.]c\d+)?(\.[a-z0-9]+)?", re.IGNORECASE
)
_NUMBERED = re.compile(r"(.+?)[-_.](\d+)")


def is_parquet(source: str, config: DataConfig) -> bool:
    """A .parquet file; a folder of them with a column of pictures, or of them and no pictures."""
    if not os.path.isdir(source):
        return source.lower().endswith(".parquet") and os.path.exists(source)
    path = Path(source)
    splits = shard_splits(path, ".parquet")
    if not splits:
        return False
    return _may_hold_pictures(next(iter(splits.values()))[0], config.image_column) or not list_pictures(path)


def open_parquet(source: str, config: DataConfig, part: Part) -> SourceRows:
    root = Path(source)
    splits = shard_splits(root, ".parquet")
    paths = [file for name in asked_splits(config, part, splits) for file in splits[name]]
    if root.is_dir() and (beside := list_pictures(root)):
        remark(f"{part}.source: {source!r}: left out {len(beside):,} pictures beside parquet files")
    files = FileStates.of(root if root.is_dir() else root.parent, paths)
    with reading(repr(source)), without_bars():
        ends = list(accumulate(pq.read_metadata(file).num_rows for file in paths))
        place = partial(_place, [relative_id(path, files.root) for path in paths], ends)
        if not ends[-1]:
            return DatasetRows(NO_ROWS, repr(source), files, place)
        load = partial(datasets.load_dataset, "parquet", data_files=[str(path) for path in paths], split="train")
        if config.streaming:
            count = checked_count(config, part, ends[-1])
            stream = partial(load, streaming=True)
            return StreamedRows(lambda names: stream(columns=names), count, source, files, place, ends[-1])
        return DatasetRows(load(), repr(source), files, place)


def _place(names: Sequence[str], ends: Sequence[int], row: int) -> str:
    """A row of all shards => "train-00001.parquet/7", its shard and its row in that."""
    shard = bisect_right(ends, row)
    return f"{names[shard]}/{row - (ends[shard - 1] if shard else 0)}"


def shard_splits(path: Path, suffix: str) -> dict[str, list[Path]]:
    """The shards of a folder, by split; of a single file, TRAIN and its own name. Empty where there are none.

    They lie in the folder itself or in `data/`, named for their splits or, as parts of one set, by number alone; or in
    folders that are named for the splits. Metadata of pictures is no shard.
    """
    if path.is_file():
        return {TRAIN: [path], _base(path.stem): [path]}
    files = _shards(path, suffix) or _shards(path / "data", suffix)
    if not files:
        tops = [top for folder in (path, path / "data") if folder.is_dir() for top in sorted(folder.iterdir())]
        splits = {top.name: _shards(top, suffix) for top in tops if is_split(top.name)}
        return {name: shards for name, shards in splits.items() if shards}
    splits = _grouped(files)
    if len(splits) == 1 and not is_split(*splits):
        splits[TRAIN] = next(iter(splits.values()))
    return splits


def _shards(folder: Path, suffix: str) -> list[Path]:
    with reading(repr(str(folder))):
        there = sorted(folder.iterdir()) if folder.is_dir() else []
    return [p for p in there if p.suffix.lower() == suffix and not is_hidden(p.name) and not is_metadata(p)]


def _grouped(files: Sequence[Path]) -> dict[str, list[Path]]:
    """Shards, by the split that each is a part of."""
    numbers: dict[str, list[int]] = defaultdict(list)
    for match in (_NUMBERED.fullmatch(file.stem) for file in files):
        if match is not None:
            numbers[match[1]].append(int(match[2]))
    splits: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        name, match = _base(file.stem), _NUMBERED.fullmatch(file.stem)
        # faces_0, faces_1 are parts of one set; faces_2020, faces_2021 two sets
        if match is not None and (is_split(match[1]) or _is_count(numbers[match[1]])):
            name = match[1]
        splits[TRAIN if _UNNAMED.fullmatch(file.stem) else name].append(file)
    return dict(splits)


def _is_count(numbers: list[int]) -> bool:
    return len(numbers) > 1 and sorted(numbers) in (list(range(len(numbers))), list(range(1, len(numbers) + 1)))


def _base(stem: str) -> str:
    return _SHARD.sub("", stem)


def _may_hold_pictures(file: Path, column: str) -> bool:
    """Whether a parquet file has that column, or another of bytes. img2dataset writes some that only describe files."""
    with reading(repr(str(file))):
        schema = pq.read_schema(file)
    kinds = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_struct)
    return column in schema.names or any(is_kind(one.type) for one in schema for is_kind in kinds)
