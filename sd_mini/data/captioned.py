"""Captioned pictures from anywhere: the shapes world, parquet, a folder of pictures, a saved or a hub data set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from sd_mini import images, shapes
from sd_mini.config import Config
from sd_mini.data import arrays
from sd_mini.data.arrays import Pictures, pieces, shapes_of, spans, taken
from sd_mini.data.buckets import Size
from sd_mini.data.mixture import WeightedSource, first_rows
from sd_mini.data.rejected import Rejected
from sd_mini.data.rows import ReadRows, read_rows, sides
from sd_mini.data.sources import open_source, source_name
from sd_mini.data.splits import Part, asked_splits
from sd_mini.data.table import Table
from sd_mini.data.template import check_template
from sd_mini.errors import UserError
from sd_mini.files import combined_hash, file_hash
from sd_mini.memory import check_room
from sd_mini.texts import with_sides_swapped

if TYPE_CHECKING:
    import torch

SHAPES_COUNT = 20_000  # scenes drawn when `count` is not given

_Level = Annotated[int, Field(ge=0, le=255)]
_Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class DataConfig(Config):
    """Which pictures and captions to read, and at which size."""

    source: str | tuple[WeightedSource, ...] = "shapes"
    """"shapes"; a folder of pictures (with metadata.jsonl, .csv, .tsv or .parquet, with NAME.txt beside NAME.png, or
    one folder a class), of parquet files, of WebDataset tars, or written by `save_to_disk`; a .parquet, .tar, .csv or
    .tsv file; a pattern of tars such as "shard-{000..099}.tar"; the name of a data set on the Hugging Face hub; or a
    list of {source, weight} that are mixed. See docs/data.md."""
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
    level: shapes.Level = 1
    """Shapes: 2 has groups, chains of relations, patterns, backgrounds and overlap; see docs/benchmark.md. For other
    sources leave it out."""
    image_column: str = "image"
    """The column of pictures: encoded bytes or paths."""
    text_column: str | None = "text"
    """The column of captions, texts or lists of them; null reads the pictures alone. A set without any text column is
    read alone too."""
    aliases_column: str | None = None
    """A column of lists of further captions of the same picture."""
    caption_weights: tuple[_Weight, ...] | None = Field(default=None, min_length=1)
    """How often the first, second, ... caption of a picture is drawn, against its others; those beyond the list are
    not drawn. All alike if not given."""
    template: Annotated[str | None, AfterValidator(check_template)] = None
    """Makes captions of labels, which are `text_column` or, without that, the names of class folders: "a photo of
    {article} {label}"; {article} is "an" before a vowel, and underscores become spaces."""
    streaming: bool = False
    """Parquet and the hub: read rows once and in order, without a copy of the data set on this disk."""
    background: tuple[_Level, _Level, _Level] = images.WHITE
    """sRGB colour, 0 to 255, put behind transparent pictures."""
    max_aspect: float = Field(default=1.0, ge=1, allow_inf_nan=False)
    """The largest ratio of a picture's long side to its short one. 1: all are squares. Above it: aspect-ratio buckets,
    sizes of about the square's area of which each picture takes the nearest; each batch is of one."""
    bucket_step: int = Field(default=16, ge=1)
    """Buckets' sides are multiples of it, px: a multiple of the autoencoder's stride times the network's patch size."""
    crop: images.Crop = "center"
    """What is kept of a picture whose sides have another ratio: its centre; of one that is too high its top, where
    faces are; a random part, which is the same at every step; or, with `max_aspect` above 1, none is cropped: all of it
    is scaled to its bucket."""
    enlarge: bool = True
    """Whether pictures smaller than what they are scaled to are enlarged; if not, their rows cannot be used."""
    mirror: bool = False
    """Whether each picture is there a second time, as its mirror image, with left and right exchanged in its captions.
    Held-out pictures are not."""
    max_bad: float = Field(default=0.01, ge=0, le=1)
    """The share of rows that may be unusable: they are left out, and named in the stage's rejected.jsonl. With more the
    launch stops; with 0, at the first."""
    side: Literal["all", "train", "valid"] = "all"
    """Which rows, by what their pictures show: all, those to train on, or those held out. A row never changes sides,
    however the data grow."""
    share: float = Field(default=0.05, gt=0, lt=1)
    """The share of the rows that is held out, where `side` is not "all"."""

    @model_validator(mode="after")
    def _possible_together(self) -> DataConfig:
        if self.crop == "none" and self.max_aspect == 1:
            raise UserError(
                "crop none keeps whole pictures, which squares would distort; give max_aspect above 1, such as 2, too"
            )
        if self.source != "shapes" and self.level != 1:
            raise UserError(f"level {self.level} is for source shapes; leave it out")
        if self.source == "shapes" and (self.max_aspect > 1 or self.mirror):
            name = "mirror" if self.mirror else "max_aspect"
            raise UserError(
                f"{name} is for pictures that are read; shapes are drawn as squares, by scenes; leave it out"
            )
        return self

    @property
    def squares(self) -> DataConfig:
        """The same pictures, all as squares."""
        crop = "center" if self.crop == "none" else self.crop
        return self.model_copy(update={"max_aspect": 1.0, "crop": crop})


