"""Pictures in memory or in a cache on disk, of one size or of several, mirrored or not: all are read alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from sd_mini.data.batches import Rows  # imports torch, which processes that only decode do not need

PIECE = 2**25  # bytes of rows that are read at a time where all are

Alike: TypeAlias = "np.ndarray | Rows | Mirrored"  # (N, ...), all rows of one shape
Pictures: TypeAlias = "Alike | Buckets"  # (N, 3, H, W) uint8 sRGB


class Mirrored:
    """N pictures (N, C, H, W), and after them their N mirror images; `rows` and `turned` choose among these."""

    def __init__(self, pictures: np.ndarray | Rows, rows: np.ndarray | None = None, turned: np.ndarray | None = None):
        count = len(pictures)
        self.pictures = pictures
        self.rows = np.tile(np.arange(count), 2) if rows is None else rows
        self.turned = np.repeat([False, True], count) if turned is None else turned
        self.shape: tuple[int, ...] = (len(self.rows), *pictures.shape[1:])
        self.dtype = pictures.dtype

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, ids: Any) -> np.ndarray:
        found, is_turned = self.pictures[self.rows[ids]], self.turned[ids]
        return np.where(np.asarray(is_turned)[..., None, None, None], found[..., ::-1], found)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (row for piece in self.pieces() for row in piece)

    def pieces(self) -> Iterator[np.ndarray]:
        return pieces_of(self)

    def select(self, ids: np.ndarray) -> Mirrored:
        return Mirrored(self.pictures, self.rows[ids], self.turned[ids])


class Buckets:
    """Rows of several shapes, numbered through: those of the first shape, then those of the next.

    [3] is one row; a slice or (B,) row numbers are several, which have to be of one shape: raises IndexError.
    """

    def __init__(self, parts: Sequence[Alike]):
        self.parts = list(parts)
        self.edges = np.cumsum([0, *map(len, self.parts)])

    def __len__(self) -> int:
        return int(self.edges[-1])

    def __iter__(self) -> Iterator[np.ndarray]:
        return (row for part in self.parts for row in part)

    def __getitem__(self, ids: Any) -> np.ndarray:
        is_one = isinstance(ids, int | np.integer)
        numbers = np.arange(len(self))[ids] if isinstance(ids, slice | int | np.integer) else np.asarray(ids)
        part, inner = located(self, np.atleast_1d(numbers))
        return part[inner[0] if is_one else inner]

    def pieces(self) -> Iterator[np.ndarray]:
        return (piece for part in self.parts for piece in pieces(part))

    def select(self, ids: np.ndarray) -> Pictures:
        """These rows alone, in this order, which has to keep those of one shape together, in the order of the parts."""
        numbers = np.searchsorted(self.edges, ids, side="right") - 1
        if (np.diff(numbers) < 0).any():
            raise IndexError("rows of one shape have to stay together; give row numbers in order")
        chosen = [(k, ids[numbers == k] - self.edges[k]) for k in np.unique(numbers)]
        return joined([taken(self.parts[k], inner) for k, inner in chosen])


def pieces_of(rows: Rows | Mirrored) -> Iterator[np.ndarray]:
    """All rows in order, PIECE bytes at a time."""
    step = max(1, PIECE // max(1, rows.dtype.itemsize * int(np.prod(rows.shape[1:]))))
    return (rows[start : start + step] for start in range(0, len(rows), step))


def joined(parts: Sequence[Any]) -> Any:
    """Arrays, each of rows of one shape => one; a single one is itself."""
    return parts[0] if len(parts) == 1 else Buckets(parts)


def located(rows: Any, ids: np.ndarray) -> tuple[Any, np.ndarray]:
    """Row numbers => the array of their shape, and their row numbers there. Raises IndexError for several shapes."""
    if not isinstance(rows, Buckets):
        return rows, ids
    numbers = np.unique(np.searchsorted(rows.edges, ids, side="right") - 1)
    if len(numbers) != 1:
        raise IndexError(f"{len(ids)} rows are of {len(numbers)} shapes, expected one; see CaptionedPictures.spans")
    return rows.parts[numbers[0]], ids - rows.edges[numbers[0]]


def spans(rows: Any) -> list[range]:
    """The row numbers of each shape."""
    edges = rows.edges if isinstance(rows, Buckets) else [0, len(rows)]
    return [range(int(a), int(b)) for a, b in pairwise(edges)]


def shapes_of(rows: Any) -> list[tuple[int, ...]]:
    """The shape of one row, of each shape in turn."""
    return [part.shape[1:] for part in (rows.parts if isinstance(rows, Buckets) else [rows])]


def pieces(pictures: Pictures) -> Iterator[np.ndarray]:
    """All pictures in order, those on disk some megabytes at a time."""
    return iter([pictures]) if isinstance(pictures, np.ndarray) else pictures.pieces()


def taken(pictures: Any, rows: Sequence[int] | np.ndarray) -> Any:
    """Some of the pictures; those on disk stay there."""
    rows = np.asarray(rows, np.int64)
    return pictures[rows] if isinstance(pictures, np.ndarray) else pictures.select(rows)


def with_mirror_images(pictures: Pictures) -> Pictures:
    """Each shape's pictures, and after them their mirror images."""
    parts: list[Any] = pictures.parts if isinstance(pictures, Buckets) else [pictures]
    assert not any(isinstance(part, Mirrored) for part in parts)
    return joined([Mirrored(part) for part in parts])
