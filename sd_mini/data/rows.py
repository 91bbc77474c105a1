"""Rows of a table => captions and square pictures; rows that cannot be used are left out by name, or refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sd_mini.data.arrays import Pictures, taken
from sd_mini.data.decoding import decoded, fault_of_picture, remarks_on
from sd_mini.data.near import is_near, near_pairs, uniform_of
from sd_mini.data.rejected import Rejected, check_faults
from sd_mini.data.sources import source_name
from sd_mini.data.table import Table
from sd_mini.errors import UserError
from sd_mini.remarks import remark
from sd_mini.texts import check_text, shown

if TYPE_CHECKING:
    from sd_mini.data.captioned import DataConfig

_MANY = 100  # rows from which on remarks are made on their pictures; fewer can be seen at a glance


@dataclass(frozen=True)
class ReadRows:
    """N rows that can be used, those of one bucket together: `pictures` (N, 3, H, W) uint8, `captions`, and `hashes`
    (N, 2) uint64 (`near`).

    Of a mixture `weights` (N,) and the name of each row's source.
    """

    pictures: Pictures
    captions: list[list[str]]
    hashes: np.ndarray
    rejected: list[Rejected]
    weights: np.ndarray | None = None
    sources: list[str] | None = None


def read_rows(table: Table, config: DataConfig, part: str, pictures_only: bool, folder: Path | None = None) -> ReadRows:
    """The pictures of a table and each one's captions, none if `pictures_only`.

    Pictures are decoded once into the cache `folder`, in parallel, and stay on disk; without it they are in memory.
    Rows that cannot be used (pictures that cannot be decoded, captions that are no text) are left out with a remark.

    Raises UserError for a column that is not there and for more pictures than the disk or memory holds, before any is
    decoded; and BadRows for a larger share of rows that cannot be used than `config.max_bad`.
    """
    check_column(table, part, "image_column", config.image_column)
    faults = {row: fault for row in range(len(table)) if (fault := table.fault(row)) is not None}
    captions: list[list[str]] = [[] for _ in range(len(table))]
    if not pictures_only:
        captions = captions_of(table, config, part, faults)
    pictures, hashes, sizes, is_read, rows = decoded(table, config, part, folder)
    for row in rows[~is_read].tolist():
        faults.setdefault(row, fault_of_picture(table, config, row))
    rejected = [Rejected(part, source_name(config), table.id(row), faults[row]) for row in sorted(faults)]
    if faults:
        check_faults(table, config, part, faults)
        kept = np.flatnonzero([row not in faults for row in rows.tolist()])
        pictures, hashes, sizes, rows = taken(pictures, kept), hashes[kept], sizes[kept], rows[kept]
    captions = [captions[row] for row in rows]
    weights, sources = table.weights, table.sources
    weights = None if weights is None else weights[rows]
    sources = None if sources is None else [sources[row] for row in rows]
    for line in remarks_on(sizes, hashes, config) if len(sizes) >= _MANY else ():
        remark(f"{part}: {line}")
    return ReadRows(pictures, captions, hashes, rejected, weights, sources)


def why_no_captions(table: Table, config: DataConfig, part: str) -> str | None:
    """What a stage that needs captions will refuse this data for, as far as the columns tell."""
    column = config.text_column
    if column is None or column in table.columns:
        return None
    if not table.text_columns:
        return f"{part}: {config.source!r} has no captions"
    return f"{part}.text_column: {config.source!r} has no column {column!r}; there are {', '.join(table.columns)}"


def check_column(table: Table, part: str, field: str, column: str) -> None:
    if column not in table.columns:
        raise UserError(f"{part}.{field}: no column {column!r}; there are {', '.join(table.columns)}")


def captions_of(table: Table, config: DataConfig, part: str, faults: dict[int, str]) -> list[list[str]]:
    """Rows => each one's captions; all empty if the set is read for its pictures alone."""
    column, more = config.text_column, config.aliases_column
    other_texts = [name for name in table.text_columns if name != config.image_column]
    if column is None or (column not in table.columns and not other_texts):
        if more is not None:
            raise UserError(f"{part}.aliases_column: got {more!r} without a text column; set {part}.text_column too")
        return [[] for _ in range(len(table))]
    check_column(table, part, "text_column", column)
    if more is not None:
        check_column(table, part, "aliases_column", more)
    captions = []
    for row in range(len(table)):
        captions.append([])
        try:
            own = [*_listed(table.text(row, column)), *_aliases(table, row, more)]
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


def _aliases(table: Table, row: int, column: str | None) -> list[Any]:
    others = table.text(row, column) if column is not None else None
    if others is not None and not isinstance(others, list):
        raise UserError(f"column {column!r} of aliases holds {shown(others)}; expected a list of texts")
    return others or []


def sides(read: ReadRows, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers to train on, and those held out; of the latter without near-duplicates of the former.

    Each row's side is a function of its own picture alone, so that no row changes sides when others come. Hashes of
    near-duplicates may fall on both sides: those held-out rows belong to neither.
    """
    is_held_out = uniform_of(read.hashes) < share
    own, held_out = np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
    near: set[int] = set()
    for m, n, is_mirrored in near_pairs(read.hashes[held_out], read.hashes[own]):
        # the pixels decide; a row that is near one training row need not be compared with another
        if m not in near and is_near(read.pictures[int(held_out[m])], read.pictures[int(own[n])], is_mirrored):
            near.add(m)
    if near:
        remark(
            f"valid: {len(near):,} of {len(held_out):,} held-out rows show what training rows show, and are not used"
        )
    return own, np.delete(held_out, sorted(near))
