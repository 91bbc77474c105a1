"""A data source by its name: shapes apart, a file, a folder of one kind or another, or a set of the hub."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import datasets

from sd_mini.data import stored
from sd_mini.data.folder import PictureFolder, chosen_splits, list_pictures
from sd_mini.data.table import DatasetTable, Table
from sd_mini.errors import UserError
from sd_mini.remarks import remark

if TYPE_CHECKING:
    from sd_mini.data.captioned import DataConfig

Part = Literal["data", "valid"]


def source_name(config: DataConfig) -> str:
    """The source's own name and the split, "emoji:test"; the name alone where it is the split's, too."""
    path = Path(config.source)
    if not path.exists():
        return f"{config.source}:{config.split}"
    own = path.resolve()
    stem = own.stem if own.is_file() else own.name
    return own.name if stem == config.split else f"{stem}:{config.split}"


def asked_splits(config: DataConfig, part: Part, known: Iterable[str]) -> list[str]:
    """Those of a source's splits that are asked for."""
    known = list(known)
    chosen = chosen_splits(config.split, known)
    if not chosen:
        raise UserError(f"{part}.split: {config.source!r} has no split {config.split!r}; it has {', '.join(known)}")
    return chosen


@contextmanager
def _source(part: Part) -> Generator[None]:
    """What is wrong with a source, under the name of its field."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{part}.source: {error}") from error


def open_source(config: DataConfig, part: Part) -> Table:
    """The rows of the asked split."""
    path = Path(config.source)
    if path.is_dir():
        return _open_folder(path, config, part)
    with _source(part):
        if not path.exists():
            return _stored(stored.read_hub(config.source, config.split), config)
        if path.suffix.lower() != ".parquet":
            raise UserError(f"{config.source!r} is neither a folder nor a .parquet file; give one of these")
    return _open_parquet(stored.parquet_splits(path), config, part)


def _stored(rows: datasets.Dataset, config: DataConfig) -> DatasetTable:
    return DatasetTable(rows, repr(config.source))


def _open_parquet(splits: dict[str, list[Path]], config: DataConfig, part: Part) -> Table:
    files = [file for name in asked_splits(config, part, splits) for file in splits[name]]
    with _source(part):
        return _stored(stored.read_parquet(files, config.source), config)


def _open_folder(path: Path, config: DataConfig, part: Part) -> Table:
    """Written by `save_to_disk`, else parquet files with a column of pictures, else pictures."""
    if stored.is_saved(path):
        return _open_saved(path, config, part)
    with _source(part):
        parquet = stored.parquet_splits(path)
        beside = list_pictures(path)
        has_pictures = parquet and stored.may_hold_pictures(next(iter(parquet.values()))[0], config.image_column)
    if parquet and (has_pictures or not beside):
        if beside:
            remark(f"{part}.source: {config.source!r}: left out {len(beside):,} pictures beside parquet files")
        return _open_parquet(parquet, config, part)
    with _source(part):
        folder = PictureFolder(path)
        if not beside and not folder.metadata:
            raise UserError(f"cannot read {config.source!r}: it holds neither pictures nor parquet files")
    table, left_out = folder.table(asked_splits(config, part, sorted(folder.splits)))
    if left_out:
        remark(f"{part}.source: {config.source!r}: left out {left_out}")
    return table


def _open_saved(path: Path, config: DataConfig, part: Part) -> Table:
    with _source(part):
        splits = stored.saved_splits(path)
    names = asked_splits(config, part, splits)
    with _source(part):
        return _stored(stored.read_saved(splits[names[0]]), config)
