"""Captioned pictures with faults of every kind at known rows: what cleaning is measured and tested on.

The kind of row i is KINDS[i % PERIOD], clean beyond. A repeated row repeats row i - PERIOD / 2, which is clean.
"""

from __future__ import annotations

import io
import multiprocessing
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

PERIOD = 200
_CHUNK = 2000  # rows of a parquet file
_TEST_SEED = 10**9  # test row k is the clean row _TEST_SEED + k


class Kind(NamedTuple):
    """A fault, and what has to become of its row: a step and reason, or ("", "") where it is kept."""

    name: str
    step: str = ""
    reason: str = ""


KINDS = (
    Kind("cut short", "read", "picture"),
    Kind("no picture", "read", "picture"),
    Kind("null caption", "read", "caption"),
    Kind("empty caption", "read", "caption"),
    Kind("harmful word", "harmful", "word"),
    Kind("harmful word, disguised", "harmful", "word"),
    Kind("tags"),
    Kind("mojibake"),
    Kind("nothing but tags", "markup", "empty"),
    Kind("small", "quality", "too_small"),
    Kind("narrow", "quality", "aspect"),
    Kind("blank", "quality", "near_blank"),
    Kind("blurred", "quality", "blurred"),
    Kind("camera name", "quality", "camera_name"),
    Kind("file name", "quality", "file_name"),
    Kind("address", "quality", "address"),
    Kind("repeated caption", "quality", "repeated_caption"),
    Kind("copy", "duplicates", "exact"),
    Kind("copy as PNG", "duplicates", "exact"),
    Kind("JPEG q50", "duplicates", "near"),
    Kind("resized", "duplicates", "near"),
    Kind("brightness", "duplicates", "near"),
    Kind("mirrored", "duplicates", "near"),
    Kind("mirrored, another caption"),
    Kind("long caption", "duplicates", "caption"),
    Kind("test picture", "decontamination", "exact"),
    Kind("test picture, q50", "decontamination", "near"),
    Kind("test caption", "decontamination", "caption"),
)
COPIES = frozenset(kind.name for kind in KINDS if kind.step == "duplicates" or "another" in kind.name)
NEAR = ("JPEG q50", "resized", "brightness", "mirrored")
_SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]


def kind_of(row: int) -> Kind | None:
    """The fault of a row; none of a clean one."""
    return KINDS[row % PERIOD] if row % PERIOD < len(KINDS) else None


def write_planted(folder: Path, rows: int, test_rows: int, workers: int = 1) -> None:
    """`folder`/train-*.parquet and test.parquet, columns image and text; the same bytes for any number of workers."""
    folder.mkdir(parents=True)
    starts = range(0, rows, _CHUNK)
    jobs = [
        (folder / f"train-{number:05d}-of-{len(starts):05d}.parquet", start, min(start + _CHUNK, rows), test_rows)
        for number, start in enumerate(starts)
    ]
    _write([_encoded(_TEST_SEED + row, test_rows) for row in range(test_rows)], folder / "test.parquet")
    if workers == 1:
        for job in jobs:
            _write_chunk(*job)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for future in [pool.submit(_write_chunk, *job) for job in jobs]:
            future.result()


def _write_chunk(path: Path, start: int, stop: int, test_rows: int) -> None:
    _write([_encoded(row, test_rows) for row in range(start, stop)], path)


def _write(rows: Sequence[dict[str, Any]], path: Path) -> None:
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.Table.from_pylist(list(rows), pa.schema({"image": image, "text": pa.string()}))
    pq.write_table(table, path, compression="none", row_group_size=100)


def _encoded(row: int, test_rows: int) -> dict[str, Any]:
    """A row as it is stored."""
    picture, caption = planted_row(row, test_rows)
    return {"image": None if picture is None else {"bytes": picture, "path": None}, "text": caption}


