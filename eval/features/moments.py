"""Features, a batch at a time => their mean and covariance, the same bits however the batches were cut.

Parts that were summed apart, of whole blocks each, merge to the same bits as well. Sums are kept in fixed point: whole
numbers add exactly, in any order. What rounds is the product of one block of BLOCK rows, and the blocks are cut by the
row's number, not by the batch.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from threadpoolctl import ThreadpoolController

from sd_mini.errors import UserError

BLOCK = 512  # rows whose product is taken at once; a process that shares the work takes whole blocks
_COARSE, _FINE = 2.0**20, 2.0**62  # grid points a unit; a sum is coarse / 2^20 + fine / 2^62
_LARGEST = 2.0**42  # of a sum of squares; beyond it the coarse part would overflow
_STRIP = 256  # columns of the covariance worked on at a time, which bounds the memory beside the two sums


class Moments:
    """Sums of D features and of their products, in constant memory: 16 D^2 bytes.

    `add` batches of any size in the order of the rows, `merge` what other processes added. Rows are told apart in
    blocks of BLOCK from the first one on, so merged parts give the same bits as one pass where each part but the last
    holds whole blocks.
    """

    def __init__(self, dim: int):
        self.dim, self.count, self.largest = dim, 0, 0.0
        self._sum, self._products = _zeros(dim), _zeros(dim, dim)
        self._tail = np.empty((0, dim), dtype=np.float32)

    def add(self, features: np.ndarray) -> None:
        """(n, D) floats. Raises ValueError for another shape, for what is not finite, and for what is too large."""
        features = np.asarray(features)
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise UserError(f"features: got shape {features.shape}, expected (n, {self.dim}): use one extractor")
        if not len(features):
            return
        largest = float(np.abs(features).max())
        if not np.isfinite(largest):
            raise UserError(
                "features: got NaN or infinity, expected finite numbers; the pictures or the network are broken"
            )
        self._grow(len(features), largest)
        for start in range(0, len(features), BLOCK):
            self._tail = np.concatenate([self._tail, features[start : start + BLOCK]])
            if len(self._tail) >= BLOCK:
                block, self._tail = self._tail[:BLOCK], self._tail[BLOCK:].copy()
                _accumulate(block, self._sum, self._products)

    def _grow(self, count: int, largest: float) -> None:
        """`count` rows more. Raises ValueError where the sums could then overflow."""
        count, largest = self.count + count, max(self.largest, largest)
        if count * largest**2 >= _LARGEST:
            raise UserError(f"features: {largest:.3g} is too large for exact sums over {count} rows; scale them down")
        self.count, self.largest = count, largest

    def merge(self, other: Moments) -> None:
        """Add what `other` was given, which may have been given in another process. Raises ValueError as `add`."""
        assert self.dim == other.dim
        self._grow(other.count, other.largest)
        for name in ("_sum", "_products"):
            for own, its in zip(getattr(self, name), getattr(other, name), strict=True):
                own += its
        for part in (self, other):
            if len(part._tail):
                _accumulate(part._tail, self._sum, self._products)
        self._tail = self._tail[:0]

    def mean_and_covariance(self) -> tuple[np.ndarray, np.ndarray]:
        """=> (D,) and (D, D), unbiased, in float64. Raises ValueError for fewer than 2 rows, which have none."""
        if self.count < 2:
            raise UserError(f"{self.count} pictures have no covariance; expected at least 2")
        total, covariance = [part.copy() for part in self._sum], np.empty((self.dim, self.dim))
        if len(self._tail):
            _accumulate(self._tail, total, None)
        mean = _value(total) / self.count
        for columns in _strips(self.dim):
            right = slice(columns.start, None)
            strip = [part[columns, right].copy() for part in self._products]
            if len(self._tail):
                _split_onto(_product(self._tail, columns), strip)
            centred = _value(strip) - self.count * np.outer(mean[columns], mean[right])
            covariance[columns, right] = centred / (self.count - 1)
            covariance[columns.stop :, columns] = covariance[columns, columns.stop :].T
        return mean, covariance


def statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, D), N of at least 2, => mean (D,) and covariance (D, D), unbiased, in float64."""
    features = np.asarray(features)
    moments = Moments(features.shape[1])
    moments.add(features)
    return moments.mean_and_covariance()


def _zeros(*shape: int) -> list[np.ndarray]:
    return [np.zeros(shape, dtype=np.int64) for _ in range(2)]


def _strips(dim: int) -> list[slice]:
    return [slice(start, min(start + _STRIP, dim)) for start in range(0, dim, _STRIP)]


def _product(block: np.ndarray, columns: slice) -> np.ndarray:
    """Rows `columns` of block^T block, from the diagonal on: it is symmetric.

    By one thread: the last bits of a product depend on how many share it, and processes have fewer each.
    """
    with _blas().limit(limits=1, user_api="blas"):
        return block[:, columns].T.astype(np.float64) @ block[:, columns.start :].astype(np.float64)


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


def _accumulate(block: np.ndarray, total: list[np.ndarray], products: list[np.ndarray] | None) -> None:
    _split_onto(block.astype(np.float64).sum(0), total)
    if products is None:
        return
    for columns in _strips(block.shape[1]):
        _split_onto(_product(block, columns), [part[columns, columns.start :] for part in products])


def _split_onto(values: np.ndarray, onto: list[np.ndarray]) -> None:
    """Add values, which are used up, to a pair of fixed-point sums. Exact but for what lies below 2^-62."""
    for grid, part in zip((_COARSE, _FINE), onto, strict=True):
        points = np.rint(values * grid)
        part += points.astype(np.int64)
        points /= grid
        values -= points


def _value(pair: list[np.ndarray]) -> np.ndarray:
    return pair[0] / _COARSE + pair[1] / _FINE
