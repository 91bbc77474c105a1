"""A folder of pictures, listed by ourselves: the same rows in the same order on every machine.

Splits are top-level folders with a split's name, or the metadata's field `split`, never the names of files. Captions
are a column of metadata, or NAME.txt beside NAME.png, a line each.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd_mini.data.file_states import FileStates, check_unique, relative_id, relative_path
from sd_mini.data.metadata import MetadataRow, is_metadata, neighbours_split, read_metadata, some
from sd_mini.data.splits import TRAIN, Part, asked_splits, is_split
from sd_mini.data.table import SourceRows
from sd_mini.errors import UserError
from sd_mini.images import is_picture
from sd_mini.progress import progress
from sd_mini.remarks import remark
from sd_mini.texts import read_lines

if TYPE_CHECKING:
    from sd_mini.data.captioned import DataConfig

IMAGE, TEXT, SPLIT, LABEL = "image", "text", "split", "label"
_JUNK = {"__macosx", "thumbs.db", "desktop.ini", "$recycle.bin", "@eadir", "lost+found"}  # which systems leave behind


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none of the user's data: .ipynb_checkpoints, ._1.png, __MACOSX, Thumbs.db, ..."""
    return name.startswith(".") or name.lower() in _JUNK


def list_files(folder: Path) -> list[Path]:
    """Every file in and under `folder`, without hidden ones, sorted by path. Linked folders are followed."""
    found: list[Path] = []

    def visit(current: Path, above: tuple[Path, ...]) -> None:
        real = current.resolve()
        if real in above:  # a link back up, which has no end
            return
        with os.scandir(current) as entries:  # which tells folders from files without a look at each
            for entry in entries:
                if is_hidden(entry.name):
                    continue
                # a loop of links is no folder
                if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                    visit(current / entry.name, (*above, real))
                else:
                    found.append(current / entry.name)
        bar.update(len(found) - bar.n)

    try:
        with progress(desc="listing files", unit=" files", delay=2, leave=False) as bar:
            visit(folder, ())
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {(error.strerror or str(error)).lower()}") from None
    return sorted(found, key=path_key)


def list_pictures(folder: Path) -> list[Path]:
    return [path for path in list_files(folder) if is_picture(path)]


def path_key(path: Path | str) -> str:
    """A path as it is sorted and compared: absolute, and with accents in one spelling (macOS writes an accent as a
    character of its own, others do not)."""
    return unicodedata.normalize("NFC", os.path.abspath(path).replace(os.sep, "/"))


def read_listed(files: Sequence[Path]) -> Iterator[tuple[Path, MetadataRow, Path]]:
    """Each row of the metadata among `files`: the metadata's path, the row, and its picture's path, as it is among
    `files` or, where it is not, as the metadata has it.

    Raises UserError for metadata that cannot be read, and for two such files in one folder.
    """
    metadata = [path for path in files if is_metadata(path)]
    on_disk = {path_key(path): path for path in files} if metadata else {}
    for file in metadata:
        _check_alone(file, metadata)
        for row in read_metadata(file):
            path = file.parent / row.file_name
            yield file, row, on_disk.get(path_key(path), path)


@dataclass(frozen=True)
class PictureFile:
    """A picture of a folder, and what is said of it."""

    path: Path
    split: str | None
    """None: it lies beside the folders of the splits"""
    fields: dict[str, Any] = field(default_factory=dict)
    fault: str | None = None
    caption_file: Path | None = None
    """Read for `text` where `fields` has none."""
    is_listed: bool = False
    """Whether metadata lists it."""


