"""Pictures in memory or in a cache on disk, read alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from sd_mini.data.batches import Rows  # imports torch, which processes that only decode do not need

Pictures: TypeAlias = "np.ndarray | Rows"  # (N, 3, R, R) uint8 sRGB, in memory or on disk


def pieces(pictures: Pictures) -> Iterator[np.ndarray]:
    """All pictures in order, those on disk some megabytes at a time."""
    return iter([pictures]) if isinstance(pictures, np.ndarray) else pictures.pieces()


def taken(pictures: Pictures, rows: Sequence[int] | np.ndarray) -> Pictures:
    """Some of the pictures; those on disk stay there."""
    return pictures[np.asarray(rows, np.int64)] if isinstance(pictures, np.ndarray) else pictures.select(rows)
