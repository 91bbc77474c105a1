"""Captioned pictures from anywhere: the shapes world, parquet, a folder of pictures, a saved or a hub data set."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import torch
from pydantic import Field
from tqdm import tqdm

from sd_mini import images, shapes
from sd_mini.config import Config
from sd_mini.errors import UserError
from sd_mini.texts import check_text

SHAPES_COUNT = 20_000  # scenes drawn when `count` is not given

_SHARD = re.compile(r"-\d{5}-of-\d{5}$")  # train-00000-of-00002.parquet is a part of the split train
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?$")
_NO_ROWS = datasets.Dataset.from_dict({})  # `datasets` itself fails on empty sources, with an unrelated message
_Level = Annotated[int, Field(ge=0, le=255)]


class DataConfig(Config):
    """Which pictures and captions to read, and at which size."""

    source: str = "shapes"
    """"shapes", a .parquet file, a folder (of parquet files, of pictures with metadata.jsonl or .csv, or written by
    `save_to_disk`), or the name of a data set on the Hugging Face hub."""
    split: str = "train"
    """One of the source's splits. A single file has "train", which is also called by the file's own name."""
    resolution: int = Field(default=64, ge=1)
    """Side of the square pictures, px: the short side is scaled to it and the centre kept."""
    count: int | None = Field(default=None, ge=1)
    """Shapes: how many scenes to draw (20000 if not given). Other sources: only the first rows."""
    seed: int = Field(default=0, ge=0)
    """Shapes: which scenes are drawn. Other sources do not use it."""
    image_column: str = "image"
    """The column of pictures: encoded bytes or paths."""
    text_column: str | None = "text"
    """The column of captions; none reads the pictures alone. A set without any text column is read alone too."""
    aliases_column: str | None = None
    """A column of lists of further captions of the same picture."""
    background: tuple[_Level, _Level, _Level] = images.WHITE
    """sRGB colour, 0 to 255, put behind transparent pictures."""


@dataclass(frozen=True, eq=False)
class CaptionedPictures:
    """N square pictures in memory, each with its captions."""

    pictures: np.ndarray = field(repr=False)
    """(N, 3, R, R) uint8 sRGB."""
    captions: list[list[str]] = field(repr=False)
    """Each picture's captions, the main one first, no two alike. All N lists are empty for pictures without text."""
    name: str
    """Where they came from, for reports: "shapes:train"."""
    scenes: list[shapes.Scene] | None = field(default=None, repr=False)
    """The scene graphs behind the pictures, for the shapes world only."""

    def __len__(self) -> int:
        return len(self.pictures)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of the pictures, their resolution and captions in order; the same wherever they lie."""
        header = json.dumps({"shape": self.pictures.shape, "captions": self.captions})
        digest = hashlib.sha256(header.encode())
        digest.update(np.ascontiguousarray(self.pictures))
        return digest.hexdigest()

    def pixels(self, ids: Sequence[int] | np.ndarray | torch.Tensor) -> torch.Tensor:
        """(B,) row numbers => (B, 3, R, R) float32 in [-1, 1]."""
        return images.to_pixels(self.pictures[np.asarray(ids, dtype=np.int64)])


def load(config: DataConfig) -> CaptionedPictures:
    """Read or draw the pictures that `config` names.

    Of a folder of pictures with metadata, those that the metadata lists are read.

    Raises ValueError, one line, for: an unknown split or column (naming those there are), a missing or unreadable
    source, an empty one, fewer rows than `count`, and the first row whose picture cannot be decoded or whose caption is
    not a text with something in it.
    """
    if config.source == "shapes":
        return _load_shapes(config)
    table = _open(config)
    if not len(table):
        raise UserError(f"data.source: {config.source!r} has no rows in split {config.split!r}; give a filled one")
    if config.count is not None:
        if config.count > len(table):
            raise UserError(
                f"data.count: got {config.count}, but {config.source!r} split {config.split!r} has {len(table)} rows;"
                " ask for fewer, or leave it out to read them all"
            )
        table = table.select(range(config.count))
    return CaptionedPictures(
        captions=_captions(table, config),  # first: a bad caption is found faster than a bad picture
        pictures=_pictures(table, config),
        name=f"{Path(config.source).stem if Path(config.source).exists() else config.source}:{config.split}",
    )


def load_captioned(train: DataConfig, valid: DataConfig) -> tuple[CaptionedPictures, CaptionedPictures]:
    """`load` for both parts of a training on captions. Raises ValueError also where one has no captions."""
    check_alike(train, valid)
    parts = load(train), load(valid)
    for name, part in zip(("data", "valid"), parts, strict=True):
        if not all(part.captions):
            raise UserError(
                f"{name}: {part.name} has no captions, expected a text for each picture; see {name}.text_column"
            )
    return parts


def check_alike(train: DataConfig, valid: DataConfig) -> None:
    """Raises ValueError where the pictures measured on could not stand for those trained on."""
    if train.resolution != valid.resolution:
        raise UserError(
            f"data.resolution is {train.resolution}, valid.resolution {valid.resolution}; give both the same"
        )
    if (train.source == "shapes") != (valid.source == "shapes"):
        raise UserError(
            f"data.source is {train.source!r}, valid.source {valid.source!r}; give both, from the same data"
        )


def unique_captions(captions: Iterable[Iterable[str]]) -> list[str]:
    """The captions of many pictures => each one once, in the order first seen."""
    return list(dict.fromkeys(caption for several in captions for caption in several))


def _load_shapes(config: DataConfig) -> CaptionedPictures:
    _check_split(config, shapes.SPLITS)
    count = SHAPES_COUNT if config.count is None else config.count
    scenes = shapes.sample_scenes(count, config.split, config.seed)
    return CaptionedPictures(
        pictures=shapes.draw_batch(scenes, config.resolution),
        captions=[shapes.captions(scene) for scene in scenes],
        name=f"shapes:{config.split}",
        scenes=scenes,
    )


def _check_split(config: DataConfig, known: Iterable[str]) -> None:
    known = list(known)
    if config.split not in known:
        raise UserError(f"data.split: {config.source!r} has no split {config.split!r}; it has {', '.join(known)}")


def _open(config: DataConfig) -> datasets.Dataset:
    """The rows of the asked split, pictures not yet decoded."""
    path = Path(config.source)
    if path.is_file() and path.suffix == ".parquet":
        return _open_parquet({"train": [path], _split_name(path): [path]}, config)
    if path.is_dir():
        return _open_folder(path, config)
    if path.exists():
        raise UserError(f"data.source: {config.source!r} is neither a folder nor a .parquet file; give one of these")
    if path.suffix == ".parquet" or not _HUB_NAME.fullmatch(config.source):
        raise UserError(f"data.source: {config.source!r}: no such file or folder; mend the path, or give 'shapes'")
    with _reading(f"{config.source!r}, which is no file or folder here, from the Hugging Face hub"):
        return datasets.load_dataset(config.source, split=config.split)


def _open_folder(path: Path, config: DataConfig) -> datasets.Dataset:
    """Written by `save_to_disk`, else parquet files (SPLIT.parquet, here or in data/), else pictures."""
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _open_saved(path, config)
    shards = sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))
    if shards:
        splits: dict[str, list[Path]] = {}
        for shard in shards:
            splits.setdefault(_split_name(shard), []).append(shard)
        return _open_parquet(splits, config)
    with _reading(f"{config.source!r} as a folder of pictures"):
        tables = datasets.load_dataset("imagefolder", data_dir=str(path))
    _check_split(config, tables)
    return tables[config.split]


def _open_saved(path: Path, config: DataConfig) -> datasets.Dataset:
    with _reading(repr(config.source)):
        if (path / "dataset_dict.json").exists():
            names = json.loads((path / "dataset_dict.json").read_text())["splits"]
            folders = {name: path / name for name in names}
        else:
            folders = {json.loads((path / "state.json").read_text())["_split"] or "train": path}
    _check_split(config, folders)
    folder = folders[config.split]
    with _reading(repr(config.source)):
        if not json.loads((folder / "state.json").read_text())["_data_files"]:
            return _NO_ROWS
        return datasets.load_from_disk(folder)


def _open_parquet(splits: dict[str, list[Path]], config: DataConfig) -> datasets.Dataset:
    _check_split(config, splits)
    files = splits[config.split]
    with _reading(repr(config.source)):
        if not sum(pq.read_metadata(file).num_rows for file in files):
            return _NO_ROWS
        return datasets.load_dataset("parquet", data_files=[str(file) for file in files], split="train")


def _split_name(path: Path) -> str:
    return _SHARD.sub("", path.stem)


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """The many ways in which `datasets` fails on a user's source => ValueError, one line."""
    try:
        yield
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = error
        if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
            reason = error.__cause__  # the outer text only says that something went wrong
        raise UserError(f"data.source: cannot read {what}: {' '.join(str(reason).split())}") from error


