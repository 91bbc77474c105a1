"""Data sets of the Hugging Face hub by name, downloaded whole or read as a stream."""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import datasets

from sd_mini.data.file_states import FileStates
from sd_mini.data.retries import with_retries
from sd_mini.data.splits import Part
from sd_mini.data.stored import DatasetRows, reading
from sd_mini.data.stream import StreamedRows, checked_count
from sd_mini.data.table import SourceRows
from sd_mini.errors import UserError

if TYPE_CHECKING:
    from sd_mini.data.captioned import DataConfig

_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# names under which `datasets` has a reader of files, which it would take for a data set
READERS = frozenset({
    "csv", "json", "pandas", "parquet", "arrow", "text", "conll", "imagefolder", "audiofolder", "videofolder",
    "meshfolder", "pdffolder", "niftifolder", "webdataset", "xml", "hdf5", "eval", "lance", "tsfile", "iceberg",
    "vortex", "mmcif", "pdb", "genbank", "fasta", "fastq", "harbor", "spark", "sql", "generator", "cache",
})  # fmt: skip
_FILE_SUFFIXES = (".parquet", ".csv", ".tsv", ".tar")


def is_hub_name(source: str, config: DataConfig) -> bool:
    """Whatever is no file or folder here."""
    return not os.path.exists(source)


def open_hub(source: str, config: DataConfig, part: Part) -> SourceRows:
    _check_name(source)
    what = f"{source!r}, which is no file or folder here, from the Hugging Face hub"
    load = partial(datasets.load_dataset, source, split=config.split)
    with reading(what):
        if config.streaming:
            return _streamed(source, config, part)
        rows = with_retries(load, what)
    # not its copies in the cache of `datasets`, which lie elsewhere on each host
    files = FileStates.of(Path(source), [], f"{source}:{config.split}@{rows._fingerprint}")
    return DatasetRows(rows, repr(source), files, lambda row: f"{config.split}/{row}")


def _check_name(name: str) -> None:
    if name.lower() in READERS:
        raise UserError(
            f"{name!r} is a reader of files in `datasets`, not a data set; give the folder of the files, or OWNER/NAME "
            "of a set on the Hugging Face hub"
        )
    if name.lower().endswith(_FILE_SUFFIXES) or not _NAME.fullmatch(name):
        raise UserError(f"{name!r}: no such file or folder; mend the path, or give 'shapes'")


def _streamed(source: str, config: DataConfig, part: Part) -> StreamedRows:
    builder = with_retries(partial(datasets.load_dataset_builder, source), repr(source))
    split = (builder.info.splits or {}).get(config.split)
    known = split.num_examples if split is not None else None
    count = checked_count(config, part, known)
    # builders that read columns by themselves leave the pictures where they are while captions are read
    is_columnar = hasattr(builder.config, "columns")

    def load(columns: list[str] | None) -> datasets.IterableDataset:
        if columns is None:
            return datasets.load_dataset(source, split=config.split, streaming=True)
        if is_columnar:
            return datasets.load_dataset(source, split=config.split, streaming=True, columns=columns)
        return datasets.load_dataset(source, split=config.split, streaming=True).select_columns(columns)

    # the files' hashes are the builder's: those of a branch change with it
    files = FileStates.of(Path(source), [], f"{source}@{builder.hash}:{config.split}")
    return StreamedRows(load, count, source, files, lambda row: f"{config.split}/{row}", known)
