"""What lies beside pictures and says what they show: metadata.jsonl, .csv, .tsv or .parquet, a row a picture."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sd_mini.errors import UserError
from sd_mini.texts import read_lines, read_text, shown

FILE_NAME = "file_name"
_NAMED = 5  # faults that a message names
_LONGEST = 2**31 - 1  # characters of a cell: as many as a C long holds everywhere; csv's own limit is 131,072


@dataclass(frozen=True)
class MetadataRow:
    """A picture that metadata lists."""

    file_name: str
    """its path, relative to the metadata's own folder"""
    fields: dict[str, Any]
    """the other columns"""
    place: str
    """where it stands: "line 3 of set/metadata.jsonl\""""
    fault: str | None = None
    """why it cannot be used; `file_name` is then its place, "metadata.jsonl: line 3\""""


def some(things: list[str], joint: str = "; ") -> str:
    """A list for a message: the first five, and how many more there are."""
    more = f"{joint}and {len(things) - _NAMED:,} more" if len(things) > _NAMED else ""
    return joint.join(things[:_NAMED]) + more


def is_metadata(path: Path) -> bool:
    stem, suffix = os.path.splitext(path.name.lower())
    return stem == "metadata" and suffix in _READERS


def read_metadata(path: Path) -> list[MetadataRow]:
    """Every row of a metadata file.

    Raises UserError for a file that cannot be read, has two columns of one name, or no row that names a picture.
    """
    rows = []
    for place, fields in read_table(path):
        if not isinstance(fields, Fault):
            name = fields.get(FILE_NAME)
            if isinstance(name, str) and name.strip():
                rest = {key: value for key, value in fields.items() if key != FILE_NAME}
                rows.append(MetadataRow(name, rest, f"{place} of {path}"))
                continue
            there = f"has {shown(name)} there" if FILE_NAME in fields else f"has {', '.join(fields) or 'nothing'}"
            fields = Fault(
                f"expected a column {FILE_NAME!r} with the path of a picture, relative to this folder; {place} {there}"
            )
        rows.append(MetadataRow(f"{path.name}: {place}", {}, f"{place} of {path}", fields))
    check_any_good(path, [row.fault for row in rows])
    return rows


class Fault(str):
    """Instead of a row's fields: why they cannot be read."""


def neighbours_split(splits: Sequence[str | None]) -> list[str | None]:
    """The split of each row in order; a row that cannot be read, None, is of that of the row before it, or the next."""
    known, found = next((split for split in splits if split is not None), None), []
    for split in splits:
        known = known if split is None else split
        found.append(known)
    return found


def check_any_good(path: Path, faults: Sequence[str | None]) -> None:
    """Raises UserError where no row of a file can be used, which says more of the file than of its rows."""
    if faults and None not in faults:
        raise UserError(f"{path}: {some([fault for fault in faults if fault is not None])}")


def read_table(path: Path) -> Iterator[tuple[str, Mapping[str, Any] | Fault]]:
    """Each row of a .jsonl, .csv, .tsv or .parquet file, with its place: "line 3". Raises UserError as said above."""
    return _READERS[path.suffix.lower()](path)


def _jsonl(path: Path) -> Iterator[tuple[str, Mapping[str, Any] | Fault]]:
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=partial(_json_object, f"{path}: line {number}"))
        except UserError:
            raise
        except (ValueError, RecursionError):
            row = None
        example = '{"file_name": ..., "text": ...}'
        fault = f"line {number} ({shown(line)}): no JSON object; expected lines such as {example}"
        yield f"line {number}", row if isinstance(row, dict) else Fault(fault)


def _json_object(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _check_names(where, (name for name, _ in pairs))
    return dict(pairs)


def _check_names(where: str, names: Iterable[str]) -> None:
    """Raises UserError for columns of one name, of which only one could be read. Spreadsheets leave nameless ones."""
    twice = [repr(name) for name, number in Counter(names).items() if name and number > 1]
    if twice:
        raise UserError(f"{where} has {some(twice, ', ')} more than once; give each column a name of its own")


def _delimited(delimiter: str) -> Callable[[Path], Iterator[tuple[str, Mapping[str, Any] | Fault]]]:
    def rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any] | Fault]]:
        # ends of lines are left as they are: within quotes they belong to the text
        reader = csv.DictReader(_kept_ends(read_text(path)), delimiter=delimiter, strict=True)
        usual = csv.field_size_limit(_LONGEST)
        try:
            names = reader.fieldnames or ()
            _check_names(f"{path}: the first line", names)
            for row in reader:
                place = f"line {reader.line_num}"
                fault = (
                    f"{place} has another number of fields than the first line, which has {len(names)}; put quotes "
                    "around texts that hold the delimiter"
                )
                is_whole = None not in row and None not in row.values()  # else too many fields, or too few
                yield place, row if is_whole else Fault(fault)
        except csv.Error as error:
            raise UserError(f"{path}: line {reader.line_num} is not readable as CSV: {error}") from None
        finally:
            csv.field_size_limit(usual)

    return rows


def _kept_ends(text: str) -> Iterator[str]:
    *lines, last = text.split("\n")
    yield from (f"{line}\n" for line in lines)
    if last:
        yield last


def _parquet(path: Path) -> Iterator[tuple[str, Mapping[str, Any] | Fault]]:
    try:
        _check_names(f"{path}: the table", pq.read_schema(path).names)
        rows = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as parquet: {' '.join(str(error).split())}") from None
    yield from ((f"row {number}", row) for number, row in enumerate(rows))


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Mapping[str, Any] | Fault]]]] = {
    ".jsonl": _jsonl,
    ".csv": _delimited(","),
    ".tsv": _delimited("\t"),
    ".parquet": _parquet,
}
