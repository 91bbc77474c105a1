"""Which of a picture's captions a draw picks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def drawn_captions(draws: np.ndarray, counts: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """U[0, 1) draws (b,) and how many captions each picture has (b,) => the number of a caption of each (b,) int64.

    `weights` are those of the first, second, ... caption; further ones are not drawn. A picture whose captions all have
    weight 0 draws among them all alike.
    """
    # the inverse of the cumulative distribution, cut off after each picture's own captions
    cumulative = np.cumsum(np.asarray(weights, dtype=np.float64))
    totals = cumulative[np.minimum(counts, len(cumulative)) - 1]
    weighted = np.searchsorted(cumulative, draws * totals, side="right")
    return np.where(totals > 0, weighted, (draws * counts).astype(np.int64))
