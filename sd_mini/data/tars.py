"""WebDataset tars: KEY.jpg beside KEY.txt or KEY.json in one tar, a folder of tars, or a pattern with braces."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd_mini.data.file_states import FileStates, check_unique, relative_id
from sd_mini.data.folder import IMAGE, TEXT, caption_lines, list_pictures
from sd_mini.data.metadata import some
from sd_mini.data.parquet import shard_splits
from sd_mini.data.splits import TRAIN, Part, asked_splits
from sd_mini.data.table import SourceRows
from sd_mini.data.tar_index import Member, Tar
from sd_mini.errors import UserError
from sd_mini.images import picture_suffixes
from sd_mini.progress import progress
from sd_mini.remarks import remark
from sd_mini.texts import shown

if TYPE_CHECKING:
    from sd_mini.data.captioned import DataConfig

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")
_CAPTION = "caption"  # the field of img2dataset's .json
_SAMPLED = 100  # .json members that are read for the names of their fields


@dataclass(frozen=True, slots=True)
class Sample:
    """The members of one key."""

    tar: Tar
    key: str
    members: dict[str, Member]
    """By what follows the key and a dot, in lower case: "jpg", "txt", "json"."""

    def picture_endings(self) -> list[str]:
        return [ending for ending in self.members if f".{ending}" in picture_suffixes()]

    def content(self, ending: str) -> bytes:
        return self.tar.read(self.members[ending])

    def fields(self) -> dict[str, Any]:
        """The fields of its .json. Raises UserError for what is no JSON object."""
        if "json" not in self.members:
            return {}
        content = self.content("json")
        try:
            fields = json.loads(content)
        except (ValueError, RecursionError):
            fields = None
        if not isinstance(fields, dict):
            raise UserError(f"{self.members['json'].path} holds {shown(content[:100])}, expected a JSON object")
        return fields


class TarRows(SourceRows):
    """The samples of tars that hold a picture."""

    def __init__(self, samples: list[Sample], config: DataConfig, files: FileStates):
        self._samples, self.files = samples, files
        self._image_column, self._text_column = config.image_column, config.text_column
        self._names = {sample.tar: relative_id(sample.tar.path, files.root) for sample in samples}
        check_unique(map(self.id, range(len(samples))), str(files.root))
        described = islice((sample for sample in samples if "json" in sample.members), _SAMPLED)
        fields = _typical_fields(described)
        texts = [TEXT] if any("txt" in sample.members for sample in samples) else []
        texts += [name for name, value in fields.items() if isinstance(value, str | list)]
        if _CAPTION in fields:  # as img2dataset writes it
            texts.append(TEXT)
        self.text_columns = list(dict.fromkeys(texts))
        pictures = dict.fromkeys(ending for sample in samples for ending in sample.picture_endings())
        self.columns = list(dict.fromkeys([IMAGE, *pictures, *self.text_columns, *fields]))

    def __len__(self) -> int:
        return len(self._samples)

    def id(self, row: int) -> str:
        return f"{self._names[self._samples[row].tar]}/{self._samples[row].key}"

    def file(self, row: int) -> str | None:
        return self.id(row)

    def fault(self, row: int) -> str | None:
        endings = self._samples[row].picture_endings()
        if self._image_column != IMAGE or len(endings) < 2:
            return None
        return f"it has {len(endings)} pictures, .{', .'.join(endings)}; name one as the image_column, as {endings[0]}"

    def text(self, row: int, column: str) -> Any:
        """The column of KEY.json, else, of captions, KEY.txt as `text`, else the field `caption` of KEY.json."""
        sample = self._samples[row]
        if column not in (self._text_column, TEXT):
            try:
                return sample.fields().get(column)
            except UserError:  # which the row's caption is refused for
                return None
        fields = sample.fields()
        if column in fields:
            return fields[column]
        if column == TEXT and "txt" in sample.members:
            try:
                return caption_lines(sample.content("txt").decode("utf-8-sig").split("\n"))
            except UnicodeDecodeError as error:
                raise UserError(f"{sample.members['txt'].path}: is not UTF-8 (byte {error.start})") from None
        if column == TEXT and _CAPTION in fields:
            return fields[_CAPTION]
        raise UserError(f"it has no {column!r}, neither in a .json nor in a .txt, as others have")

    def picture(self, row: int, column: str) -> bytes | None:
        sample = self._samples[row]
        if column in sample.members:
            return sample.content(column)
        return sample.content(sample.picture_endings()[0]) if column == IMAGE else None


def _typical_fields(samples: Iterator[Sample]) -> dict[str, Any]:
    """The fields of the first samples, each with a value; a .json that cannot be read is its row's fault."""
    fields: dict[str, Any] = {}
    for sample in samples:
        try:
            fields |= {name: value for name, value in sample.fields().items() if value is not None}
        except UserError:
            continue
    return fields


