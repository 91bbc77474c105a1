"""Pictures of a table => their pixels at the training size, decoded once and in parallel, kept on disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from sd_mini import images
from sd_mini.data.arrays import Pictures, joined
from sd_mini.data.buckets import Size, bucket_sizes, drawn_place, longest_aspect, nearest_bucket
from sd_mini.data.near import picture_hashes
from sd_mini.data.table import Table
from sd_mini.errors import UserError
from sd_mini.memory import check_room
from sd_mini.openmp import cores
from sd_mini.progress import progress

if TYPE_CHECKING:
    from sd_mini.data.captioned import DataConfig

_DECODER = 1  # part of the cache's key: raise it when other pixels come of the same bytes
_LONG = 2.0  # times the longest bucket; the crop of a picture of this aspect keeps half of it
_CHUNK = 2**25  # bytes of decoded pictures that are written at a time


class Decoded(NamedTuple):
    """N rows: `pictures` (N, 3, H, W) uint8, `hashes` (N, 2) uint64 (see `near`), their own `sizes` (N, 2) in px, width
    first, and which of them could be decoded, `is_read` (N,) bool. They are in the order of their buckets: `rows` (N,)
    are their numbers in the table."""

    pictures: Pictures
    hashes: np.ndarray
    sizes: np.ndarray
    is_read: np.ndarray
    rows: np.ndarray


_NAMES = Decoded._fields[:3]


def decoded(table: Table, config: DataConfig, part: str, folder: Path | None) -> Decoded:
    """Every row's picture at its bucket's size, in memory or, with `folder`, in caches there.

    Raises UserError for more pictures than the disk or memory holds, and for files that change while they are read.
    """
    buckets = bucket_sizes(config)
    if len(buckets) == 1:
        return _decoded_alike(table, config, buckets[0], part, folder)
    if table.is_streamed:
        raise UserError(
            f"{part}.max_aspect {config.max_aspect:g}: a stream is read once and in order, and buckets are read one "
            "after the other; set streaming to false, or max_aspect to 1"
        )
    # Which bucket each row is in, then the pictures of one bucket after the other.
    numbers = nearest_bucket(_own_sizes(table, config, part, folder), buckets)
    _check_room_of_all(numbers, buckets, config.resolution, part, folder)
    parts, rows = [], []
    for number in np.unique(numbers):
        own = np.flatnonzero(numbers == number)
        parts.append(_decoded_alike(table.select(own.tolist()), config, buckets[number], part, folder))
        rows.append(own)
    pictures, *arrays, _ = zip(*parts, strict=True)
    return Decoded(joined(pictures), *map(np.concatenate, arrays), np.concatenate(rows))


def _check_room_of_all(
    numbers: np.ndarray, buckets: list[Size], resolution: int, part: str, folder: Path | None
) -> None:
    """Raises UserError where the pictures of all buckets do not fit, before those of the first are decoded."""
    if folder is None:
        return check_room(part, len(numbers), resolution)  # no bucket is larger than the square
    needed = int(3 * np.array([size.height * size.width for size in buckets])[numbers].sum())
    from sd_mini.data import cache  # imports torch

    cache.check_disk(folder, needed, f"{part}: pictures")


def _decoded_alike(table: Table, config: DataConfig, size: Size, part: str, folder: Path | None) -> Decoded:
    """`decoded` of rows that are all in one bucket."""
    chunk = max(1, min(256, _CHUNK // (3 * size.height * size.width)))
    blank = np.zeros((3, *size), np.uint8), np.zeros(2, np.uint64), np.zeros(2, np.int32)

    def encode_rows(rows: slice) -> dict[str, np.ndarray]:
        read = _in_threads(lambda row: read_picture(table, config, row, size), rows)
        columns = zip(*(blank if one is None else one for one in read), strict=True)
        found = {name: np.stack(column) for name, column in zip(_NAMES, columns, strict=True)}
        return {**found, "is_read": np.array([one is not None for one in read])}

    is_square = size.height == size.width
    key = {
        "source": table.source_state(),
        "column": config.image_column,
        "resolution": size.height if is_square else [*size],
        "background": config.background,
        "crop": config.crop,
        "enlarge": config.enlarge,
        "decoder": _DECODER,
    }
    if config.crop == "none":  # else longer pictures are cropped
        key["max_aspect"] = config.max_aspect
    if folder is None and config.max_aspect == 1:
        check_room(part, len(table), size.height)
    title = f"{part}: pictures" if is_square else f"{part}: pictures of {size}"
    stored = _stored(folder, key, len(table), encode_rows, title, chunk)
    table.check_unchanged()
    arrays = (stored[name][:] for name in ("hashes", "sizes", "is_read"))
    return Decoded(stored["pictures"], *arrays, np.arange(len(table)))


def _own_sizes(table: Table, config: DataConfig, part: str, folder: Path | None) -> np.ndarray:
    """(N, 2) width and height in px, from the files' headers alone; 0 where there is none."""

    def encode_rows(rows: slice) -> dict[str, np.ndarray]:
        return {"sizes": np.array(_in_threads(lambda row: _own_size(table, config, row), rows), np.int32)}

    key = {"source": table.source_state(), "column": config.image_column, "sizes": _DECODER}
    return _stored(folder, key, len(table), encode_rows, f"{part}: sizes", 1024)["sizes"][:]