def planted_row(row: int, test_rows: int) -> tuple[bytes | None, str | None]:
    """An encoded picture and its caption, drawn by the row's number alone."""
    kind = kind_of(row) if row < _TEST_SEED else None
    name = kind.name if kind is not None else ""
    if name in COPIES and row >= PERIOD // 2:
        return _copy(name, row, row - PERIOD // 2)
    if name.startswith("test"):
        return _of_test(name, row, _TEST_SEED + row // PERIOD % test_rows)
    rng = np.random.default_rng([1, row])
    picture = _picture(name, rng)
    encoded = _png(picture) if row % 4 == 0 else _jpeg(picture)
    broken = {"cut short": encoded[: len(encoded) // 2], "no picture": None}
    return broken.get(name, encoded), _caption(name, row)


def _copy(name: str, row: int, original: int) -> tuple[bytes, str | None]:
    encoded, caption = planted_row(original, 1)
    assert encoded is not None and caption is not None
    rng = np.random.default_rng([2, row])
    if name == "long caption":
        words = caption.split()
        words[int(rng.integers(len(words)))] = "another"
        return _jpeg(draw(rng)), " ".join(words)
    decoded = Image.open(io.BytesIO(encoded))
    if name == "copy":
        return encoded, caption
    if name == "copy as PNG":
        return _png(decoded), caption
    if name == "resized":
        scale = rng.uniform(0.5, 1.5)
        size = (max(round(decoded.width * scale), 40), max(round(decoded.height * scale), 40))
        scale = max(size[0] / decoded.width, size[1] / decoded.height)
        decoded = decoded.resize(
            (round(decoded.width * scale), round(decoded.height * scale)), Image.Resampling.LANCZOS
        )
    elif name == "brightness":
        decoded = ImageEnhance.Brightness(decoded).enhance(rng.uniform(0.8, 1.2))
    elif name.startswith("mirrored"):
        decoded = ImageOps.mirror(decoded)
    caption = _caption("", row) if "another" in name else f"{caption.capitalize()}."
    return _jpeg(decoded, 50 if name == "JPEG q50" else 90), caption


def _of_test(name: str, row: int, test: int) -> tuple[bytes, str | None]:
    encoded, caption = planted_row(test, 1)
    assert encoded is not None and caption is not None
    if name == "test caption":
        return _jpeg(draw(np.random.default_rng([1, row]))), caption.upper()
    if name == "test picture":
        return encoded, _caption("", row)
    return _jpeg(ImageOps.mirror(Image.open(io.BytesIO(encoded))), 50), _caption("", row)


def _picture(name: str, rng: np.random.Generator) -> Image.Image:
    if name == "small":
        return draw(rng, (16, 30))
    if name == "narrow":
        picture = draw(rng, (200, 250))
        return picture.crop((0, 0, picture.width, 50))
    if name == "blank":
        noise = rng.integers(0, 4, (96, 128, 3), dtype=np.uint8)
        return Image.fromarray(noise + rng.integers(0, 250, 3, dtype=np.uint8))
    picture = draw(rng)
    return picture.filter(ImageFilter.GaussianBlur(0.06 * min(picture.size))) if name == "blurred" else picture


def draw(rng: np.random.Generator, sides: tuple[int, int] = (64, 256)) -> Image.Image:
    """A smooth field of colours, and some flat figures on it: no two are alike."""
    width, height = (int(side) for side in rng.integers(*sides, 2, endpoint=True))
    if max(width, height) > 2.5 * min(width, height):
        height = width
    cells = rng.integers(0, 256, (*rng.integers(3, 9, 2), 3), dtype=np.uint8)
    picture = Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)
    pen, size = ImageDraw.Draw(picture), np.array([width, height])
    for _ in range(rng.integers(3, 10)):
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        start = rng.uniform(-0.1, 0.9, 2) * size
        box = (*start, *(start + rng.uniform(0.08, 0.5, 2) * size))
        figure = rng.integers(4)
        if figure == 0:
            pen.ellipse(box, fill=colour)
        elif figure == 1:
            pen.rectangle(box, fill=colour)
        elif figure == 2:
            pen.polygon([tuple(corner) for corner in rng.uniform(0, 1, (3, 2)) * size], fill=colour)
        else:
            pen.line(box, fill=colour, width=int(rng.integers(1, 6)))
    return picture


def _caption(name: str, row: int) -> str | None:
    rng = np.random.default_rng([3, row])
    is_long = name == "long caption" or KINDS_AFTER.get(row % PERIOD) == "long caption"
    count = 45 if is_long else int(rng.integers(6, 15))
    text = " ".join("".join(rng.choice(_SYLLABLES, 3)) for _ in range(count))
    return {
        "null caption": None,
        "empty caption": "  ",
        "harmful word": f"{text} Porn {text}",
        "harmful word, disguised": f"{text} ｐｏｒ&#110;",
        "tags": f"<p>{text} <b>5 &lt; 6</b><br>&amp; more</p>",
        "mojibake": f"{text} cafÃ© â€œhereâ€\x9d",
        "nothing but tags": '<img src="a.png"/><br>',
        "camera name": f"IMG_{row:04d}",
        "file name": f"holiday {row}.JPG",
        "address": f"https://example.org/{row}",
        "repeated caption": "Buy now, while stocks last!",
    }.get(name, text)


KINDS_AFTER = {place + PERIOD // 2: kind.name for place, kind in enumerate(KINDS)}
"""By place in the period: the fault of the row that repeats this one."""


def _jpeg(picture: Image.Image, quality: int = 90) -> bytes:
    return _saved(picture, format="JPEG", quality=quality)


def _png(picture: Image.Image) -> bytes:
    return _saved(picture, format="PNG", compress_level=1)


def _saved(picture: Image.Image, **options: Any) -> bytes:
    written = io.BytesIO()
    picture.save(written, **options)
    return written.getvalue()


class Score(NamedTuple):
    """How a cleaning fared: by kind the planted rows that met their fate, and clean rows refused."""

    by_kind: dict[str, tuple[int, int]]
    """(rows that became what they should, rows)"""
    clean: int
    clean_refused: int


def number_of(row_id: str) -> int:
    """A planted row by its id, of shards of 2,000 rows: "train-00003-of-00050.parquet/6" => 6006."""
    file, row = row_id.rsplit("/", 1)
    return int(file.split("-")[1]) * _CHUNK + int(row)


def score(out: Path, rows: int) -> Score:
    """rejected.parquet of a cleaning of `rows` planted rows => how it fared."""
    table = pq.read_table(out / "rejected.parquet").to_pylist()
    fates = {number_of(row["id"]): (row["step"], row["reason"]) for row in table}
    by_kind: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    involved = set()  # clean rows of which one of two has to go, whichever
    for row in range(rows):
        kind = kind_of(row)
        if kind is None or (kind.name in COPIES and row < PERIOD // 2):
            continue
        fate, expected = fates.get(row, ("", "")), (kind.step, kind.reason)
        is_right = fate == expected
        if kind.name in COPIES:
            original = row - PERIOD // 2
            involved.add(original)
            pair = {fate, fates.get(original, ("", ""))}
            is_right = pair == {expected, ("", "")}
        right, total = by_kind[kind.name]
        by_kind[kind.name] = right + is_right, total + 1
    clean = [row for row in range(rows) if kind_of(row) is None and row not in involved]
    return Score(dict(by_kind), len(clean), sum(row in fates for row in clean))
