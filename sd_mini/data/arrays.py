"""Pictures in memory or in a cache on disk, read alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from sd_mini.data.batches import Rows

Pictures = np.ndarray | Rows  # (N, 3, R, R) uint8 sRGB, in memory or on disk


def pieces(pictures: Pictures) -> Iterator[np.ndarray]:
    """All pictures in order, those on disk some megabytes at a time."""
    return pictures.pieces() if isinstance(pictures, Rows) else iter([pictures])


def taken(pictures: Pictures, rows: Sequence[int] | np.ndarray) -> Pictures:
    """Some of the pictures; those on disk stay there."""
    return pictures.select(rows) if isinstance(pictures, Rows) else pictures[np.asarray(rows, np.int64)]
