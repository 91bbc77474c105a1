"""Captioned pictures from anywhere: the shapes world, parquet, a folder of pictures, a saved or a hub data set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field

from sd_mini import images, shapes
from sd_mini.config import Config
from sd_mini.data.rows import BadRows, read_rows, why_no_captions
from sd_mini.data.sources import Part, asked_splits, open_source, source_name
from sd_mini.data.table import Table
from sd_mini.errors import UserError
from sd_mini.memory import check_room
from sd_mini.remarks import remark

if TYPE_CHECKING:
    import torch

SHAPES_COUNT = 20_000  # scenes drawn when `count` is not given
HELD_OUT_MOST = 1_000  # rows of `valid` that a training scores when `count` is not given

_Level = Annotated[int, Field(ge=0, le=255)]
_KEY_SIDE = 8  # cells a side by which pictures are first compared


class DataConfig(Config):
    """Which pictures and captions to read, and at which size."""

    source: str = "shapes"
    """"shapes", a .parquet file, a folder (of parquet files; of pictures, with metadata.jsonl, .csv, .tsv or .parquet,
    or NAME.txt beside NAME.png; or written by `save_to_disk`), or the name of a data set on the Hugging Face hub."""
    split: str = "train"
    """One of the source's splits: of a folder of pictures, a folder named for it or the metadata's field `split`, else
    all are "train". A single file has "train", which is also called by the file's own name."""
    resolution: int = Field(default=64, ge=1)
    """Side of the square pictures, px: the short side is scaled to it and the centre kept."""
    count: int | None = Field(default=None, ge=1)
    """Shapes: how many scenes to draw (20000 if not given). Other sources: only the first rows; of `valid`, when not
    given, at most 1000, evenly spread."""
    seed: int = Field(default=0, ge=0)
    """Shapes: which scenes are drawn. Other sources do not use it."""
    image_column: str = "image"
    """The column of pictures: encoded bytes or paths."""
    text_column: str | None = "text"
    """The column of captions, texts or lists of them; null reads the pictures alone. A set without any text column is
    read alone too."""
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
        digest.update(np.ascontiguousarray(self.pictures).data)
        return digest.hexdigest()

    @cached_property
    def pictures_fingerprint(self) -> str:
        """The fingerprint of the pictures alone, which is that of the same ones read without captions."""
        return replace(self, captions=[[] for _ in self.captions]).fingerprint

    def pixels(self, ids: Sequence[int] | np.ndarray | torch.Tensor) -> torch.Tensor:
        """(B,) row numbers => (B, 3, R, R) float32 in [-1, 1]."""
        return images.to_pixels(self.pictures[np.asarray(ids, dtype=np.int64)])


def load(config: DataConfig, part: Part = "data", pictures_only: bool = False) -> CaptionedPictures:
    """Read or draw the pictures that `config` names; `part` is the field that messages call it by.

    Of a folder of pictures with metadata, those that the metadata lists are read; what is left out is remarked.
    `pictures_only`: nothing is read of captions, nor complained of (those of shapes cost nothing and stay).

    Raises UserError, one line, for: an unknown split or column (naming those there are), a missing or unreadable
    source, an empty one, fewer rows than `count`, more pictures than memory holds, and, all rows together, pictures
    that cannot be decoded, are missing or listed twice, and captions that are not a text with something in it.
    """
    if config.source == "shapes":
        return _load_shapes(config, part)
    return _read(_rows(config, part), config, part, pictures_only)


def load_captioned(train: DataConfig, valid: DataConfig) -> tuple[CaptionedPictures, CaptionedPictures]:
    """`load` for both parts of a training on captions. Raises UserError also where one has no captions."""
    check_alike(train, valid)
    parts = _load_both(train, valid, pictures_only=False)
    for name, part in zip(("data", "valid"), parts, strict=True):
        if not all(part.captions):
            raise UserError(
                f"{name}: {part.name} has no captions, expected a text for each picture; see {name}.text_column"
            )
    return parts


def load_pictures(train: DataConfig, valid: DataConfig) -> tuple[CaptionedPictures, CaptionedPictures]:
    """`load` for both parts of a training on pictures alone, whose captions are not read.

    If they have none, that is remarked: the stages that come later will ask for them.
    """
    check_alike(train, valid)
    return _load_both(train, valid, pictures_only=True)


