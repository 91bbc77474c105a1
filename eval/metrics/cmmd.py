"""CMMD: the maximum mean discrepancy of two sets of CLIP embeddings by a Gaussian kernel (Jayasumana et al. 2024)."""

from __future__ import annotations

import numpy as np

from eval.metrics.pairs import check_pair, squared_distances, strips

SIGMA = 10.0  # the kernel's width
SCALE = 1000.0


# 1000 (mean k(a, a) + mean k(b, b) - 2 mean k(a, b)), k(x, y) = exp(-|x - y|^2 / (2 sigma^2)), sigma = 10: Jayasumana
# et al. 2024, eq. 3 and 4. As in their code the means include each row with itself, so the estimate is biased upwards.
def cmmd(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """(N, D) and (M, D) => the distance, in float64; equal sets give 0. CLIP's embeddings are given at length 1.

    Raises ValueError for empty sets, widths that differ and NaN.
    """
    a, b = check_pair("cmmd", features_a, features_b)
    return SCALE * (_mean(a, a) + _mean(b, b) - 2 * _mean(a, b))


def _mean(a: np.ndarray, b: np.ndarray) -> float:
    kernels = (
        np.exp(squared_distances(rows, columns) / (-2 * SIGMA**2)).sum() for rows in strips(a) for columns in strips(b)
    )
    return float(sum(kernels)) / (len(a) * len(b))