def _check_column(table: datasets.Dataset, field: str, column: str) -> None:
    if column not in table.column_names:
        raise UserError(f"data.{field}: no column {column!r}; there are {', '.join(table.column_names)}")


def _pictures(table: datasets.Dataset, config: DataConfig) -> np.ndarray:
    """Rows => (N, 3, R, R) uint8."""
    column = config.image_column
    _check_column(table, "image_column", column)
    with _reading(f"column {column!r} of {config.source!r} as pictures (it holds {table.features[column]})"):
        rows = table.select_columns(column).cast_column(column, datasets.Image(decode=False))  # `images` decodes
    pictures = np.empty((len(rows), 3, config.resolution, config.resolution), dtype=np.uint8)
    for i, row in enumerate(tqdm(rows, desc="decoding pictures", delay=2)):
        cell = row[column]
        if cell is None:
            raise UserError(f"row {i} of {config.source!r}: no picture in column {column!r}; leave the row out")
        try:
            picture = images.decode(cell["path"] if cell["bytes"] is None else cell["bytes"], config.background)
        except ValueError as error:
            raise UserError(f"row {i} of {config.source!r}: {error}") from error
        pictures[i] = images.fit(picture, config.resolution)
    return pictures


def _captions(table: datasets.Dataset, config: DataConfig) -> list[list[str]]:
    """Rows => each one's captions; all empty if the set is read for its pictures alone."""
    column, more = config.text_column, config.aliases_column
    if column is None or (column not in table.column_names and not _has_text(table, config.image_column)):
        if more is not None:
            raise UserError(f"data.aliases_column: got {more!r} without a text column; set data.text_column too")
        return [[] for _ in range(len(table))]
    _check_column(table, "text_column", column)
    if more is not None:
        _check_column(table, "aliases_column", more)
    texts = table[column][:]
    aliases = [None] * len(texts) if more is None else table[more][:]
    captions = []
    for i, (text, others) in enumerate(zip(texts, aliases, strict=True)):
        if others is not None and not isinstance(others, list):
            raise UserError(f"data.aliases_column: row {i} of {more!r} holds {others!r}, expected a list of texts")
        captions.append(_check_captions([text, *(others or [])], f"row {i} of {config.source!r}"))
    return captions


def _check_captions(captions: list[Any], where: str) -> list[str]:
    for caption in captions:
        check_text(caption, f"{where}: a caption")
    return list(dict.fromkeys(captions))


def _has_text(table: datasets.Dataset, image_column: str) -> bool:
    for name, feature in table.features.items():
        inner = getattr(feature, "feature", feature)  # lists of captions count too
        if name != image_column and getattr(inner, "dtype", None) in ("string", "large_string"):
            return True
    return False
