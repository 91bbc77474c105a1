"""The source of a cleaning, read by row numbers: the one place that knows `sd_mini.data`'s tables."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from sd_mini.data.captioned import DataConfig, rows_of
from sd_mini.data.splits import Part
from sd_mini.data.table import Table
from sd_mini.errors import UserError
from sd_mini.texts import check_text

REOPEN_ROWS = 8_000


@dataclass(frozen=True)
class SourceRow:
    """One row: its encoded picture and its captions, or why it has none."""

    id: str
    picture: bytes | None = field(repr=False)
    captions: list[str]
    fault: tuple[str, str] | None = None
    """A reason and its detail."""


class Source:
    """The rows of one split, by number from 0.

    Raises UserError for what `open_source` refuses, a missing column (naming those there are) and an empty split.
    """

    def __init__(self, config: DataConfig, part: str):
        if config.source == "shapes":
            raise UserError(f"{part}.source: 'shapes' is drawn, there is nothing to clean; give a source of pictures")
        self.config, self.rows_read = config, 0
        self.table = rows_of(config, cast(Part, part))  # which only messages use
        self.columns = [name for name in (config.text_column, config.aliases_column) if name is not None]
        for name in (config.image_column, *self.columns):
            if name not in self.table.columns:
                raise UserError(
                    f"{part}: {config.source!r} has no column {name!r}; it has {', '.join(self.table.columns)}"
                )

    def __len__(self) -> int:
        return len(self.table)

    def read(self, rows: Sequence[int]) -> Iterator[SourceRow]:
        """These rows in this order, one after the other: only one encoded picture is in memory."""
        self.rows_read += len(rows)
        table = self.table.select(rows)
        for i, picture in enumerate(table.pictures(self.config.image_column)):
            yield self._row(table, i, picture)

    def _row(self, table: Table, i: int, picture: bytes | Path | str | None) -> SourceRow:
        name = _printable(table.id(i))
        fault = table.fault(i)
        reason = ("row", fault) if fault is not None else None
        try:
            captions = self._captions(table, i)
        except UserError as error:
            captions, reason = [], reason or ("caption", str(error))
        try:
            encoded = Path(picture).read_bytes() if isinstance(picture, str | Path) else picture
        except OSError as error:
            encoded, reason = None, reason or ("picture", f"{picture}: {(error.strerror or str(error)).lower()}")
        if encoded is None:
            reason = reason or ("picture", f"no picture in column {self.config.image_column!r}")
        return SourceRow(name, encoded, captions, reason and (reason[0], _printable(reason[1])))

    def _captions(self, table: Table, i: int) -> list[str]:
        """A row's different captions, the main one first. Raises UserError for what is no text."""
        captions: list[Any] = []
        for column in self.columns:
            cell = table.text(i, column)
            is_absent = cell is None and column == self.config.aliases_column
            captions += cell if isinstance(cell, list) else [] if is_absent else [cell]
        if self.columns and not captions:
            raise UserError("its list of captions is empty; expected a text at least")
        for caption in captions:
            check_text(caption, "a caption")
        return list(dict.fromkeys(captions))


def _printable(text: str) -> str:
    """The name of a file may be no UTF-8: Python then holds its bytes as half surrogate pairs."""
    return text.encode("utf-8", "backslashreplace").decode()


_opened: dict[str, Source] = {}


def close_sources() -> None:
    """Let the next call of `open_rows` list its source anew."""
    _opened.clear()


def open_rows(config: Any, part: str) -> Source:
    """The source of a part of a config, "data" or "test".

    It is opened once a process, and anew after REOPEN_ROWS rows: what was read of files that are mapped into memory
    counts as this process's until they are closed.
    """
    own = getattr(config, part)
    key = f"{part} {own.model_dump_json()}"
    if key in _opened and _opened[key].rows_read > REOPEN_ROWS:
        del _opened[key]
        gc.collect()  # a table may refer to itself
    if key not in _opened:
        _opened[key] = Source(own, part)
    return _opened[key]