def _load_both(
    train: DataConfig, valid: DataConfig, pictures_only: bool
) -> tuple[CaptionedPictures, CaptionedPictures]:
    loaded, bad_rows, lacking = [], [], []
    for part, config in (("data", train), ("valid", valid)):
        try:
            if config.source == "shapes":
                most = HELD_OUT_MOST if part == "valid" else SHAPES_COUNT
                drawn = config if config.count is not None else config.model_copy(update={"count": most})
                loaded.append(load(drawn, part, pictures_only))
                continue
            table = _rows(config, part)
            if part == "valid" and config.count is None:
                table = _at_most(table, HELD_OUT_MOST, config)
            if pictures_only and (reason := why_no_captions(table, config, part)) is not None:
                lacking.append(reason)
            loaded.append(_read(table, config, part, pictures_only))
        except BadRows as error:  # those of the other part are to be said with them
            bad_rows.append(str(error))
    if bad_rows:
        raise UserError("; ".join(bad_rows))
    if lacking:
        remark(f"{'; '.join(lacking)}; this stage needs none, the text encoder and the noise predictor will refuse it")
    shared = _shared(*loaded)
    if shared:
        remark(
            f"valid: {shared:,} of {len(loaded[1]):,} pictures of {loaded[1].name} are training pictures, so that what "
            "is measured on them says little of others; give a part that is not trained on"
        )
    return tuple(loaded)


def _shared(train: CaptionedPictures, valid: CaptionedPictures) -> int:
    """How many held-out pictures are training pictures, to the last pixel; 0 where that is less than a tenth."""
    step = -(-train.pictures.shape[-1] // _KEY_SIDE)

    def cells(pictures: np.ndarray) -> Iterator[bytes]:
        return (picture[:, ::step, ::step].tobytes() for picture in pictures)

    # whole pictures are compared only where a few of their pixels are alike, and by digests, which take no room
    alike = set(cells(valid.pictures))
    known = {_digest(train.pictures[i]) for i, key in enumerate(cells(train.pictures)) if key in alike}
    shared = sum(_digest(picture) in known for picture in valid.pictures) if known else 0
    return shared if 10 * shared >= len(valid) else 0


def _digest(picture: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(picture).data).digest()


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


def _load_shapes(config: DataConfig, part: Part) -> CaptionedPictures:
    (split,) = asked_splits(config, part, shapes.SPLITS)
    count = SHAPES_COUNT if config.count is None else config.count
    check_room(part, count, config.resolution)
    scenes = shapes.sample_scenes(count, split, config.seed)
    return CaptionedPictures(
        pictures=shapes.draw_batch(scenes, config.resolution),
        captions=[shapes.captions(scene) for scene in scenes],
        name=f"shapes:{split}",
        scenes=scenes,
    )


def _rows(config: DataConfig, part: Part) -> Table:
    """The rows that are asked for, pictures not yet decoded."""
    table = open_source(config, part)
    if not len(table):
        raise UserError(f"{part}.source: {config.source!r} has no rows in split {config.split!r}; give a filled one")
    if config.count is None:
        return table
    if config.count > len(table):
        raise UserError(
            f"{part}.count: got {config.count}, but {config.source!r} split {config.split!r} has {len(table)} rows;"
            " ask for fewer, or leave it out to read them all"
        )
    return table.select(range(config.count))


def _at_most(table: Table, most: int, config: DataConfig) -> Table:
    """`most` rows, evenly from the whole: what is scored again and again while a stage trains."""
    if len(table) <= most:
        return table
    remark(
        f"valid: {most:,} of the {len(table):,} rows of {source_name(config)}, evenly spread, are scored while "
        "training; give valid.count for its first rows instead"
    )
    return table.select([i * len(table) // most for i in range(most)])


def _read(table: Table, config: DataConfig, part: Part, pictures_only: bool) -> CaptionedPictures:
    pictures, captions = read_rows(table, config, part, pictures_only)
    return CaptionedPictures(pictures, captions, source_name(config))
