"""Pictures of a table => their pixels at the training size, decoded once and in parallel, kept on disk."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from sd_mini import images
from sd_mini.data.arrays import Pictures
from sd_mini.data.near import picture_hashes
from sd_mini.data.table import Table
from sd_mini.errors import UserError
from sd_mini.memory import check_room
from sd_mini.openmp import cores

if TYPE_CHECKING:
    from sd_mini.data.captioned import DataConfig

_DECODER = 1  # part of the cache's key: raise it when other pixels come of the same bytes
_LONG = 2.0  # sides; the square crop of a picture of this aspect keeps half of it
_CHUNK = 2**25  # bytes of decoded pictures that are written at a time


class Decoded(NamedTuple):
    """N rows: `pictures` (N, 3, R, R) uint8, `hashes` (N, 2) uint64 (see `near`), their own `sizes` (N, 2) in px, width
    first, and which of them could be decoded, `is_read` (N,) bool."""

    pictures: Pictures
    hashes: np.ndarray
    sizes: np.ndarray
    is_read: np.ndarray


_NAMES = Decoded._fields[:3]


def decoded(table: Table, config: DataConfig, part: str, folder: Path | None) -> Decoded:
    """Every row's picture at the training size, in memory or, with `folder`, in a cache there.

    Raises UserError for more pictures than the disk or memory holds, and for files that change while they are read.
    """
    side, count = config.resolution, len(table)
    threads = max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    chunk = max(1, min(256, _CHUNK // (3 * side * side)))

    def encode_rows(rows: slice) -> dict[str, np.ndarray]:
        with ThreadPoolExecutor(threads) as pool:  # Pillow decodes and resizes without holding Python's lock
            read = list(pool.map(lambda row: read_picture(table, config, row), range(rows.start, rows.stop)))
        blank = np.zeros((3, side, side), np.uint8), np.zeros(2, np.uint64), np.zeros(2, np.int32)
        columns = zip(*(blank if one is None else one for one in read), strict=True)
        found = {name: np.stack(column) for name, column in zip(_NAMES, columns, strict=True)}
        return {**found, "is_read": np.array([one is not None for one in read])}

    if folder is None:
        check_room(part, count, side)
        steps = tqdm(range(0, count, chunk), desc="decoding pictures", delay=2)
        pieces = [encode_rows(slice(start, min(start + chunk, count))) for start in steps]
        arrays = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
        return Decoded(**arrays)
    from sd_mini.data import cache  # imports torch, which processes that only decode do not need

    key = {
        "source": table.source_state(),
        "column": config.image_column,
        "resolution": side,
        "background": config.background,
        "crop": config.crop,
        "enlarge": config.enlarge,
        "decoder": _DECODER,
    }
    stored = cache.encode(folder, key, count, encode_rows, f"{part}: pictures", chunk=chunk)
    table.check_unchanged()
    return Decoded(stored["pictures"], stored["hashes"][:], stored["sizes"][:], stored["is_read"][:])


def read_picture(table: Table, config: DataConfig, row: int) -> tuple[np.ndarray, ...] | None:
    """A row's picture at the training size, its hashes and its own size; None where it cannot be used."""
    source = table.picture(row, config.image_column)
    try:
        picture = _usable(source, config)
    except UserError:  # why, is asked again of the few rows that this happens to
        return None
    fitted = images.fit(picture, config.resolution, config.crop)
    return fitted, picture_hashes(picture), np.array(picture.size, np.int32)


def fault_of_picture(table: Table, config: DataConfig, row: int) -> str:
    """Why a row's picture cannot be used."""
    source = table.picture(row, config.image_column)
    try:
        _usable(source, config)
    except UserError as error:
        return str(error)
    return "could not be decoded when the cache was written, and can be now; delete the run's cache of pictures"


def _usable(source: bytes | Path | None, config: DataConfig) -> Image.Image:
    """An encoded picture => RGB. Raises UserError where there is none, it cannot be decoded, or is too small."""
    if source is None:
        raise UserError(f"no picture in column {config.image_column!r}; leave the row out")
    picture = images.decode_image(source, config.background)[0]
    if not config.enlarge and min(picture.size) < config.resolution:
        size, expected = "{} x {} px".format(*picture.size), f"at least {config.resolution} px a side"
        raise UserError(f"it is {size}, expected {expected}; leave it out, or allow enlarging (enlarge)")
    return picture


def remarks_on(sizes: np.ndarray, hashes: np.ndarray, resolution: int) -> list[str]:
    """(N, 2) sizes in px and (N, 2) hashes => what a training at that resolution does to these pictures, in words."""
    count, found = len(sizes), []
    small = int((sizes.min(1) < resolution).sum())
    if small:
        found.append(f"{small:,} of {count:,} pictures are smaller than {resolution} px and are enlarged")
    long = int((sizes.max(1) > _LONG * sizes.min(1)).sum())
    if long:
        found.append(f"{long:,} of {count:,} pictures are longer than {_LONG:g}:1: their square crop loses over a half")
    same = count - len(np.unique(hashes.min(1)))
    if 100 * same > count:
        found.append(f"{same:,} of {count:,} pictures look like another one: see python -m training.data.prepare")
    return found
