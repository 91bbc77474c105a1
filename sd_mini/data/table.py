"""The rows of one split, pictures not yet decoded: `SourceRows` is what a source gives, `Table` the rows to be read."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sd_mini.data.file_states import FileStates
from sd_mini.data.template import Template


class SourceRows(ABC):
    """All N rows of one split, numbered from 0 in an order that is the same on every machine.

    `text` and `picture` read one row, hold nothing of it, and may be called by several threads and forked processes.
    """

    columns: list[str]
    text_columns: list[str]
    """Of these, the ones that hold texts or lists of texts, whoever wrote them meant them as captions or not."""
    files: FileStates
    """What the rows are read from, as it was before the first of it was read."""
    is_streamed = False
    """Whether pictures are quickly read in about their order alone."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def id(self, row: int) -> str:
        """What the row is called in every process and on every machine, whatever rows are read with it."""

    @abstractmethod
    def text(self, row: int, column: str) -> Any:
        """A cell of any column but the pictures'. Raises UserError where its file cannot be read."""

    @abstractmethod
    def picture(self, row: int, column: str) -> bytes | Path | None:
        """The encoded picture or its path, None where there is none. Raises UserError for a column of no pictures."""

    def file(self, row: int) -> str | None:
        """The file that a row's picture lies in, relative to the source, if it lies in one."""
        return None

    def fault(self, row: int) -> str | None:
        """Why a row cannot be used, whatever is read of it."""
        return None

    def weights(self) -> np.ndarray | None:
        """(N,) float64: how often each row is to be drawn; None where all are drawn alike."""
        return None

    def source_of(self, row: int) -> str | None:
        """Of a mixture, the name of the source that a row comes from."""
        return None

    def state(self) -> str:
        return self.files.digest()

    def check_unchanged(self) -> None:
        self.files.check_unchanged()


class Table:
    """SourceRows of a source that are to be read, all of them or a selection. `template` makes captions of labels."""

    def __init__(self, rows: SourceRows, template: Template | None = None, numbers: Sequence[int] | None = None):
        self._rows, self._template = rows, template
        self._numbers = range(len(rows)) if numbers is None else numbers
        made = [template.column] if template is not None else []
        self.columns = list(dict.fromkeys([*rows.columns, *made]))
        self.text_columns = list(dict.fromkeys([*rows.text_columns, *made]))
        self.is_streamed = rows.is_streamed

    def __len__(self) -> int:
        return len(self._numbers)

    def select(self, rows: Sequence[int]) -> Table:
        """These rows alone, in this order."""
        numbers = self._numbers
        # the first rows of a range are a range, which takes no memory
        chosen = numbers[: len(rows)] if rows == range(len(rows)) else [numbers[row] for row in rows]
        return Table(self._rows, self._template, chosen)

    def number(self, row: int) -> int:
        """Which row of the whole split it is, from 0, whatever was selected since."""
        return self._numbers[row]

    def id(self, row: int) -> str:
        """The row's path or key: unique, and the same in every process and on every machine."""
        return self._rows.id(self._numbers[row])

    def file(self, row: int) -> str | None:
        """The file that a row's picture lies in, relative to the source, if it lies in one."""
        return self._rows.file(self._numbers[row])

    def fault(self, row: int) -> str | None:
        """Why a row cannot be used, whatever is read of it."""
        return self._rows.fault(self._numbers[row])

    def text(self, row: int, column: str) -> Any:
        """A cell of any column but the pictures'. Raises UserError where its file cannot be read."""
        if self._template is None or column != self._template.column:
            return self._rows.text(self._numbers[row], column)
        return self._template.captions(self._rows.text(self._numbers[row], self._template.label_column))

    def picture(self, row: int, column: str) -> bytes | Path | None:
        """The row's encoded picture or its path, None where there is none; from any thread or forked process.

        Raises UserError for a column of no pictures, and for a tar or a stream that can no longer be read.
        """
        return self._rows.picture(self._numbers[row], column)

    def pictures(self, column: str) -> Iterator[bytes | Path | None]:
        """`picture` of every row in order."""
        return (self.picture(row, column) for row in range(len(self)))

    @property
    def weights(self) -> np.ndarray | None:
        """(N,) float64: how often each row is to be drawn, 1 being as in a plain concatenation; None: all alike."""
        weights = self._rows.weights()
        return None if weights is None else weights[np.asarray(self._numbers)]

    @property
    def sources(self) -> list[str] | None:
        """Of a mixture, the name of each row's source."""
        names = [self._rows.source_of(number) for number in self._numbers[:1]]
        return None if names in ([], [None]) else [str(self._rows.source_of(number)) for number in self._numbers]

    def source_state(self) -> str:
        """SHA-256, in hex, of what identifies the rows' content without reading it, for the key of a cache: paths,
        sizes and times of change of the files when the source was opened, the fingerprint of `datasets`, and which
        rows were selected."""
        digest = hashlib.sha256(self._rows.state().encode())
        if self._numbers != range(len(self._rows)):
            digest.update(np.asarray(self._numbers, dtype=np.int64).tobytes())
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """Raises UserError, naming the files, where one changed since the source was opened: what was read may be of
        two versions."""
        self._rows.check_unchanged()
