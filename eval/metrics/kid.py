"""KID: the squared maximum mean discrepancy of two sets of features, by the cubic kernel (Binkowski et al. 2018)."""

from __future__ import annotations

import numpy as np

from eval.metrics.pairs import check_pair, strips


# MMD^2_u with k(x, y) = (x . y / d + 1)^3, Binkowski et al. 2018, eq. 3 and 4: unbiased, so it may fall below 0
def kernel_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """(N, D) and (M, D) => the unbiased estimate from all pairs, in float64; not multiplied by anything.

    Reference implementations average over random subsets of 1,000 instead; this is what such averages approach. Raises
    ValueError for fewer than 2 rows, widths that differ and NaN.
    """
    a, b = check_pair("kernel_distance", features_a, features_b, minimum=2)
    within = sum((_sum(part, part) - _diagonal(part)) / (len(part) * (len(part) - 1)) for part in (a, b))
    return float(within - 2 * _sum(a, b) / (len(a) * len(b)))


def _sum(a: np.ndarray, b: np.ndarray) -> float:
    return float(sum(((rows @ columns.T / a.shape[1] + 1) ** 3).sum() for rows in strips(a) for columns in strips(b)))


def _diagonal(a: np.ndarray) -> float:
    return float(sum((((rows * rows).sum(1) / a.shape[1] + 1) ** 3).sum() for rows in strips(a)))


def each_picture(features_a: np.ndarray, features_b: np.ndarray) -> np.ndarray:
    """(N,) what each row of `features_a` adds to the estimate, to first order (Hajek's projection), as its spread is
    what the estimate varies by when other rows are drawn: twice its mean kernel with the others less that with b."""
    a, b = check_pair("kernel_distance", features_a, features_b, minimum=2)
    found = []
    for rows in strips(a):
        within = sum(((rows @ columns.T / a.shape[1] + 1) ** 3).sum(1) for columns in strips(a))
        within = (within - ((rows * rows).sum(1) / a.shape[1] + 1) ** 3) / (len(a) - 1)
        between = sum(((rows @ columns.T / a.shape[1] + 1) ** 3).sum(1) for columns in strips(b)) / len(b)
        found.append(2 * (within - between))
    return np.concatenate(found)