def is_tars(source: str, config: DataConfig) -> bool:
    if os.path.isdir(source):
        return bool(shard_splits(Path(source), ".tar")) and not list_pictures(Path(source))
    lower = source.lower()
    return lower.startswith("pipe:") or lower.endswith((".tar", *_COMPRESSED))


def open_tars(source: str, config: DataConfig, part: Part) -> TarRows:
    if source.lower().startswith("pipe:"):
        raise UserError(f"{source!r} would run a command; expected the path of tars on a disk")
    if source.lower().endswith(_COMPRESSED):
        raise UserError(f"{source!r} is compressed, so that no row can be read alone; unpack it to a .tar")
    root, splits = _tar_splits(source)
    paths = [path for name in asked_splits(config, part, splits) for path in splits[name]]
    files = FileStates.of(root, paths)
    samples, left_out = [], 0
    for path in progress(paths, desc="listing tars", delay=2):
        complete, others = _samples(Tar(path))
        samples += complete
        left_out += others
    if left_out:
        remark(f"{part}.source: {source!r}: left out {left_out:,} of the tars' files, whose keys have no picture")
    return TarRows(samples, config, files)


def _tar_splits(source: str) -> tuple[Path, dict[str, list[Path]]]:
    """The folder that ids are relative to, and the tars by split; those of a pattern are TRAIN."""
    if os.path.exists(source):
        path = Path(source)
        return (path if path.is_dir() else path.parent), shard_splits(path, ".tar")
    paths = [Path(name) for name in expand_braces(source)]
    missing = [str(one) for one in paths if not one.is_file()]
    if missing:
        raise UserError(f"{source!r}: no such file: {some(missing, ', ')}" if len(paths) > 1 else _no_file(source))
    twice = sorted({str(one) for one in paths if paths.count(one) > 1})
    if twice:
        raise UserError(f"{source!r} names {some(twice, ', ')} twice")
    fixed = Path(source[: source.index("{")] + "-").parent  # the folders before the first brace
    return fixed, {TRAIN: paths}


def _no_file(source: str) -> str:
    return f"{source!r}: no such file or folder; mend the path, or give 'shapes'"


def expand_braces(pattern: str) -> list[str]:
    """ "a-{08..10}.tar" => a-08.tar, a-09.tar, a-10.tar; "{a,b}.tar" => a.tar, b.tar."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    first, last, names = match.groups()
    if names is not None:
        middles = names.split(",")
    else:
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        middles = [f"{number:0{width}}" for number in range(int(first), int(last) + 1)]
    tails = expand_braces(pattern[match.end() :])
    return [f"{pattern[: match.start()]}{middle}{tail}" for middle in middles for tail in tails]


def _samples(tar: Tar) -> tuple[list[Sample], int]:
    """The samples of a tar that have a picture, in their order in it, and how many other members there are."""
    groups: dict[str, dict[str, Member]] = {}
    for member in tar.members():
        folder, _, name = member.path.rpartition("/")
        # the key ends at the first dot of the file's own name, as in the webdataset library
        stem, _, ending = name.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        members = groups.setdefault(key, {})
        if members.setdefault(ending.lower(), member) is not member:
            raise UserError(f"{tar.path}: holds {key}.{ending.lower()} twice; write the tar anew with one of them")
    samples = [Sample(tar, key, members) for key, members in groups.items()]
    complete = [sample for sample in samples if sample.picture_endings()]
    return complete, sum(len(sample.members) for sample in samples if not sample.picture_endings())
