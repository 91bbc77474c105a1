"""Rows of a table => captions and square pictures, with everything that is wrong with them said at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from sd_mini import images
from sd_mini.data.metadata import some
from sd_mini.data.table import Table
from sd_mini.errors import UserError
from sd_mini.memory import check_room
from sd_mini.texts import check_text

if TYPE_CHECKING:
    from sd_mini.data.captioned import DataConfig


class BadRows(UserError):
    """Rows that cannot be used."""


def read_rows(table: Table, config: DataConfig, part: str, pictures_only: bool) -> tuple[np.ndarray, list[list[str]]]:
    """Pictures, (N, 3, R, R) uint8, and each one's captions, none if `pictures_only`.

    Raises UserError for a column that is not there and for more pictures than memory holds, before any is decoded; and
    BadRows, all rows together, for pictures that cannot be decoded and captions that are no text.
    """
    _check_column(table, part, "image_column", config.image_column)
    faults = {row: fault for row in range(len(table)) if (fault := table.fault(row)) is not None}
    captions: list[list[str]] = [[] for _ in range(len(table))]
    if not pictures_only:
        captions = _captions(table, config, part, faults)
    check_room(part, len(table), config.resolution)
    pictures = _pictures(table, config, faults)
    if faults:
        raise BadRows(f"{part}: {_said(table, config.source, faults)}")
    return pictures, captions


def _said(table: Table, source: object, faults: dict[int, str]) -> str:
    files = {row: f" ({file})" if (file := table.file(row)) is not None else "" for row in faults}
    if len(faults) == 1:
        ((row, fault),) = faults.items()
        return f"row {table.number(row)} of {source!r}{files[row]}: {fault}"
    named = some([f"row {table.number(row)}{files[row]}: {faults[row]}" for row in sorted(faults)])
    return f"{len(faults):,} of {len(table):,} rows of {source!r} cannot be used: {named}"


def why_no_captions(table: Table, config: DataConfig, part: str) -> str | None:
    """What a stage that needs captions will refuse this data for, as far as the columns tell."""
    column = config.text_column
    if column is None or column in table.columns:
        return None
    if not table.text_columns:
        return f"{part}: {config.source!r} has no captions"
    return f"{part}.text_column: {config.source!r} has no column {column!r}; there are {', '.join(table.columns)}"


def _check_column(table: Table, part: str, field: str, column: str) -> None:
    if column not in table.columns:
        raise UserError(f"{part}.{field}: no column {column!r}; there are {', '.join(table.columns)}")


def _pictures(table: Table, config: DataConfig, faults: dict[int, str]) -> np.ndarray:
    """Rows => (N, 3, R, R) uint8; those that cannot be decoded are left as they are, and added to `faults`."""
    pictures = np.empty((len(table), 3, config.resolution, config.resolution), dtype=np.uint8)
    rows = tqdm(table.pictures(config.image_column), total=len(table), desc="decoding pictures", delay=2)
    for i, source in enumerate(rows):
        if source is None:
            faults.setdefault(i, f"no picture in column {config.image_column!r}; leave the row out")
            continue
        try:
            picture = images.decode(source, config.background)
        except UserError as error:
            faults.setdefault(i, str(error))
        else:
            pictures[i] = images.fit(picture, config.resolution)
    return pictures


def _captions(table: Table, config: DataConfig, part: str, faults: dict[int, str]) -> list[list[str]]:
    """Rows => each one's captions; all empty if the set is read for its pictures alone."""
    column, more = config.text_column, config.aliases_column
    other_texts = [name for name in table.text_columns if name != config.image_column]
    if column is None or (column not in table.columns and not other_texts):
        if more is not None:
            raise UserError(f"{part}.aliases_column: got {more!r} without a text column; set {part}.text_column too")
        return [[] for _ in range(len(table))]
    _check_column(table, part, "text_column", column)
    if more is not None:
        _check_column(table, part, "aliases_column", more)
    aliases = [_aliases(table, part, row, more) for row in range(len(table))]
    captions = []
    for row, others in enumerate(aliases):
        captions.append([])
        try:
            own = [*_listed(table.text(row, column)), *others]
            for caption in own:
                check_text(caption, "a caption")
            captions[row] = list(dict.fromkeys(own))
        except UserError as error:
            faults.setdefault(row, str(error))
    return captions


def _listed(cell: Any) -> list[Any]:
    """A cell of captions: one, or a list of at least one."""
    if cell == []:
        raise UserError("its list of captions is empty; expected a text at least")
    return cell if isinstance(cell, list) else [cell]


def _aliases(table: Table, part: str, row: int, column: str | None) -> list[Any]:
    others = table.text(row, column) if column is not None else None
    if others is not None and not isinstance(others, list):
        raise UserError(
            f"{part}.aliases_column: row {table.number(row)} of {column!r} holds {others!r}, expected a list of texts"
        )
    return others or []
