"""Rows of a table => captions and square pictures; rows that cannot be used are left out by name, or refused."""

from __future__ import annotations

import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from sd_mini import images
from sd_mini.data import cache
from sd_mini.data.arrays import Pictures, taken
from sd_mini.data.metadata import some
from sd_mini.data.near import is_near, near_pairs, picture_hashes, uniform_of
from sd_mini.data.table import Table
from sd_mini.errors import UserError
from sd_mini.memory import check_room
from sd_mini.remarks import remark
from sd_mini.texts import check_text

if TYPE_CHECKING:
    from sd_mini.data.captioned import DataConfig

_DECODER = 1  # part of the cache's key: raise it when other pixels come of the same bytes
_CHUNK = 2**25  # bytes of decoded pictures that are written at a time
_REASONS = 5  # that a refusal names
_FEW = 5  # bad rows that are named one by one


class BadRows(UserError):
    """Rows that cannot be used."""


@dataclass(frozen=True)
class Rejected:
    """A row that is left out: the part of the data (`data`, `valid`), its source, its id and why."""

    part: str
    source: str
    id: str
    reason: str


@dataclass(frozen=True)
class ReadRows:
    """N rows that can be used: `pictures` (N, 3, R, R) uint8, `captions`, and `hashes` (N, 2) uint64 (`near`).

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
        captions = _captions(table, config, part, faults)
    pictures, is_read, hashes = _decoded(table, config, part, folder)
    for row in np.flatnonzero(~is_read).tolist():
        faults.setdefault(row, _fault_of_picture(table, config, row))
    rejected = [Rejected(part, str(config.source), table.id(row), faults[row]) for row in sorted(faults)]
    weights, sources = table.weights, table.sources
    if faults:
        _check_faults(table, config, part, faults)
        kept = np.array([row for row in range(len(table)) if row not in faults])
        pictures, captions, hashes = taken(pictures, kept), [captions[row] for row in kept], hashes[kept]
        weights = None if weights is None else weights[kept]
        sources = None if sources is None else [sources[row] for row in kept]
    return ReadRows(pictures, captions, hashes, rejected, weights, sources)


def _check_faults(table: Table, config: DataConfig, part: str, faults: dict[int, str]) -> None:
    """A remark on the rows that are left out. Raises BadRows where they are too many."""
    share, all_of_them = len(faults) / len(table), len(faults) == len(table)
    if share > config.max_bad or all_of_them:
        raise BadRows(f"{part}: {_named(table, config, part, faults)}")
    remark(
        f"{part}: left out {len(faults):,} of {len(table):,} rows of {config.source!r}, which cannot be used: "
        f"{_reasons(table, faults)}"
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
        what = _reasons(table, faults)
    return f"{len(faults):,} of {len(table):,} rows of {config.source!r} cannot be used{allowed}: {what}"


def _reasons(table: Table, faults: dict[int, str]) -> str:
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


def _decoded(
    table: Table, config: DataConfig, part: str, folder: Path | None
) -> tuple[Pictures, np.ndarray, np.ndarray]:
    """Pictures (N, 3, R, R) uint8, which of them could be decoded (N,) bool, and their hashes (N, 2) uint64."""
    side, count = config.resolution, len(table)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    chunk = max(1, min(256, _CHUNK // (3 * side * side)))

    def encode_rows(rows: slice) -> cache.Arrays:
        with ThreadPoolExecutor(threads) as pool:  # Pillow decodes and resizes without holding Python's lock
            read = list(pool.map(lambda row: _read_picture(table, config, row), range(rows.start, rows.stop)))
        blank = np.zeros((3, side, side), np.uint8), np.zeros(2, np.uint64)
        pictures, hashes = zip(*(blank if pair is None else pair for pair in read), strict=True)
        is_read = np.array([pair is not None for pair in read])
        return {"pictures": np.stack(pictures), "is_read": is_read, "hashes": np.stack(hashes)}

    if folder is None:
        check_room(part, count, side)
        steps = tqdm(range(0, count, chunk), desc="decoding pictures", delay=2)
        pieces = [encode_rows(slice(start, min(start + chunk, count))) for start in steps]
        arrays = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
        return arrays["pictures"], arrays["is_read"], arrays["hashes"]
    key = {
        "source": table.source_state(),
        "column": config.image_column,
        "resolution": side,
        "background": config.background,
        "decoder": _DECODER,
    }
    stored = cache.encode(folder, key, count, encode_rows, f"{part}: pictures", chunk=chunk)
    table.check_unchanged()
    return stored["pictures"], stored["is_read"][:], stored["hashes"][:]


def _read_picture(table: Table, config: DataConfig, row: int) -> tuple[np.ndarray, np.ndarray] | None:
    """A row's picture at the training size and its hashes; None where it cannot be decoded."""
    source = table.picture(row, config.image_column)
    try:
        picture = None if source is None else images.decode(source, config.background)
    except UserError:  # why, is asked again of the few rows that this happens to
        picture = None
    return None if picture is None else (images.fit(picture, config.resolution), picture_hashes(picture))


def _fault_of_picture(table: Table, config: DataConfig, row: int) -> str:
    """Why a row's picture cannot be decoded."""
    source = table.picture(row, config.image_column)
    if source is None:
        return f"no picture in column {config.image_column!r}; leave the row out"
    try:
        images.decode(source, config.background)
    except UserError as error:
        return str(error)
    return "could not be decoded when the cache was written, and can be now; delete the run's cache of pictures"


def _captions(table: Table, config: DataConfig, part: str, faults: dict[int, str]) -> list[list[str]]:
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


def sides(read: ReadRows, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers to train on, and those held out; of the latter without near-duplicates of the former.

    Each row's side is a function of its own picture alone, so that no row changes sides when others come. Hashes of
    near-duplicates may fall on both sides: those held-out rows belong to neither.
    """
    is_held_out = uniform_of(read.hashes) < share
    own, held_out = np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
    near = {
        m
        for m, n, is_mirrored in near_pairs(read.hashes[held_out], read.hashes[own])
        if is_near(read.pictures[int(held_out[m])], read.pictures[int(own[n])], is_mirrored)
    }
    if near:
        remark(
            f"valid: {len(near):,} of {len(held_out):,} held-out rows show what training rows show, and are not used"
        )
    return own, np.delete(held_out, sorted(near))
