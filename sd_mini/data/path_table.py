"""A .csv or .tsv file with a row a picture: its path, or its URL where img2dataset has downloaded it, and captions."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd_mini.data.downloads import Downloads, is_url
from sd_mini.data.file_states import FileStates, check_unique, relative_id
from sd_mini.data.folder import SPLIT, is_caption
from sd_mini.data.metadata import Fault, check_any_good, neighbours_split, read_table, some
from sd_mini.data.splits import TRAIN, FieldError, Part, asked_splits
from sd_mini.data.table import SourceRows
from sd_mini.data.tar_index import TarPicture
from sd_mini.errors import UserError
from sd_mini.images import is_picture

if TYPE_CHECKING:
    from sd_mini.data.captioned import DataConfig


@dataclass(frozen=True)
class PathRow:
    """A row of the file. `picture` is None where it has a fault."""

    id: str
    fields: Mapping[str, Any]
    picture: Path | TarPicture | None
    fault: str | None


class PathRows(SourceRows):
    def __init__(self, rows: Sequence[PathRow], columns: list[str], image_column: str, files: FileStates):
        self._rows, self.files = rows, files
        self.columns = [image_column, *columns]
        self.text_columns = [name for name in columns if any(is_caption(row.fields.get(name)) for row in rows)]
        check_unique((row.id for row in rows if row.fault is None), str(files.root))

    def __len__(self) -> int:
        return len(self._rows)

    def id(self, row: int) -> str:
        return self._rows[row].id

    def file(self, row: int) -> str | None:
        return self._rows[row].id

    def fault(self, row: int) -> str | None:
        return self._rows[row].fault

    def text(self, row: int, column: str) -> Any:
        return self._rows[row].fields.get(column)

    def picture(self, row: int, column: str) -> bytes | Path | None:
        picture = self._rows[row].picture
        return picture.read() if isinstance(picture, TarPicture) else picture


def is_path_table(source: str, config: DataConfig) -> bool:
    return os.path.isfile(source) and source.lower().endswith((".csv", ".tsv"))


def open_path_table(source: str, config: DataConfig, part: Part) -> PathRows:
    path = Path(source)
    states = FileStates.of(path.parent, [path])  # before it is read
    listed = list(read_table(path))
    table = [(place, fields) for place, fields in listed if not isinstance(fields, Fault)]
    if not table:
        check_any_good(path, [fields for _, fields in listed if isinstance(fields, Fault)])
    column = _picture_column(path, [fields for _, fields in table], config, part)
    names = list(table[0][1] if table else ())
    if SPLIT in names:
        _check_splits(path, table)
    splits = neighbours_split([None if isinstance(fields, Fault) else _split(fields) for _, fields in listed])
    known = sorted({split for split in splits if split is not None}) if SPLIT in names else [TRAIN, path.stem]
    chosen = asked_splits(config, part, known)
    kept = [one for one, split in zip(listed, splits, strict=True) if SPLIT not in names or split in chosen]
    rows = _located(path, kept, column)
    columns = [name for name in names if name and name != column]
    read = (row.picture.tar.path if isinstance(row.picture, TarPicture) else row.picture for row in rows)
    pictures = FileStates.of(path.parent, dict.fromkeys(one for one in read if one is not None))
    return PathRows(rows, columns, config.image_column, states.joined(pictures))


def _split(fields: Mapping[str, Any]) -> str:
    return str(fields.get(SPLIT) or "").strip()


def _check_splits(path: Path, table: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Raises UserError for rows that belong to no split: they would be in none, unseen."""
    blank = [place for place, fields in table if not _split(fields)]
    if blank:
        raise UserError(f"{path}: column {SPLIT!r} is blank in {some(blank, ', ')}; give each row its split")


def _picture_column(path: Path, rows: Sequence[Mapping[str, Any]], config: DataConfig, part: Part) -> str:
    """The column `image_column`, or the only one whose cells are paths of pictures or URLs."""
    names = [name for name in (rows[0] if rows else ()) if name]
    if config.image_column in names or not rows:
        return config.image_column
    filled = {name: [row[name] for row in rows if str(row[name] or "").strip()] for name in names}  # a blank is a fault
    fitting = [name for name, cells in filled.items() if cells and all(map(_is_place, cells))]
    # a table of img2dataset's kind may have the URL of the page beside that of the picture
    fitting = [name for name in fitting if all(map(is_picture, filled[name]))] or fitting
    if len(fitting) != 1:
        which = f"{', '.join(fitting)} hold them all" if fitting else "none of them does"
        raise FieldError(
            f"{part}.image_column: no column {config.image_column!r} in {str(path)!r}; expected one of "
            f"{', '.join(names)} to hold paths of pictures, and {which}; name it by {part}.image_column"
        )
    return fitting[0]


def _is_place(cell: Any) -> bool:
    return isinstance(cell, str) and bool(cell.strip()) and (is_url(cell) or is_picture(cell))


def _located(path: Path, table: Sequence[tuple[str, Mapping[str, Any] | Fault]], column: str) -> list[PathRow]:
    """Each row with the place of its picture. The second of two rows of one picture has a fault."""
    has_urls = any(is_url(fields[column]) for _, fields in table if not isinstance(fields, Fault))
    downloads = Downloads.beside(path, column) if has_urls else None
    rows, first = [], {}
    for place, fields in table:
        if isinstance(fields, Fault):
            rows.append(PathRow(f"{path.name}: {place}", {}, None, fields))
            continue
        cell, picture, fault = fields[column], None, None
        if not isinstance(cell, str) or not cell.strip():
            key, fault = f"{path.name}/{place}", f"{place} has no path of a picture in column {column!r}"
        elif downloads is not None and is_url(cell):
            key, picture, fault = downloads.find(cell)
        else:
            picture = path.parent / cell.strip()
            key = relative_id(picture, path.parent)
        if key in first and fault is None:
            fault = f"is listed twice, in {first[key]} and in {place} of {path}; put its captions into one row"
        first.setdefault(key, place)
        rows.append(PathRow(key, fields, picture, fault))
    return rows
