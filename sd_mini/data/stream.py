"""Rows that are read once and in order, without a copy on this disk: parquet files and sets of the hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import datasets

from sd_mini.data.file_states import FileStates
from sd_mini.data.retries import iterate_with_retries, with_retries
from sd_mini.data.splits import FieldError, Part
from sd_mini.data.stored import encoded_picture, holds_text, named_classes, reading
from sd_mini.data.table import SourceRows
from sd_mini.errors import UserError
from sd_mini.progress import progress

if TYPE_CHECKING:
    from sd_mini.data.captioned import DataConfig

_KEPT = 512  # pictures behind the last one read, as threads ask for them in about their order


class _Cursor:
    """A place in a stream of pictures, for several threads, with the last ones read; `start(n)` reads from number n."""

    def __init__(self, start: Callable[[int], Iterator[bytes | Path | None]]):
        self._start, self._lock = start, Lock()
        self._stream: Iterator[bytes | Path | None] | None = None
        self._next = 0
        self._kept: dict[int, bytes | Path | None] = {}

    def picture(self, number: int) -> bytes | Path | None:
        with self._lock:
            if number in self._kept:
                return self._kept[number]
            if self._stream is None or number < self._next:
                self._stream, self._next, self._kept = self._start(number), number, {}
            stream, self._stream = self._stream, None  # after an error it is of no use
            while self._next <= number:
                self._kept[self._next] = next(stream)
                self._kept.pop(self._next - _KEPT, None)
                self._next += 1
            self._stream = stream
            return self._kept[number]


class StreamedRows(SourceRows):
    """`count` rows of a stream. Texts are read in a pass of their own and kept, pictures as they are asked for.

    `load(columns)` gives the stream of these columns, or of all (None).
    """

    is_streamed = True

    def __init__(
        self,
        load: Callable[[list[str] | None], datasets.IterableDataset],
        count: int,
        source: str,
        files: FileStates,
        place: Callable[[int], str],
        known: int | None = None,
    ):
        """`count` rows of the stream, which has `known` in all, where it tells."""
        self._load, self._count, self._known, self._source = load, count, known, source
        self.files, self._place = files, place
        self._features = with_retries(lambda: _features(load(None)), repr(source))
        self._cursors: dict[tuple[int, str], _Cursor] = {}
        self.columns = list(self._features)
        self.text_columns = [name for name, feature in self._features.items() if holds_text(feature)]

    def __len__(self) -> int:
        return self._count

    def state(self) -> str:
        whole = self.files.digest()
        return whole if self._count == self._known else f"{whole}:{self._count}"

    def id(self, row: int) -> str:
        return self._place(row)

    def text(self, row: int, column: str) -> Any:
        return self._texts[row][column]

    @cached_property
    def _texts(self) -> list[dict[str, Any]]:
        """Every cell that can be a caption."""
        names = [name for name, feature in self._features.items() if name in self.text_columns or _has_classes(feature)]
        cells = progress(self._read(names, names), total=self._count, desc="reading captions", delay=2)
        return [{name: named_classes(self._features[name], row[name]) for name in names} for row in cells]

    def picture(self, row: int, column: str) -> bytes | Path | None:
        """Quick where rows are asked for in about their order; an earlier one reads the stream anew."""
        with reading(f"column {column!r} of {self._source!r} as pictures (it holds {self._features[column]})"):
            return self._cursor(column).picture(row)

    def _cursor(self, column: str) -> _Cursor:
        # a forked process reads for itself: it can share neither a lock nor a connection
        key = (os.getpid(), column)
        return self._cursors.setdefault(key, _Cursor(lambda first: self._pictures(column, first)))

    def _pictures(self, column: str, first: int) -> Iterator[bytes | Path | None]:
        return (encoded_picture(cells[column]) for cells in self._read([column], None, first))

    def _read(self, columns: list[str], loaded: list[str] | None, first: int = 0) -> Iterator[dict[str, Any]]:
        """The rows from `first` to the last of `count`. Raises UserError where the stream ends before."""

        def start(read: int) -> Iterator[dict[str, Any]]:
            stream = self._load(loaded).select_columns(columns)
            for name in set(columns) - set(self.text_columns):
                if not _has_classes(self._features[name]):
                    stream = stream.cast_column(name, datasets.Image(decode=False))
            return iter(stream.skip(first + read).take(self._count - first - read))

        read = first
        for row in iterate_with_retries(start, repr(self._source)):
            read += 1
            yield row
        if read < self._count:
            raise UserError(f"{self._source!r} ended after {read:,} of {self._count:,} rows; give data.count {read}")


def checked_count(config: DataConfig, part: Part, known: int | None) -> int:
    """How many rows of a stream are read. Raises FieldError where neither the set nor the config tells."""
    if known is not None:
        return known if config.count is None else min(known, config.count)
    if config.count is None:
        raise FieldError(
            f"{part}.count: {config.source!r} does not tell how many rows it has, which a stream needs to be told; "
            f"give {part}.count"
        )
    return config.count


def _features(stream: datasets.IterableDataset) -> dict[str, Any]:
    resolved = stream if stream.features is not None else stream._resolve_features()
    return dict(resolved.features or {})


def _has_classes(feature: Any) -> bool:
    return isinstance(getattr(feature, "feature", feature), datasets.ClassLabel)
