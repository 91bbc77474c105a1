"""The two parts of a training: what is trained on, and what is held out and scored."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from sd_mini.data.captioned import (
    SHAPES_COUNT,
    CaptionedPictures,
    DataConfig,
    ValidConfig,
    finished,
    load,
    read_table,
    rows_of,
)
from sd_mini.data.rejected import BadRows
from sd_mini.data.rows import read_rows, sides, why_no_captions
from sd_mini.data.sources import source_name
from sd_mini.data.table import Table
from sd_mini.errors import UserError
from sd_mini.remarks import remark

HELD_OUT_MOST = 1_000  # rows that a training scores when `count` is not given
_KEY_SIDE = 8  # cells a side by which pictures are first compared


def load_captioned(
    train: DataConfig, valid: DataConfig | ValidConfig, folder: Path | None = None
) -> tuple[CaptionedPictures, CaptionedPictures]:
    """`load` for both parts of a training on captions. Raises UserError also where one has no captions."""
    parts = _load_both(train, valid, pictures_only=False, folder=folder)
    for name, part in zip(("data", "valid"), parts, strict=True):
        if not all(part.captions):
            raise UserError(
                f"{name}: {part.name} has no captions, expected a text for each picture; see {name}.text_column"
            )
    return parts


def load_pictures(
    train: DataConfig, valid: DataConfig | ValidConfig, folder: Path | None = None
) -> tuple[CaptionedPictures, CaptionedPictures]:
    """`load` for both parts of a training on pictures alone, whose captions are not read.

    If they have none, that is remarked: the stages that come later will ask for them.
    """
    return _load_both(train, valid, pictures_only=True, folder=folder)


def resolved(train: DataConfig, valid: DataConfig | ValidConfig) -> tuple[DataConfig, DataConfig]:
    """Both parts with everything said; of data without a held-out source of its own, each part is a side."""
    if isinstance(valid, DataConfig):
        return train, valid
    given = valid.given
    if valid.source is not None:  # another source
        usual = {"split": "train", "count": None, "seed": 0, "side": "all", "streaming": False, "mirror": False}
        return train, train.model_copy(update=usual | given)
    if train.source == "shapes":
        return train, train.model_copy(update={"split": "test", "count": None, "seed": 0, "mirror": False} | given)
    changed = sorted(name for name in given.keys() - {"share", "count"} if given[name] != getattr(train, name))
    if changed or valid.split is not None:
        name = "split" if valid.split is not None else changed[0]
        raise UserError(
            f"valid.{name} {getattr(valid, name)!r}: where valid.source is left out, a share of the data's own rows is "
            f"held out, as they are; give valid.source too ({train.source!r} for a split of it), or leave valid.{name} "
            "out"
        )
    share = given.get("share", train.share)
    held_out = train.model_copy(update={"side": "valid", "share": share, "mirror": False})
    return train.model_copy(update={"side": "train", "share": held_out.share}), held_out


def filled(train: DataConfig, valid: ValidConfig) -> ValidConfig:
    """`valid` with every field that it takes from `train`, so that a saved config says all."""
    _, whole = resolved(train, valid)
    values = {name: getattr(whole, name) for name in ValidConfig.model_fields}
    if whole.side == "valid":  # a share of the data has no source of its own
        values |= {"source": None, "split": None, "count": valid.count}
    return ValidConfig(**values)


def check_alike(train: DataConfig, valid: DataConfig) -> None:
    """Raises ValueError where the pictures measured on could not stand for those trained on."""
    if train.resolution != valid.resolution:
        raise UserError(
            f"data.resolution is {train.resolution}, valid.resolution {valid.resolution}; give both the same"
        )
    if valid.crop == "none" and valid.max_aspect == 1:
        raise UserError("valid.crop none keeps whole pictures, which squares would distort; give data.max_aspect too")
    for name in ("max_aspect", "bucket_step", "level"):
        ours, theirs = getattr(train, name), getattr(valid, name)
        if ours != theirs:
            raise UserError(f"data.{name} is {ours:g}, valid.{name} {theirs:g}; give both the same")
    if (train.source == "shapes") != (valid.source == "shapes"):
        raise UserError(
            f"data.source is {train.source!r}, valid.source {valid.source!r}; give both, from the same data"
        )


def _load_both(
    train: DataConfig, valid: DataConfig | ValidConfig, pictures_only: bool, folder: Path | None
) -> tuple[CaptionedPictures, CaptionedPictures]:
    most = valid.count
    train, valid = resolved(train, valid)
    check_alike(train, valid)
    if (train.side, valid.side) == ("train", "valid") and valid == train.model_copy(
        update={"side": "valid", "mirror": False}
    ):
        return _load_sides(train, HELD_OUT_MOST if most is None else most, pictures_only, folder)
    loaded, bad_rows, lacking = [], [], []
    for part, config in (("data", train), ("valid", valid)):
        try:
            if config.source == "shapes":
                most = HELD_OUT_MOST if part == "valid" else SHAPES_COUNT
                drawn = config if config.count is not None else config.model_copy(update={"count": most})
                loaded.append(load(drawn, part, pictures_only, folder))
                continue
            table = rows_of(config, part)
            if part == "valid" and config.count is None:
                table = _at_most(table, HELD_OUT_MOST, config)
            if pictures_only and (reason := why_no_captions(table, config, part)) is not None:
                lacking.append(reason)
            loaded.append(read_table(table, config, part, pictures_only, folder))
        except BadRows as error:  # those of the other part are to be said with them
            bad_rows.append(str(error))
    if bad_rows:
        raise UserError("; ".join(bad_rows))
    _remark_on_captions(lacking)
    shared = _shared(*loaded)
    if shared:
        remark(
            f"valid: {shared:,} of {len(loaded[1]):,} pictures of {loaded[1].name} are training pictures, so that what "
            "is measured on them says little of others; give a part that is not trained on"
        )
    return tuple(loaded)


def _load_sides(
    train: DataConfig, most: int, pictures_only: bool, folder: Path | None
) -> tuple[CaptionedPictures, CaptionedPictures]:
    """Both sides of one source, which is read once. At most `most` held-out rows, evenly spread."""
    table = rows_of(train, "data")
    if pictures_only and (reason := why_no_captions(table, train, "data")) is not None:
        _remark_on_captions([reason])
    read = read_rows(table, train, "data", pictures_only, folder)
    own, held_out = sides(read, train.share)
    if not len(own) or not len(held_out):
        raise UserError(
            f"valid.share {train.share:g}: of {len(read.captions):,} rows of {train.source!r} {len(held_out)} are held "
            "out; give another valid.share, or held-out pictures of their own as valid.source"
        )
    whole = CaptionedPictures.of(read, source_name(train))
    chosen = held_out if len(held_out) <= most else held_out[[i * len(held_out) // most for i in range(most)]]
    scored = f", {len(chosen):,} of them, evenly spread, scored while training" if len(chosen) < len(held_out) else ""
    remark(
        f"valid: {len(held_out):,} of {len(whole):,} rows of {whole.name} are held out by what they show{scored}; give "
        "valid.source for pictures of their own"
    )
    names = [f"{whole.name} ({side})" for side in ("train", "valid")]
    trained = finished(replace(whole.select(own), name=names[0]), train)
    return trained, replace(whole.select(chosen), name=names[1], rejected=[])


def _at_most(table: Table, most: int, config: DataConfig) -> Table:
    """`most` rows, evenly from the whole: what is scored again and again while a stage trains."""
    if len(table) <= most:
        return table
    remark(
        f"valid: {most:,} of the {len(table):,} rows of {source_name(config)}, evenly spread, are scored while "
        "training; give valid.count for its first rows instead"
    )
    return table.select([i * len(table) // most for i in range(most)])


def _remark_on_captions(lacking: Sequence[str]) -> None:
    if lacking:
        remark(f"{'; '.join(lacking)}; this stage needs none, the text encoder and the noise predictor will refuse it")


def _shared(train: CaptionedPictures, valid: CaptionedPictures) -> int:
    """How many held-out pictures are training pictures, to the last pixel; 0 where that is less than a tenth."""

    def cells(picture: np.ndarray) -> bytes:
        down, across = (-(-side // _KEY_SIDE) for side in picture.shape[1:])
        return picture[:, ::down, ::across].tobytes()

    # whole pictures are compared only where a few of their pixels are alike, and by digests, which take no room
    alike = set(map(cells, valid.pictures))
    known = {_digest(picture) for picture in train.pictures if cells(picture) in alike}
    shared = sum(_digest(picture) in known for picture in valid.pictures) if known else 0
    return shared if 10 * shared >= len(valid) else 0


def _digest(picture: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(picture).data).digest()
