"""The rows of one split, pictures not yet decoded: what every kind of source gives, and those that `datasets` reads."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import datasets
from datasets.exceptions import DatasetGenerationError, DatasetsError

from sd_mini.errors import UserError


class Table(Protocol):
    """N rows, in an order that is the same on every machine."""

    @property
    def columns(self) -> list[str]: ...

    @property
    def text_columns(self) -> list[str]:
        """Of these, the ones that hold texts or lists of texts, whoever wrote them meant them as captions or not."""
        ...

    def __len__(self) -> int: ...

    def select(self, rows: Sequence[int]) -> Table:
        """These rows alone, in this order."""
        ...

    def number(self, row: int) -> int:
        """Which row of the whole split it is, from 0, whatever was selected since."""
        ...

    def file(self, row: int) -> str | None:
        """The file that a row's picture lies in, relative to the folder, if it lies in one."""
        ...

    def fault(self, row: int) -> str | None:
        """Why a row cannot be used, whatever is read of it."""
        ...

    def id(self, row: int) -> str:
        """A row's name in its source: the same on every machine, whatever is selected."""
        ...

    def picture(self, row: int, column: str) -> bytes | Path | str | None:
        """A row's encoded picture or its path, None where there is none; from any thread."""
        ...

    def source_state(self) -> str:
        """A hash of what tells one state of the source from another, cheaply: names, sizes and times of its files."""
        ...

    def check_unchanged(self) -> None:
        """Raises UserError where the source is no longer as it was when it was opened."""
        ...

    def text(self, row: int, column: str) -> Any:
        """A cell of any column but the pictures'. Raises UserError where its file cannot be read."""
        ...

    def pictures(self, column: str) -> Iterator[bytes | Path | str | None]:
        """Each row's encoded picture or its path, or None where there is none. Raises UserError for another column."""
        ...


class DatasetTable:
    """Rows of parquet files, of a saved data set or of the hub. `source` is how messages name it."""

    def __init__(self, rows: datasets.Dataset, source: str, numbers: Sequence[int] | None = None):
        self.rows, self.source = rows, source
        self._numbers = range(len(rows)) if numbers is None else numbers
        self.columns = rows.column_names
        self.text_columns = [name for name, feature in rows.features.items() if _holds_text(feature)]
        self._column = cache(self._read_column)
        self._encoded = cache(self._encoded_column)

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, rows: Sequence[int]) -> DatasetTable:
        return DatasetTable(self.rows.select(rows), self.source, [self._numbers[row] for row in rows])

    def number(self, row: int) -> int:
        return self._numbers[row]

    def file(self, row: int) -> str | None:
        return None

    def fault(self, row: int) -> str | None:
        return None

    def id(self, row: int) -> str:
        return str(self._numbers[row])

    def picture(self, row: int, column: str) -> bytes | str | None:
        return _picture(self._encoded(column)[row][column])

    def _encoded_column(self, column: str) -> datasets.Dataset:
        with reading(f"column {column!r} of {self.source} as pictures (it holds {self.rows.features[column]})"):
            return self.rows.select_columns(column).cast_column(column, datasets.Image(decode=False))

    def source_state(self) -> str:
        return self.rows._fingerprint

    def check_unchanged(self) -> None:
        pass

    def text(self, row: int, column: str) -> Any:
        return self._column(column)[row]

    def _read_column(self, column: str) -> list[Any]:
        feature = self.rows.features[column]
        values = self.rows[column][:]
        of_lists = getattr(feature, "feature", None)
        if isinstance(feature, datasets.ClassLabel):
            return [_class_name(feature, value) for value in values]
        if isinstance(of_lists, datasets.ClassLabel):
            return [several and [_class_name(of_lists, value) for value in several] for several in values]
        return values

    def pictures(self, column: str) -> Iterator[bytes | str | None]:
        with reading(f"column {column!r} of {self.source} as pictures (it holds {self.rows.features[column]})"):
            rows = self.rows.select_columns(column).cast_column(column, datasets.Image(decode=False))
        return (_picture(row[column]) for row in rows)


def _class_name(feature: datasets.ClassLabel, number: int | None) -> str | None:
    """A class by its name; of a number that stands for no class (-1 is usual), nothing."""
    return feature.names[number] if number is not None and 0 <= number < len(feature.names) else None


def _picture(cell: dict[str, Any] | None) -> bytes | str | None:
    return None if cell is None else cell["path"] if cell["bytes"] is None else cell["bytes"]


def _holds_text(feature: Any) -> bool:
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
