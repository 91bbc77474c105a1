"""Are pictures made, or copied? The nearest training picture of each, beside that of pictures nobody trained on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from eval.composition import wilson
from eval.pairs import check_pair, squared_distances, strips

QUANTILE = 0.05  # of the held-out pictures' distances, below which a picture is closer than is to be expected
SIDE = 16  # px at which pixels are compared


@dataclass(frozen=True, eq=False)
class Nearest:
    """(N,) each: the root mean square difference to the nearest training picture, and its number."""

    distances: np.ndarray
    numbers: np.ndarray


def small_pixels(pictures: np.ndarray) -> np.ndarray:
    """(N, 3, H, W) uint8 => (N, 3 * 16 * 16) float32 in [0, 255], each cell the mean of its pixels."""
    parts = torch.from_numpy(np.ascontiguousarray(pictures)).split(512)
    small = [torch.nn.functional.adaptive_avg_pool2d(part.float(), SIDE).flatten(1) for part in parts]
    return torch.cat(small).numpy()


def nearest(features: np.ndarray, training: np.ndarray) -> Nearest:
    """(N, D) and (T, D) of any features => each row's nearest of the T. Raises ValueError for sizes that differ."""
    features, training = check_pair("memorisation", features, training)
    distances, numbers = [], []
    for rows in strips(features):
        best, where, start = np.full(len(rows), np.inf), np.zeros(len(rows), dtype=np.int64), 0
        for columns in strips(training):
            found = squared_distances(rows, columns)
            closest = found.argmin(1)
            value = found[np.arange(len(rows)), closest]
            where = np.where(value < best, closest + start, where)
            best, start = np.minimum(value, best), start + len(columns)
        distances.append(np.sqrt(best / features.shape[1]))
        numbers.append(where)
    return Nearest(np.concatenate(distances), np.concatenate(numbers))


def audit(made: Nearest, held_out: Nearest) -> dict[str, float]:
    """What was made beside held-out pictures, both by their nearest training pictures.

    copied: the share of made pictures closer to one than QUANTILE of the held-out ones are; where nothing is copied it
    is about QUANTILE. low, high: its 95 % interval. median_ratio: the median distance over the held-out ones'; n.
    """
    limit = float(np.quantile(held_out.distances, QUANTILE))
    close = int((made.distances < limit).sum())
    low, high = wilson(close, len(made.distances))
    typical = float(np.median(held_out.distances))
    return {
        "copied": close / len(made.distances),
        "low": low,
        "high": high,
        "expected": QUANTILE,
        "median_ratio": float(np.median(made.distances)) / typical if typical else float("nan"),
        "n": len(made.distances),
    }