class ValidConfig(Config):
    """Which pictures and captions are held out. What is left out is as in `data`."""

    source: str | tuple[WeightedSource, ...] | None = None
    """As data.source. Left out, a share of the data's own rows is held out; of shapes, the split test."""
    split: str | None = None
    """One of the splits of valid.source."""
    share: float | None = Field(default=None, gt=0, lt=1)
    """The share of the data's rows that is held out, where no source is given; 0.05 if left out."""
    count: int | None = Field(default=None, ge=1)
    """At most so many rows, evenly spread where a share of the data is held out, else the first; 1000, evenly spread,
    if left out."""
    resolution: int | None = Field(default=None, ge=1)
    seed: int | None = Field(default=None, ge=0)
    level: shapes.Level | None = None
    image_column: str | None = None
    text_column: str | None = None
    aliases_column: str | None = None
    caption_weights: tuple[_Weight, ...] | None = Field(default=None, min_length=1)
    template: Annotated[str | None, AfterValidator(check_template)] = None
    streaming: bool | None = None
    background: tuple[_Level, _Level, _Level] | None = None
    max_aspect: float | None = Field(default=None, ge=1, allow_inf_nan=False)
    bucket_step: int | None = Field(default=None, ge=1)
    crop: images.Crop | None = None
    enlarge: bool | None = None
    max_bad: float | None = Field(default=None, ge=0, le=1)

    @property
    def given(self) -> dict[str, Any]:
        """The fields that say something; null does where it is a value of its own (no captions, no template)."""
        says_null = {"text_column", "aliases_column", "template", "caption_weights"}
        values = {name: getattr(self, name) for name in self.model_fields_set}
        return {name: value for name, value in values.items() if value is not None or name in says_null}

    @model_serializer(mode="wrap")
    def _given_fields(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What was said: a field that is written is no longer that of `data`."""
        return {name: value for name, value in serialize(self).items() if name in self.model_fields_set}


@dataclass(frozen=True, eq=False)
class CaptionedPictures:
    """N pictures, each with its captions."""

    pictures: Pictures = field(repr=False)
    """(N, 3, H, W) uint8 sRGB: in memory, or in a cache on disk. With aspect-ratio buckets several sizes, those of one
    size side by side: see `spans`."""
    captions: list[list[str]] = field(repr=False)
    """Each picture's captions, the main one first, no two alike. All N lists are empty for pictures without text."""
    name: str
    """Where they came from, for reports: "shapes:train"."""
    scenes: list[shapes.AnyScene] | None = field(default=None, repr=False)
    """The scene graphs behind the pictures, for the shapes world only."""
    rejected: list[Rejected] = field(default_factory=list, repr=False)
    """The rows that were left out."""
    weights: np.ndarray | None = field(default=None, repr=False)
    """(N,) how often each is drawn an epoch, on average; of a mixture alone."""
    sources: list[str] | None = field(default=None, repr=False)
    """The name of the source that each comes from; of a mixture alone."""

    @classmethod
    def of(cls, read: ReadRows, name: str) -> CaptionedPictures:
        """What was read, under a name for reports."""
        return cls(read.pictures, read.captions, name, None, read.rejected, read.weights, read.sources)

    def __len__(self) -> int:
        return len(self.pictures)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of the pictures, their resolution and captions in order; the same wherever they lie."""
        shapes_of_parts = [
            (len(span), *shape) for span, shape in zip(self.spans, shapes_of(self.pictures), strict=True)
        ]
        shape = shapes_of_parts[0] if len(shapes_of_parts) == 1 else shapes_of_parts
        header = json.dumps({"shape": shape, "captions": self.captions})
        digest = hashlib.sha256(header.encode())
        for piece in pieces(self.pictures):
            digest.update(np.ascontiguousarray(piece).data)
        return digest.hexdigest()

    @cached_property
    def pictures_fingerprint(self) -> str:
        """The fingerprint of the pictures alone, which is that of the same ones read without captions."""
        if not any(self.captions):
            return self.fingerprint
        return replace(self, captions=[[] for _ in self.captions]).fingerprint

    @cached_property
    def identity(self) -> dict[str, str]:
        """Hashes of what a training draws: the content, and of a mixture the weights."""
        weights = {} if self.weights is None else {"weights": hashlib.sha256(self.weights.tobytes()).hexdigest()}
        return {"data": self.fingerprint, **weights}

    @property
    def spans(self) -> list[range]:
        """The row numbers of each size of pictures."""
        return spans(self.pictures)

    @property
    def sizes(self) -> list[Size]:
        """Of the pictures of each span."""
        return [Size(*shape[1:]) for shape in shapes_of(self.pictures)]

    @property
    def bucket_counts(self) -> list[int]:
        """How many pictures there are of each size."""
        return [len(span) for span in self.spans]

    def runs(self, rows: slice | range, most: int) -> Iterator[range]:
        """`rows` in order, at most so many at a time and all of one size."""
        for span in self.spans:
            first, last = max(rows.start, span.start), min(rows.stop, span.stop)
            yield from (range(a, min(a + most, last)) for a in range(first, last, most))

    def spread(self, most: int) -> list[int]:
        """The first rows of every size in turn, at most so many: what a person is shown. In order."""
        turns = (row for place in zip_longest(*self.spans) for row in place if row is not None)
        return sorted(islice(turns, most))

    def pixels(self, ids: Sequence[int] | np.ndarray | torch.Tensor) -> torch.Tensor:
        """(B,) row numbers, of pictures of one size => (B, 3, H, W) float32 in [-1, 1]."""
        return images.to_pixels(self.pictures[np.asarray(ids, dtype=np.int64)])

    def pixel_parts(self, size: int = 256) -> Iterator[torch.Tensor]:
        """The pixels of all, at most `size` pictures at a time and all of one size."""
        return (self.pixels(run) for run in self.runs(range(len(self)), size))

    def select(self, rows: Sequence[int] | np.ndarray) -> CaptionedPictures:
        """These rows alone, in this order; pictures on disk stay there."""
        return CaptionedPictures(
            taken(self.pictures, rows),
            [self.captions[row] for row in rows],
            self.name,
            None if self.scenes is None else [self.scenes[row] for row in rows],
            self.rejected,
            None if self.weights is None else self.weights[np.asarray(rows)],
            None if self.sources is None else [self.sources[row] for row in rows],
        )


def finished(data: CaptionedPictures, config: DataConfig) -> CaptionedPictures:
    """What was read, with mirror images if `config` asks for them: each picture a second time, after all others of its
    size."""
    if not config.mirror:
        return data
    rows = [row for span in data.spans for row in [*span, *span]]
    is_turned = [turned for span in data.spans for turned in [False] * len(span) + [True] * len(span)]
    captions = [data.captions[row] for row in rows]
    return replace(
        data,
        pictures=arrays.with_mirror_images(data.pictures),
        captions=[
            [with_sides_swapped(text) for text in own] if turned else own
            for own, turned in zip(captions, is_turned, strict=True)
        ],
        weights=None if data.weights is None else data.weights[np.asarray(rows)],
        sources=None if data.sources is None else [data.sources[row] for row in rows],
    )


def load(
    config: DataConfig, part: Part = "data", pictures_only: bool = False, folder: Path | None = None
) -> CaptionedPictures:
    """Read or draw the pictures that `config` names; `part` is the field that messages call it by.

    `folder` takes the cache of decoded pictures, which then stay on disk; without it they are in memory. Of a folder of
    pictures with metadata, those that the metadata lists are read; what is left out is remarked.
    `pictures_only`: nothing is read of captions, nor complained of (those of shapes cost nothing and stay).

    Raises UserError, one line, for: an unknown split or column (naming those there are), a missing or unreadable
    source, an empty one, fewer rows than `count`, more pictures than the disk or memory holds, and a larger share than
    `max_bad` of rows with pictures that cannot be decoded, are missing or listed twice, or captions that are not a text
    with something in it.
    """
    if config.source == "shapes":
        return _load_shapes(config, part, folder)
    return read_table(rows_of(config, part), config, part, pictures_only, folder)


def unique_captions(captions: Iterable[Iterable[str]]) -> list[str]:
    """The captions of many pictures => each one once, in the order first seen."""
    return list(dict.fromkeys(caption for several in captions for caption in several))


def _load_shapes(config: DataConfig, part: Part, folder: Path | None) -> CaptionedPictures:
    (split,) = asked_splits(config, part, shapes.SPLITS)
    count = SHAPES_COUNT if config.count is None else config.count
    if folder is None:
        check_room(part, count, config.resolution)
    scenes = shapes.sample_scenes(count, split, config.seed, level=config.level)
    if folder is None:
        pictures: Pictures = shapes.draw_batch(scenes, config.resolution)
    else:
        from sd_mini.data import cache

        key = {"world": _world(), **config.model_dump(include={"level", "seed", "resolution"})}
        key |= {"split": split, "count": count}
        drawn = cache.encode(
            folder,
            key,
            count,
            lambda rows: {"pictures": shapes.draw_batch(scenes[rows], config.resolution)},
            f"{part}: pictures of shapes",
        )
        pictures = drawn["pictures"]
    captions = [shapes.captions(scene) for scene in scenes]
    name = "shapes" if config.level == 1 else f"shapes, level {config.level}"
    return CaptionedPictures(pictures, captions, f"{name}:{split}", scenes)


@lru_cache(maxsize=1)
def _world() -> str:
    """A hash of the code that draws the scenes."""
    return combined_hash([file_hash(path) for path in sorted(Path(shapes.__file__).parent.rglob("*.py"))])


def rows_of(config: DataConfig, part: Part) -> Table:
    """The rows that are asked for, pictures not yet decoded."""
    return first_rows(open_source(config, part), config, part)


def read_table(
    table: Table, config: DataConfig, part: Part, pictures_only: bool, folder: Path | None
) -> CaptionedPictures:
    read = read_rows(table, config, part, pictures_only, folder)
    whole = CaptionedPictures.of(read, source_name(config))
    if config.side != "all":
        own, held_out = sides(read, config.share)
        whole = replace(whole.select(own if config.side == "train" else held_out), name=f"{whole.name} ({config.side})")
    return finished(whole, config)