def _own_size(table: Table, config: DataConfig, row: int) -> tuple[int, int]:
    source = table.picture(row, config.image_column)
    try:
        return (0, 0) if source is None else images.size_of(source)
    except UserError:  # why, is said of the rows that cannot be decoded
        return 0, 0


def _in_threads(read: Callable[[int], Any], rows: slice) -> list[Any]:
    """`read` of each row; Pillow decodes and resizes without holding Python's lock."""
    threads = max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(read, range(rows.start, rows.stop)))


def _stored(
    folder: Path | None, key: dict[str, Any], count: int, encode_rows: Callable[[slice], Any], title: str, chunk: int
) -> dict[str, Any]:
    """The rows of `encode_rows`, in the cache `folder` or, without one, in memory."""
    if folder is not None:
        from sd_mini.data import cache  # imports torch, which processes that only decode do not need

        return cache.encode(folder, key, count, encode_rows, title, chunk=chunk)
    steps = progress(range(0, count, chunk), desc=title, delay=2)
    found = [encode_rows(slice(start, min(start + chunk, count))) for start in steps]
    return {name: np.concatenate([piece[name] for piece in found]) for name in found[0]}


def read_picture(table: Table, config: DataConfig, row: int, size: Size) -> tuple[np.ndarray, ...] | None:
    """A row's picture at that size, its hashes and its own size; None where it cannot be used."""
    source = table.picture(row, config.image_column)
    try:
        picture = _usable(source, config, size)
    except UserError:  # why, is asked again of the few rows that this happens to
        return None
    place = drawn_place(table.id(row)) if config.crop == "random" else 0.5
    fitted = images.fit(picture, size, config.crop, place)
    return fitted, picture_hashes(picture), np.array(picture.size, np.int32)


def fault_of_picture(table: Table, config: DataConfig, row: int) -> str:
    """Why a row's picture cannot be used."""
    source = table.picture(row, config.image_column)
    buckets = bucket_sizes(config)
    try:
        size = buckets[nearest_bucket(np.array([_own_size(table, config, row)]), buckets)[0]]
        _usable(source, config, size)
    except UserError as error:
        return str(error)
    return "could not be decoded when the cache was written, and can be now; delete the run's cache of pictures"


def _usable(source: bytes | Path | None, config: DataConfig, size: Size) -> Image.Image:
    """An encoded picture => RGB. Raises UserError where there is none, it cannot be decoded, is too small or long."""
    if source is None:
        raise UserError(f"no picture in column {config.image_column!r}; leave the row out")
    picture = images.decode_image(source, config.background)[0]
    own, aspect = Size(picture.height, picture.width), max(picture.size) / min(picture.size)
    if config.crop == "none" and aspect > config.max_aspect:
        raise UserError(
            f"it is {own}, {aspect:.3g}:1, and whole pictures are asked for, at most {config.max_aspect:g}:1; leave it "
            "out, let it be cropped (crop), or allow longer ones (max_aspect)"
        )
    kept = picture.size if config.crop == "none" else images.largest_part(picture.size, size)
    if not config.enlarge and (kept[0] < size.width or kept[1] < size.height):
        expected = f"at least {size.width} px a side" if size.width == size.height else f"at least {size}"
        raise UserError(f"it is {own}, expected {expected}; leave it out, or allow enlarging (enlarge)")
    return picture


def remarks_on(sizes: np.ndarray, hashes: np.ndarray, config: DataConfig) -> list[str]:
    """(N, 2) sizes in px and (N, 2) hashes => what a training does to these pictures, in words."""
    count, found, buckets = len(sizes), [], bucket_sizes(config)
    whole = np.array([(size.width, size.height) for size in buckets])[nearest_bucket(sizes, buckets)]
    small = int((sizes < whole).any(1).sum())
    if small:
        what = f"{config.resolution} px" if len(buckets) == 1 else "their bucket"
        found.append(f"{small:,} of {count:,} pictures are smaller than {what} and are enlarged")
    longest = _LONG * longest_aspect(buckets)
    long = int((sizes.max(1) > longest * sizes.min(1)).sum())
    if long:
        crop = "square crop" if len(buckets) == 1 else "crop"
        found.append(f"{long:,} of {count:,} pictures are longer than {longest:g}:1: their {crop} loses over a half")
    same = count - len(np.unique(hashes.min(1)))
    if 100 * same > count:
        found.append(f"{same:,} of {count:,} pictures look like another one: see python -m training.data.prepare")
    return found
