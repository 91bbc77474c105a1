"""Several sources as one, each row drawn as often as its source's weight says."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, model_serializer

from sd_mini.config import Config
from sd_mini.data.file_states import check_unique
from sd_mini.data.splits import FieldError, Part
from sd_mini.data.table import SourceRows, Table
from sd_mini.data.template import check_template
from sd_mini.errors import UserError

if TYPE_CHECKING:
    from sd_mini.data.captioned import DataConfig


class WeightedSource(Config):
    """A source of a mixture. Fields that are left out are those of the whole."""

    source: str
    """As `data.source`, but for "shapes"."""
    weight: float = Field(default=1, gt=0, allow_inf_nan=False)
    """How often a row of it is drawn, 1 being as often as in a plain concatenation."""
    split: str = "train"
    count: int | None = Field(default=None, ge=1)
    image_column: str = "image"
    text_column: str | None = "text"
    aliases_column: str | None = None
    template: Annotated[str | None, AfterValidator(check_template)] = None
    streaming: bool = False

    @model_serializer(mode="wrap")
    def _given(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What was said: a field that is written is no longer that of the whole."""
        return {name: value for name, value in serialize(self).items() if name in self.model_fields_set}

    def __repr__(self) -> str:
        return f"{{source: {self.source!r}, weight: {self.weight:g}}}"

    def config(self, whole: DataConfig) -> DataConfig:
        own = {name: getattr(self, name) for name in self.model_fields_set - {"weight"}}
        return whole.model_copy(update={"count": None, **own})


class MixedRows(SourceRows):
    """The rows of several tables, one after another, under the column names of the whole."""

    def __init__(self, whole: DataConfig, configs: list[DataConfig], tables: list[Table], weights: list[float]):
        self._configs, self._tables, self._weights = configs, tables, weights
        self._ends = list(accumulate(len(table) for table in tables))
        self._names = _names(configs)
        self._fields = {"image_column": whole.image_column}
        for field in ("text_column", "aliases_column"):
            own = getattr(whole, field)
            if own is not None and any(self._has(i, field) for i in range(len(tables))):
                self._fields[field] = own
        self.columns = list(dict.fromkeys(self._fields.values()))
        self.text_columns = [name for name in self.columns if name != whole.image_column]
        self.is_streamed = any(table.is_streamed for table in tables)

    def _has(self, source: int, field: str) -> bool:
        return getattr(self._configs[source], field) in self._tables[source].columns

    def __len__(self) -> int:
        return self._ends[-1]

    def _place(self, row: int) -> tuple[int, int]:
        """A row of the whole => its source, and its row there."""
        source = bisect_right(self._ends, row)
        return source, row - (self._ends[source - 1] if source else 0)

    def id(self, row: int) -> str:
        source, inner = self._place(row)
        return f"{self._names[source]}/{self._tables[source].id(inner)}"

    def file(self, row: int) -> str | None:
        return self.id(row)

    def source_of(self, row: int) -> str:
        return self._names[self._place(row)[0]]

    def fault(self, row: int) -> str | None:
        source, inner = self._place(row)
        return self._tables[source].fault(inner)

    def text(self, row: int, column: str) -> Any:
        source, inner = self._place(row)
        field = next(field for field, name in self._fields.items() if name == column)
        if self._has(source, field):
            return self._tables[source].text(inner, getattr(self._configs[source], field))
        if field == "aliases_column":
            return None
        own = self._tables[source]
        raise UserError(
            f"{self._names[source]} has no column {self._configs[source].text_column!r}; there are "
            f"{', '.join(own.columns)}: give its text_column"
        )

    def picture(self, row: int, column: str) -> bytes | Path | None:
        source, inner = self._place(row)
        return self._tables[source].picture(inner, self._configs[source].image_column)

    def weights(self) -> np.ndarray:
        return np.repeat(np.asarray(self._weights, dtype=np.float64), [len(table) for table in self._tables])

    def state(self) -> str:
        digest = hashlib.sha256()
        for name, config, table in zip(self._names, self._configs, self._tables, strict=True):
            digest.update(f"{name}\n{config.image_column}\n{table.source_state()}\n".encode())
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        for table in self._tables:
            table.check_unchanged()


def _names(configs: Sequence[DataConfig]) -> list[str]:
    """What ids of each source begin with: its last name and split, the whole path where others are called so too."""
    short = [f"{Path(str(config.source)).name}:{config.split}" for config in configs]
    names = [f"{c.source}:{c.split}" if short.count(name) > 1 else name for c, name in zip(configs, short, strict=True)]
    check_unique(names, "a mixture")
    return names


def open_mixture(
    whole: DataConfig,
    sources: Sequence[WeightedSource],
    part: Part,
    open_one: Callable[[DataConfig, Part], Table],
) -> Table:
    """Raises UserError for an empty mixture or source, one given twice, and columns that a source does not have."""
    if not sources:
        raise FieldError(f"{part}.source: got an empty list; expected at least one {{source: ..., weight: ...}}")
    configs, tables = [source.config(whole) for source in sources], []
    for config in configs:
        if config.source == "shapes":
            raise FieldError(f"{part}.source: 'shapes' is drawn and not read, and cannot be mixed; use it alone")
        table = open_one(config, part)
        if config.image_column not in table.columns:
            raise FieldError(
                f"{part}.image_column: no column {config.image_column!r} in {config.source!r}; there are "
                f"{', '.join(table.columns)}"
            )
        tables.append(first_rows(table, config, part))
    return Table(MixedRows(whole, configs, tables, [source.weight for source in sources]))


def first_rows(table: Table, config: DataConfig, part: Part) -> Table:
    """The first `config.count` rows, or all. Raises FieldError for an empty table and for more rows than there are."""
    if not len(table):
        raise FieldError(f"{part}.source: {config.source!r} has no rows in split {config.split!r}; give a filled one")
    if config.count is None:
        return table
    if config.count > len(table):
        raise FieldError(
            f"{part}.count: got {config.count}, but {config.source!r} split {config.split!r} has {len(table)} rows;"
            " ask for fewer, or leave it out to read them all"
        )
    return table.select(range(config.count))
