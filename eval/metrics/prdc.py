"""Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020): is what was made real, and
is what is real made?"""

from __future__ import annotations

import numpy as np

from eval.metrics.pairs import check_pair, squared_distances, strips

NEIGHBOURS = 5


def precision_recall_density_coverage(
    real: np.ndarray, made: np.ndarray, neighbours: int = NEIGHBOURS
) -> dict[str, float]:
    """(N, D) and (M, D) => precision, recall and coverage in [0, 1], and density, about 1 where both are alike.

    Raises ValueError for no more than k pictures.
    """
    return {name: float(values.mean()) for name, values in each_picture(real, made, neighbours).items()}


# Kynkaanniemi et al. 2019, eq. 1 and 2; Naeem et al. 2020, eq. 4 and 5
def each_picture(real: np.ndarray, made: np.ndarray, neighbours: int = NEIGHBOURS) -> dict[str, np.ndarray]:
    """What each picture adds to the four means: precision and density (M,), recall and coverage (N,).

    A ball around a picture reaches to its k-th nearest of its own set. precision: a made picture lies in any real one's
    ball; recall: a real one lies in any made one's; density: the real balls a made picture lies in, over k; coverage: a
    real ball holds a made picture.
    """
    real, made = check_pair("precision_recall_density_coverage", real, made, minimum=neighbours + 1)
    real_radii, made_radii = (_radii(part, neighbours) for part in (real, made))
    covered, found, row = np.zeros(len(real), dtype=bool), np.zeros(len(real), dtype=bool), 0
    held = np.zeros(len(made), dtype=np.int64)  # real balls each made picture lies in
    for rows in strips(real):
        own, column = slice(row, row + len(rows)), 0
        for columns in strips(made):
            distances, its = squared_distances(rows, columns), slice(column, column + len(columns))
            inside = distances <= real_radii[own, None]
            held[its] += inside.sum(0)
            covered[own] |= inside.any(1)
            found[own] |= (distances <= made_radii[None, its]).any(1)
            column = its.stop
        row = own.stop
    parts = {"precision": held > 0, "recall": found, "density": held / neighbours, "coverage": covered}
    return {name: values.astype(np.float64) for name, values in parts.items()}


def _radii(features: np.ndarray, neighbours: int) -> np.ndarray:
    """The squared distance of each row to its k-th nearest other row."""
    radii = []
    for rows in strips(features):
        nearest = np.empty((len(rows), 0))
        for columns in strips(features):
            together = np.concatenate([nearest, squared_distances(rows, columns)], axis=1)
            keep = min(neighbours + 1, together.shape[1])
            nearest = np.partition(together, keep - 1, axis=1)[:, :keep]
        radii.append(nearest.max(1))  # the row itself, at 0, is one of them
    return np.concatenate(radii)
