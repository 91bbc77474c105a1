"""Rows that cannot be used: named, counted by reason, and refused where they are too many."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sd_mini.data.metadata import some
from sd_mini.data.table import Table
from sd_mini.errors import UserError
from sd_mini.remarks import remark

if TYPE_CHECKING:
    from sd_mini.data.captioned import DataConfig

_REASONS = 5  # that a refusal names
_FEW = 5  # bad rows that are named one by one


class BadRows(UserError):
    """Rows that cannot be used."""


@dataclass(frozen=True)
class Rejected:
    """A row that is left out: the part of the data (`data`, `valid`), its source and split, its id and why."""

    part: str
    source: str
    id: str
    reason: str


def check_faults(table: Table, config: DataConfig, part: str, faults: dict[int, str]) -> None:
    """A remark on the rows that are left out. Raises BadRows where they are too many."""
    share, all_of_them = len(faults) / len(table), len(faults) == len(table)
    if share > config.max_bad or all_of_them:
        raise BadRows(f"{part}: {_named(table, config, part, faults)}")
    remark(
        f"{part}: left out {len(faults):,} of {len(table):,} rows of {config.source!r}, which cannot be used: "
        f"{reasons_of(table, faults)}"
    )


def _named(table: Table, config: DataConfig, part: str, faults: dict[int, str]) -> str:
    """Bad rows in words: each one where they are few, else the most common reasons."""
    allowed = f" ({part}.max_bad allows {config.max_bad:.2%})" if config.max_bad else ""
    files = {row: f" ({file})" if (file := table.file(row)) is not None else "" for row in faults}
    if len(faults) == 1:
        ((row, fault),) = faults.items()
        return f"row {table.number(row)} of {config.source!r}{files[row]}: {fault}"
    if len(faults) <= _FEW or not config.max_bad:
        what = some([f"row {table.number(row)}{files[row]}: {faults[row]}" for row in sorted(faults)])
    else:
        what = reasons_of(table, faults)
    return f"{len(faults):,} of {len(table):,} rows of {config.source!r} cannot be used{allowed}: {what}"


def reasons_of(table: Table, faults: dict[int, str]) -> str:
    """The most common reasons, each with its number of rows and the first of them."""
    kinds = {row: _kind(faults[row]) for row in sorted(faults)}
    first = {kind: row for row, kind in reversed(kinds.items())}
    parts = [
        f"{number:,} x {faults[first[kind]]} (row {table.number(first[kind])}, {table.id(first[kind])})"
        for kind, number in Counter(kinds.values()).most_common(_REASONS)
    ]
    more = len(set(kinds.values())) - len(parts)
    return "; ".join(parts) + (f"; and {more} more" if more > 0 else "")


def _kind(fault: str) -> str:
    """A reason without what differs from row to row: the paths, the quoted texts, the numbers."""
    return re.sub(r"\S*[/\\]\S*|'[^']*'|\"[^\"]*\"|\d[\d,.]*", "_", fault)
