"""Rows that are read once and in order, without a copy on this disk: parquet files and sets of the hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
from tqdm import tqdm

from sd_mini.data.file_states import FileStates
from sd_mini.data.retries import iterate_with_retries, with_retries
from sd_mini.data.splits import FieldError, Part
from sd_mini.data.stored import encoded_picture, holds_text, named_classes, reading
from sd_mini.data.table import Rows
from sd_mini.errors import UserError

if TYPE_CHECKING:
    from sd_mini.data.captioned import DataConfig


class StreamedRows(Rows):
    """`count` rows of a stream. Texts are read in a pass of their own and kept; pictures are read by `pictures`.

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
    ):
        self._load, self._count, self._source = load, count, source
        self.files, self._place = files, place
        self._features = with_retries(lambda: _features(load(None)), repr(source))
        self.columns = list(self._features)
        self.text_columns = [name for name, feature in self._features.items() if holds_text(feature)]

    def __len__(self) -> int:
        return self._count

    def id(self, row: int) -> str:
        return self._place(row)

    def text(self, row: int, column: str) -> Any:
        return self._texts[row][column]

    @cached_property
    def _texts(self) -> list[dict[str, Any]]:
        """Every cell that can be a caption."""
        names = [name for name, feature in self._features.items() if name in self.text_columns or _has_classes(feature)]
        cells = tqdm(self._read(names, names), total=self._count, desc="reading captions", delay=2)
        return [{name: named_classes(self._features[name], row[name]) for name in names} for row in cells]

    def picture(self, row: int, column: str) -> bytes | Path | None:
        raise UserError(
            f"{self._source!r} is read as a stream, once and in order, and this needs its pictures in any order; leave "
            "out data.streaming"
        )

    def pictures(self, column: str, rows: Sequence[int]) -> Iterator[bytes | Path | None]:
        assert all(a < b for a, b in pairwise(rows))  # as a stream cannot go back
        with reading(f"column {column!r} of {self._source!r} as pictures (it holds {self._features[column]})"):
            wanted = iter(rows)
            row = next(wanted, None)
            for number, cells in enumerate(self._read([column], None)):
                if row is None:
                    return
                if number == row:
                    yield encoded_picture(cells[column])
                    row = next(wanted, None)

    def _read(self, columns: list[str], loaded: list[str] | None) -> Iterator[dict[str, Any]]:
        """The first `count` rows. Raises UserError where the stream ends before."""

        def start(number: int) -> Iterator[dict[str, Any]]:
            stream = self._load(loaded).select_columns(columns)
            for name in set(columns) - set(self.text_columns):
                if not _has_classes(self._features[name]):
                    stream = stream.cast_column(name, datasets.Image(decode=False))
            return iter(stream.skip(number).take(self._count - number))

        read = 0
        for row in iterate_with_retries(start, repr(self._source)):
            read += 1
            yield row
        if read < self._count:
            raise UserError(f"{self._source!r} ended after {read:,} of {self._count:,} rows; give data.count {read}")


def checked_count(config: DataConfig, part: Part, known: int | None) -> int:
    """How many rows of a stream are read. Raises FieldError where neither the set nor the config tells."""
    if known is not None:
        return known
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