class FolderRows(SourceRows):
    """The pictures of one split of a folder; `metadata` are the files that list them."""

    def __init__(self, folder: Path, rows: list[PictureFile], columns: list[str], texts: list[str], files: FileStates):
        self.folder, self.rows, self.columns, self.text_columns, self.files = folder, rows, columns, texts, files
        check_unique((self.id(i) for i, row in enumerate(rows) if row.fault is None), str(folder))

    def __len__(self) -> int:
        return len(self.rows)

    def id(self, row: int) -> str:
        return relative_id(self.rows[row].path, self.folder)

    def file(self, row: int) -> str | None:
        return os.path.relpath(self.rows[row].path, self.folder)

    def fault(self, row: int) -> str | None:
        return self.rows[row].fault

    def text(self, row: int, column: str) -> Any:
        own = self.rows[row]
        if column != TEXT or column in own.fields:
            return own.fields.get(column)
        if own.caption_file is None:
            no_file = f"there is no {os.path.splitext(own.path.name)[0]}.txt beside it"
            if own.is_listed:
                raise UserError(f"the metadata gives it no {TEXT!r}, and {no_file}")
            raise UserError(f"{no_file}, as there is beside others")
        return caption_lines(read_lines(own.caption_file))

    def picture(self, row: int, column: str) -> Path:
        return self.rows[row].path


def caption_lines(lines: Iterable[str]) -> str | list[str]:
    """Lines of a caption file => its captions, one a line; of one line, or none, a text."""
    filled = [line.strip() for line in lines if line.strip()]
    return filled if len(filled) > 1 else "".join(filled)


