"""What every distance between two sets of features begins with."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sd_mini.errors import UserError

_ROWS = 1024  # of each set at a time, so that no distance needs all pairs in memory


def check_pair(name: str, a: np.ndarray, b: np.ndarray, minimum: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Raises ValueError, `name` first, unless both are (at least `minimum`, D) finite floats of one width D."""
    a, b = np.asarray(a), np.asarray(b)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise UserError(
            f"{name}: got features of shapes {a.shape} and {b.shape}, expected (N, D) and (M, D) of one network"
        )
    if min(len(a), len(b)) < minimum:
        raise UserError(f"{name}: got {len(a)} and {len(b)} pictures, expected at least {minimum} of each")
    for part in (a, b):
        if not all(np.isfinite(rows).all() for rows in strips(part)):
            raise UserError(f"{name}: got NaN or infinity in the features; the pictures or the network are broken")
    return a, b


def strips(features: np.ndarray) -> Iterator[np.ndarray]:
    """(N, D) => parts of its rows, in float64."""
    for start in range(0, len(features), _ROWS):
        yield features[start : start + _ROWS].astype(np.float64)


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n, D) and (m, D) float64 => (n, m), none below 0."""
    both = (a * a).sum(1)[:, None] + (b * b).sum(1)
    return np.maximum(both - 2 * (a @ b.T), 0)
