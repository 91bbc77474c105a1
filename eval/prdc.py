"""Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020): is what was made real, and
is what is real made?"""

from __future__ import annotations

import numpy as np

from eval.pairs import check_pair, squared_distances, strips

NEIGHBOURS = 5


# Kynkaanniemi et al. 2019, eq. 1 and 2; Naeem et al. 2020, eq. 4 and 5
def precision_recall_density_coverage(
    real: np.ndarray, made: np.ndarray, neighbours: int = NEIGHBOURS
) -> dict[str, float]:
    """(N, D) and (M, D) => precision, recall and coverage in [0, 1], and density, about 1 where both are alike.

    A ball around a picture reaches to its k-th nearest of its own set. precision: the share of made pictures in any
    real one's ball; recall: of real ones in any made one's; density: real balls a made picture lies in, over k;
    coverage: the share of real balls that hold a made picture. Raises ValueError for no more than k pictures.
    """
    real, made = check_pair("precision_recall_density_coverage", real, made, minimum=neighbours + 1)
    real_radii, made_radii = (_radii(part, neighbours) for part in (real, made))
    in_real, in_made, covered, row = 0, 0, np.zeros(len(real), dtype=bool), 0
    held = np.zeros(len(made), dtype=np.int64)  # real balls each made picture lies in
    for rows in strips(real):
        own = slice(row, row + len(rows))
        found, column = np.zeros(len(rows), dtype=bool), 0
        for columns in strips(made):
            distances, its = squared_distances(rows, columns), slice(column, column + len(columns))
            inside = distances <= real_radii[own, None]
            held[its] += inside.sum(0)
            covered[own] |= inside.any(1)
            found |= (distances <= made_radii[None, its]).any(1)
            column = its.stop
        in_made += int(found.sum())
        row = own.stop
    in_real = int((held > 0).sum())
    return {
        "precision": in_real / len(made),
        "recall": in_made / len(real),
        "density": float(held.sum()) / (neighbours * len(made)),
        "coverage": float(covered.mean()),
    }


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
