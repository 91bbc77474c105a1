"""Cached arrays, memory-mapped from shards on disk, and read like numpy's."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

# bytes copied out between two releases of the pages they were read from; they stay in the system's cache of files
_RESIDENT = 2**25
PIECE = 2**25  # bytes of rows that `pieces` holds at a time


class Rounding(NamedTuple):
    """What the float format on disk cost an array: the largest absolute error, and both root mean squares."""

    largest: float
    rms_error: float
    rms: float

    @property
    def relative(self) -> float:
        return self.rms_error / self.rms if self.rms else 0.0

    def __str__(self) -> str:
        return f"at most {self.largest:.2g}, rms {self.relative:.2g} of the values' rms"


class Stored(NamedTuple):
    """One array of one shard, memory-mapped, and what its float format cost."""

    array: np.ndarray
    rounding: Rounding | None


class Rows:
    """N rows of a cached array, (N, ...), memory-mapped from its shards; what is read is copied out.

    rows[3] is one row, rows[a:b] and rows[ids] are several; `select(ids)` is a part of them that stays on disk.
    `rounding`: measured while encoding; None for whole numbers.
    """

    def __init__(self, parts: Sequence[Stored], ids: np.ndarray | None = None):
        self.parts, self.shards, self.rounding = list(parts), [part.array for part in parts], None
        self.edges = np.cumsum([0, *map(len, self.shards)])
        self._ids = ids
        self.shape: tuple[int, ...] = (int(self.edges[-1]) if ids is None else len(ids), *self.shards[0].shape[1:])
        self.dtype = self.shards[0].dtype
        self._maps = [found for shard in self.shards if isinstance(found := _map_of(shard), mmap.mmap)]
        self._copied = 0
        if parts[0].rounding is not None:
            errors, weights = np.array([part.rounding for part in parts]), np.diff(self.edges) / self.edges[-1]
            self.rounding = Rounding(float(errors[:, 0].max()), *np.sqrt(weights @ errors[:, 1:] ** 2).tolist())

    def __len__(self) -> int:
        return self.shape[0]

    def select(self, ids: Sequence[int] | np.ndarray) -> Rows:
        """These rows alone, in this order; nothing is read."""
        ids = self._checked(ids)
        return Rows(self.parts, ids if self._ids is None else self._ids[ids])

    def pieces(self) -> Iterator[np.ndarray]:
        """All rows in order, some megabytes at a time."""
        step = max(1, PIECE // max(1, self.dtype.itemsize * int(np.prod(self.shape[1:]))))
        return (self[start : start + step] for start in range(0, len(self), step))

    def __iter__(self) -> Iterator[np.ndarray]:
        return (row for piece in self.pieces() for row in piece)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype, copy=False)

    def __getitem__(self, ids: Any) -> np.ndarray:
        """A row number => (...); a slice or (B,) row numbers => (B, ...). Raises IndexError outside 0..len - 1."""
        if isinstance(ids, slice):
            return self._gather(np.arange(len(self))[ids])
        if isinstance(ids, int | np.integer):
            return self._gather(self._checked([ids]))[0]
        return self._gather(self._checked(ids))

    def _checked(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        ids = np.asarray(ids)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise IndexError(f"expected a list of row numbers, got {ids.dtype} of shape {ids.shape}")
        if ids.size and (ids.min() < 0 or ids.max() >= len(self)):
            raise IndexError(f"row numbers {ids.min()}..{ids.max()}, expected them in 0..{len(self) - 1}")
        return ids.astype(np.int64)

    def _gather(self, ids: np.ndarray) -> np.ndarray:
        ids = ids if self._ids is None else self._ids[ids]
        order = np.argsort(ids)  # shard by shard, in the order on disk
        ordered = ids[order]
        cuts = np.searchsorted(ordered, self.edges)
        out = np.empty((len(ids), *self.shape[1:]), self.dtype)
        for number in np.flatnonzero(np.diff(cuts)):
            here = slice(cuts[number], cuts[number + 1])
            out[order[here]] = self.shards[number][ordered[here] - self.edges[number]]
        self._release(out.nbytes)
        return out

    def _release(self, copied: int) -> None:
        """Let go of the pages once enough was copied out: else, page by page, the whole file becomes this process's."""
        self._copied += copied
        if self._copied < _RESIDENT:
            return
        self._copied = 0
        for pages in self._maps if hasattr(mmap, "MADV_DONTNEED") else ():
            pages.madvise(mmap.MADV_DONTNEED)


Pictures = np.ndarray | Rows  # (N, 3, R, R) uint8 sRGB, in memory or on disk


def pieces(pictures: Pictures) -> Iterator[np.ndarray]:
    """All pictures in order, those on disk some megabytes at a time."""
    return pictures.pieces() if isinstance(pictures, Rows) else iter([pictures])


def taken(pictures: Pictures, rows: Sequence[int] | np.ndarray) -> Pictures:
    """Some of the pictures; those on disk stay there."""
    return pictures.select(rows) if isinstance(pictures, Rows) else pictures[np.asarray(rows, np.int64)]


def _map_of(array: Any) -> Any:
    """The memory map that an array is a view of, if it is one."""
    while isinstance(array, np.ndarray):
        if isinstance(array, np.memmap):
            return array._mmap
        array = array.base
    return None
