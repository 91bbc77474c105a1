"""Rows that `datasets` reads from memory-mapped Arrow files: those of parquet files, of saved sets and of the hub."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetGenerationError, DatasetsError

from sd_mini.data.file_states import FileStates
from sd_mini.data.table import SourceRows
from sd_mini.errors import UserError
from sd_mini.memory import let_go_of

NO_ROWS = datasets.Dataset.from_dict({})  # `datasets` itself fails on empty sources, with an unrelated message
_ID_COLUMNS = ("id", "key", "__key__")
_BLOCK = 1024  # rows of a text column that are read at once, as each call of `datasets` costs as much as many rows
_RESIDENT = 2**26  # bytes of pictures that are read before the pages of the Arrow files are let go


class DatasetRows(SourceRows):
    """Rows of a data set. `source` is how messages name it, `place` the id of a row where no column has ids."""

    def __init__(self, rows: datasets.Dataset, source: str, files: FileStates, place: Callable[[int], str]):
        self._set, self._source, self.files = rows, source, files
        self.columns = rows.column_names
        self.text_columns = [name for name, feature in rows.features.items() if holds_text(feature)]
        ids = _id_column(rows)
        self._place = place if ids is None else lambda row: str(self.text(row, ids))
        self._read_bytes = 0
        self._block = lru_cache(maxsize=8)(self._read_block)
        self._pictures = lru_cache(maxsize=8)(self._encoded)

    def __len__(self) -> int:
        return len(self._set)

    def id(self, row: int) -> str:
        return self._place(row)

    def text(self, row: int, column: str) -> Any:
        return self._block(column, row // _BLOCK)[row % _BLOCK]

    def _read_block(self, column: str, number: int) -> list[Any]:
        with reading(f"column {column!r} of {self._source}"):
            values = self._set.select_columns(column)[number * _BLOCK : (number + 1) * _BLOCK][column]
        feature = self._set.features[column]
        return [named_classes(feature, value) for value in values]

    def picture(self, row: int, column: str) -> bytes | Path | None:
        found = encoded_picture(self._pictures(column)[row][column])
        if isinstance(found, bytes):
            self._read_bytes += len(found)
            if self._read_bytes > _RESIDENT:
                self._read_bytes = 0
                let_go_of({file["filename"] for file in self._set.cache_files})
        return found

    def _encoded(self, column: str) -> datasets.Dataset:
        with reading(f"column {column!r} of {self._source} as pictures (it holds {self._set.features[column]})"):
            return self._set.select_columns(column).cast_column(column, datasets.Image(decode=False))


def _id_column(rows: datasets.Dataset) -> str | None:
    """The first column of ids whose values are texts or integers, all there and no two alike."""
    for name in _ID_COLUMNS:
        if name not in rows.column_names or not len(rows):
            continue
        values = rows.with_format("arrow").select_columns(name)[:][name]
        is_name = pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
        is_name = is_name or pa.types.is_integer(values.type)
        if is_name and not values.null_count and len(values.unique()) == len(rows):
            return name
    return None


def named_classes(feature: Any, value: Any) -> Any:
    """A class by its name; of a number that stands for no class (-1 is usual), nothing. Other cells as they are."""
    inner = getattr(feature, "feature", None)
    if isinstance(value, list) and inner is not None:
        return [named_classes(inner, one) for one in value]
    if not isinstance(feature, datasets.ClassLabel):
        return value
    return feature.names[value] if value is not None and 0 <= value < len(feature.names) else None


def encoded_picture(cell: dict[str, Any] | None) -> bytes | Path | None:
    """A cell of `datasets.Image(decode=False)` => the picture's bytes, or its path."""
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        return None
    return Path(cell["path"]) if cell["bytes"] is None else cell["bytes"]


def holds_text(feature: Any) -> bool:
    inner = getattr(feature, "feature", feature)  # lists of captions count too
    return getattr(inner, "dtype", None) in ("string", "large_string")


@contextmanager
def reading(what: str) -> Generator[None]:
    """The many ways in which `datasets` fails on a user's source => UserError, one line that begins with `what`."""
    try:
        yield
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, DatasetsError) as error:
        if isinstance(error, UserError):
            raise
        reason = error
        if isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
            reason = error.__cause__  # the outer text only says that something went wrong
        raise UserError(f"cannot read {what}: {' '.join(str(reason).split())}") from error


@contextmanager
def without_bars() -> Generator[None]:
    """Without the bars of `datasets`, which say "Downloading data" of files that lie here."""
    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
