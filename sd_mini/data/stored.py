"""Sources that `datasets` reads: parquet files, sets written by `save_to_disk`, and the Hugging Face hub."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from sd_mini.data.folder import TRAIN, is_hidden, is_split
from sd_mini.data.metadata import is_metadata
from sd_mini.data.table import reading
from sd_mini.errors import UserError

# train-00000-of-00002.parquet is a part of the split train, with or without the hash that older hub sets have behind it
_SHARD = re.compile(r"-\d{5,}-of-\d{5,}(-[0-9a-f]+)?$")
# 00000.parquet (img2dataset), 0000.parquet (the hub's conversion), part-00000-HASH-c000.snappy.parquet (Spark)
_UNNAMED = re.compile(
    r"\d+|(part|shard|chunk|data|file)[-_.]?\d+(-of-\d+)?([-_][0-9a-f-]{8,})?([-_.]c\d+)?(\.[a-z0-9]+)?", re.IGNORECASE
)
_NUMBERED = re.compile(r"(.+?)[-_.](\d+)")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# names under which `datasets` has a reader of files, which it would take for a data set
READERS = frozenset({
    "csv", "json", "pandas", "parquet", "arrow", "text", "conll", "imagefolder", "audiofolder", "videofolder",
    "meshfolder", "pdffolder", "niftifolder", "webdataset", "xml", "hdf5", "eval", "lance", "tsfile", "iceberg",
    "vortex", "mmcif", "pdb", "genbank", "fasta", "fastq", "harbor", "spark", "sql", "generator", "cache",
})  # fmt: skip
_NO_ROWS = datasets.Dataset.from_dict({})  # `datasets` itself fails on empty sources, with an unrelated message


def is_saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()


def saved_splits(folder: Path) -> dict[str, Path]:
    """The splits of a set written by `save_to_disk`, each in a folder."""
    with reading(repr(str(folder))):
        if (folder / "dataset_dict.json").exists():
            names = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            return {name: folder / name for name in names}
        return {json.loads((folder / "state.json").read_text(encoding="utf-8"))["_split"] or TRAIN: folder}


def read_saved(folder: Path) -> datasets.Dataset:
    with reading(repr(str(folder))):
        if not json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]:
            return _NO_ROWS
        rows = datasets.load_from_disk(folder)
    assert isinstance(rows, datasets.Dataset)  # as the folder has a state.json
    return rows


def parquet_splits(path: Path) -> dict[str, list[Path]]:
    """The parquet files of a folder, by split; of a single file, TRAIN and its own name. Empty where there are none.

    They lie in the folder itself or in `data/`, named for their splits or, as parts of one set, by number alone; or in
    folders that are named for the splits. Metadata of pictures is no such file.
    """
    if path.is_file():
        return {TRAIN: [path], _base(path.stem): [path]}
    files = _parquet_files(path) or _parquet_files(path / "data")
    if not files:
        tops = [top for folder in (path, path / "data") if folder.is_dir() for top in sorted(folder.iterdir())]
        found = {top.name: _parquet_files(top) for top in tops if is_split(top.name)}
        return {name: parts for name, parts in found.items() if parts}
    splits = _grouped(files)
    if len(splits) == 1 and not is_split(*splits):
        splits[TRAIN] = next(iter(splits.values()))
    return splits


def _parquet_files(folder: Path) -> list[Path]:
    there = sorted(folder.iterdir()) if folder.is_dir() else []
    return [p for p in there if p.suffix.lower() == ".parquet" and not is_hidden(p.name) and not is_metadata(p)]


def _grouped(files: Sequence[Path]) -> dict[str, list[Path]]:
    """Parquet files, by the split that each is a part of."""
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


def may_hold_pictures(file: Path, column: str) -> bool:
    """Whether a parquet file has that column, or another of bytes. img2dataset writes some that only describe files."""
    with reading(repr(str(file))):
        schema = pq.read_schema(file)
    kinds = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_struct)
    return column in schema.names or any(is_kind(one.type) for one in schema for is_kind in kinds)


def read_parquet(files: Sequence[Path], source: str) -> datasets.Dataset:
    with reading(repr(source)), _silent():
        if not sum(pq.read_metadata(file).num_rows for file in files):
            return _NO_ROWS
        return datasets.load_dataset("parquet", data_files=[str(file) for file in files], split="train")


def read_hub(name: str, split: str) -> datasets.Dataset:
    if name.lower() in READERS:
        raise UserError(
            f"{name!r} is a reader of files in `datasets`, not a data set; give the folder of the files, or OWNER/NAME "
            "of a set on the Hugging Face hub"
        )
    if name.endswith(".parquet") or not _HUB_NAME.fullmatch(name):
        raise UserError(f"{name!r}: no such file or folder; mend the path, or give 'shapes'")
    with reading(f"{name!r}, which is no file or folder here, from the Hugging Face hub"):
        return datasets.load_dataset(name, split=split)


@contextmanager
def _silent() -> Generator[None]:
    """Without the bars of `datasets`, which say "Downloading data" of files that lie here."""
    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