class PictureFolder:
    """What lies in a folder of pictures.

    Raises UserError where metadata cannot be read, and where a folder with a split's name may as well be a class.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.files = list_files(folder)
        self.pictures = [path for path in self.files if is_picture(path)]
        self.metadata = [path for path in self.files if is_metadata(path)]
        # 0.txt or 0.TXT; of both, the former, which sorts last
        self._texts = {_stem_key(path): path for path in self.files if path.name.lower().endswith(".txt")}
        self.split_folders = self._split_folders()
        self._states = FileStates.of(folder, self.metadata)  # before they are read
        self.listed = self._listed()

    def _top(self, path: Path) -> str | None:
        """The top-level folder that a path lies in."""
        top, below, _ = relative_path(path, self.folder).partition(os.sep)
        return top if below else None

    def _split_folders(self) -> set[str]:
        """The top-level folders whose names are splits."""
        tops = {top for path in [*self.pictures, *self.metadata] if (top := self._top(path)) is not None}
        names = {top for top in tops if is_split(top)}
        others = sorted(tops - names)
        if len(names) == 1 and others:
            (name,) = names
            raise UserError(
                f"{self.folder}: {name}/ may be a split or a class, as there are pictures in {some(others, ', ')} too; "
                "rename it, give it alone as the source, or put the others elsewhere"
            )
        return names

    def _split_of(self, path: Path) -> str | None:
        if not self.split_folders:
            return TRAIN
        top = self._top(path)
        return top if top in self.split_folders else None

    def _listed(self) -> list[PictureFile]:
        """The pictures that metadata lists, sorted by path. The second of two rows of one picture has a fault."""
        rows: list[PictureFile] = []
        first: dict[str, str] = {}
        listed = list(read_listed(self.files))
        splits = neighbours_split([self._split_of_row(*one) for one in listed])
        for (_, row, path), split in zip(listed, splits, strict=True):
            if row.fault is not None:
                rows.append(PictureFile(path, split, {}, row.fault, None, True))
                continue
            key, fields = path_key(path), row.fields
            fault = f"is listed twice, in {first[key]} and in {row.place}" if key in first else None
            first.setdefault(key, row.place)
            if SPLIT in fields:
                fault = fault or _split_fault(fields[SPLIT])
            beside = self._texts.get(_stem_key(path)) if TEXT not in fields else None
            rows.append(PictureFile(path, split, fields, fault, beside, True))
        return sorted(rows, key=lambda row: path_key(row.path))

    def _split_of_row(self, file: Path, row: MetadataRow, path: Path) -> str | None:
        """None: a row that cannot be read does not say."""
        if row.fault is not None:
            return self._split_of(file) if self.split_folders else None
        split = row.fields[SPLIT] if SPLIT in row.fields else self._split_of(file) or self._split_of(path)
        return split if isinstance(split, str) else TRAIN

    @cached_property
    def splits(self) -> set[str]:
        listed = {row.split for row in self.listed if row.split is not None}
        if self.split_folders:
            return listed | self.split_folders
        return listed or ({TRAIN} if self.files else set())

    def table(self, names: Sequence[str]) -> tuple[FolderRows, str]:
        """The pictures of these splits, and what is left out of what else lies there, in words."""
        listed = [row for row in self.listed if row.split in names]
        is_described = any(self._split_of(file) in (None, *names) or listed for file in self.metadata)
        rows = listed if is_described else self._plain(names)
        fields = list(dict.fromkeys(name for row in rows for name in row.fields))
        texts = [TEXT] if any(row.caption_file is not None for row in rows) else []
        if is_described:
            texts += [
                name for name in fields if name != SPLIT and any(is_caption(row.fields.get(name)) for row in rows)
            ]
        columns = [IMAGE, *(name for name in dict.fromkeys([*texts, *fields]) if name != IMAGE)]
        good = [row for row in rows if row.fault is None]
        read = [path for row in good for path in (row.path, row.caption_file) if path is not None]
        states = self._states.joined(FileStates.of(self.folder, read))
        table = FolderRows(self.folder, rows, columns, list(dict.fromkeys(texts)), states)
        return table, self._left_out(rows, names)

    def _plain(self, names: Sequence[str]) -> list[PictureFile]:
        """The pictures of these splits as they lie there, with their caption files, or the classes they lie in."""
        own = [path for path in self.pictures if self._split_of(path) in names]
        classes = {os.path.dirname(path) for path in own}
        is_classed = len(classes) > 1 and not classes & {
            str(self.folder),
            *(str(self.folder / name) for name in names),
        }
        rows = []
        for path in own:
            fields = {LABEL: path.parent.name} if is_classed else {}
            rows.append(PictureFile(path, None, fields, caption_file=self._texts.get(_stem_key(path))))
        return rows

    def _left_out(self, rows: list[PictureFile], names: Sequence[str]) -> str:
        known = [*self.listed, *rows]
        used = {row.path for row in known} | {row.caption_file for row in known} | set(self.metadata)
        outside = f"outside {', '.join(sorted(self.split_folders))}"
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for row in self.listed:
            if row.split is None:
                counts[outside][row.path.suffix] += 1
        for path in self.files:
            split = self._split_of(path)
            if path in used or split not in (None, *names):
                continue  # of another split, which counts it
            kind = ("not in the metadata" if split is not None else outside) if is_picture(path) else "no pictures"
            counts[kind][path.suffix] += 1
        total = sum(suffixes.total() for suffixes in counts.values())
        kinds = "; ".join(f"{kind}: {_numbers(suffixes)}" for kind, suffixes in sorted(counts.items()))
        return f"{total:,} {'files' if total > 1 else 'file'} ({kinds})" if total else ""


def _stem_key(path: Path) -> str:
    """What a picture and its caption file have in common."""
    return os.path.splitext(path_key(path))[0]


def _numbers(suffixes: Counter[str]) -> str:
    return ", ".join(f"{number:,} {suffix or 'without a suffix'}" for suffix, number in sorted(suffixes.items()))


def _check_alone(file: Path, metadata: list[Path]) -> None:
    same = [other.name for other in metadata if other.parent == file.parent]
    if len(same) > 1:
        raise UserError(f"{file.parent}: holds {' and '.join(same)}; keep one of them")


def _split_fault(value: object) -> str | None:
    if isinstance(value, str) and value.strip():
        return None
    return f"its field {SPLIT!r} is {value!r}, expected the name of a split"


def is_caption(value: Any) -> bool:
    """Whether a cell may be a caption; CSV has every number as a text."""
    if isinstance(value, list):
        return any(map(is_caption, value))
    try:
        float(value)
    except (TypeError, ValueError):
        return isinstance(value, str)
    return False


def is_folder(source: str, config: DataConfig) -> bool:
    return os.path.isdir(source)


def open_folder(source: str, config: DataConfig, part: Part) -> FolderRows:
    folder = PictureFolder(Path(source))
    if not folder.pictures and not folder.metadata:
        raise UserError(f"cannot read {source!r}: it holds no pictures, parquet files or tars")
    rows, left_out = folder.table(asked_splits(config, part, sorted(folder.splits)))
    if left_out:
        remark(f"{part}.source: {source!r}: left out {left_out}")
    return rows
