"""The Frechet distance of two sets of features: FID where they are Inception's (Heusel et al. 2017), and else not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch
from scipy.linalg.blas import dtrmm  # ty: ignore[missing-module-member]  # of a compiled module
from torch import Tensor

from eval.features.moments import statistics
from sd_mini.cpu.threads import one_thread
from sd_mini.errors import UserError

Array = np.ndarray | Tensor
_SIZES = 15  # points of the line through the distances of smaller sets
_SMALLEST = 0.1  # of the whole set, the first of these points; at least 2 D pictures, below which it is no line
_LARGE = 1024  # rows of a matrix from which on its eigenvalues are taken by all cores
_FEWEST = 20  # pictures for a line, of however few features


# |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2), Heusel et al. 2017, eq. 6. With C1 = R R^T the eigenvalues of C1 C2 are
# those of R^T C2 R, which is symmetric, so that all roots are real and nothing complex is computed.
def frechet_distance(mean_a: Array, cov_a: Array, mean_b: Array, cov_b: Array) -> float:
    """Means (D,) and covariances (D, D), of any rank, => the squared distance of the two Gaussians, in float64.

    Symmetric, and 0 for equal ones up to rounding. Raises ValueError for sizes that differ and for NaN.
    """
    return distance_to(mean_b, cov_b)(mean_a, cov_a)


def distance_to(mean_b: Array, cov_b: Array) -> Callable[[Array, Array], float]:
    """`frechet_distance` to one Gaussian whose root is taken once, for many that are compared with it."""
    mean_b, cov_b = (torch.as_tensor(part, dtype=torch.float64) for part in (mean_b, cov_b))
    _check(mean_b, cov_b, mean_b, cov_b)
    root = _root(cov_b)

    def distance(mean_a: Array, cov_a: Array) -> float:
        mean_a, cov_a = (torch.as_tensor(part, dtype=torch.float64) for part in (mean_a, cov_a))
        _check(mean_a, cov_a, mean_b, cov_b)
        product = _congruent(root, cov_a)
        between = _above_rounding(_eigenvalues(product)).sqrt().sum()
        return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * between)

    return distance


def _root(cov: Tensor) -> Tensor:
    """R (D, r) with R R^T = cov: Cholesky's factor, or, of a covariance of lower rank, its scaled eigenvectors."""
    factor, failed = torch.linalg.cholesky_ex(cov)
    smallest = factor.diagonal().square().min()
    if not failed and smallest > len(cov) * torch.finfo(cov.dtype).eps * cov.diagonal().max():
        return factor
    with one_thread():
        values, vectors = torch.linalg.eigh(cov)
    kept = _above_rounding(values) > 0
    return vectors[:, kept] * values[kept].sqrt()


def _eigenvalues(symmetric: Tensor) -> Tensor:
    """(D, D) => (D,), ascending.

    Of a large one by SciPy's LAPACK, which shares out its products: at 2048 three fifths of torch's time on two cores,
    and no more than that where another program keeps both busy. The steps of a small one are too short to share.
    """
    if len(symmetric) < _LARGE:
        with one_thread():  # two took 6 times as long beside other programs
            return torch.linalg.eigvalsh(symmetric)
    return torch.from_numpy(scipy.linalg.eigvalsh(symmetric.numpy(), driver="evd", check_finite=False))


def _congruent(root: Tensor, cov: Tensor) -> Tensor:
    """R (D, r), symmetric C (D, D) => R^T C R. Of a large triangular R in half the products."""
    if len(root) < _LARGE or root.shape[0] != root.shape[1] or root.triu(1).any():
        return root.T @ cov @ root
    upper = root.numpy().T  # BLAS counts by columns: R as it lies is R^T there
    right = dtrmm(1.0, upper, cov.numpy().T, side=1, lower=0, trans_a=1)
    return torch.from_numpy(dtrmm(1.0, upper, right, side=0, lower=0, overwrite_b=1))


def _above_rounding(values: Tensor) -> Tensor:
    """Eigenvalues of what can have none below 0; those that are but rounding, whose roots would add up, as 0."""
    if not len(values):
        return values
    limit = len(values) * torch.finfo(values.dtype).eps * values.max()
    return torch.where(values > limit, values, 0)


def _check(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> None:
    shapes = [tuple(part.shape) for part in (mean_a, cov_a, mean_b, cov_b)]
    (dim,) = shapes[0] if len(shapes[0]) == 1 else (None,)
    if shapes != [(dim,), (dim, dim)] * 2:
        raise UserError(
            f"frechet_distance: got shapes {', '.join(map(str, shapes))}, expected (D,), (D, D), (D,), (D, D): both "
            "sets have to come from the same network"
        )
    if not all(torch.isfinite(part).all() for part in (mean_a, cov_a, mean_b, cov_b)):
        raise UserError("frechet_distance: got NaN or infinity in a mean or a covariance; the features are broken")


# to second order in the sampling error of both sets: tr C for the means, and half of sum l_i l_j / (l_i + l_j), i and j
# unlike, plus half of tr C for the covariances, over the eigenvalues l of C
def null_bias(covariance: Array, count_a: int, count_b: int) -> float:
    """About what the distance of two sets of so many pictures from one Gaussian (D, D) is, instead of 0.

    At unit covariance and N pictures each, d (d + 5) / (2 N).
    """
    values = _above_rounding(_eigenvalues(torch.as_tensor(covariance, dtype=torch.float64)))
    values = values[values > 0]
    pairs = values[:, None] * values / (values[:, None] + values)
    unlike = pairs.sum() - pairs.diagonal().sum()
    return float((1.5 * values.sum() + unlike / 2) * (1 / count_a + 1 / count_b))


# Chong & Forsyth 2020: the distance is linear in 1/N, and its value at 1/N = 0 has no bias by the number of pictures
def frechet_infinity(
    features: Array, mean_b: Array, cov_b: Array, seed: int = 0, sizes: int = _SIZES
) -> tuple[float, float]:
    """(N, D) and a reference => the distance that infinitely many pictures would have, and the fit's standard error.

    The line is fitted through `sizes` subsets drawn by `seed`, from a tenth of N, or 2 D where that is more, to N. The
    error says how far other subsets of these pictures would move it (HC3, MacKinnon & White 1985: small subsets vary
    more). What other pictures would change is not in it, and is most of what varies: see `distances.infinity`.

    Raises ValueError for fewer pictures than `fewest_for_a_line`.
    """
    features = np.asarray(features)
    count, dim = features.shape
    if count < fewest_for_a_line(dim):
        raise UserError(
            f"frechet_infinity: {count} pictures are too few for a line over {dim} features; expected at least "
            f"{fewest_for_a_line(dim)}"
        )
    distance, draw = distance_to(mean_b, cov_b), np.random.default_rng(seed)
    counts = np.linspace(max(_SMALLEST * count, 2 * dim), count, sizes).round().astype(int)
    distances = np.array([distance(*statistics(features[draw.permutation(count)[:n]])) for n in counts])
    design = np.stack([1 / counts, np.ones(sizes)], axis=1)
    inverse = np.linalg.pinv(design)
    leverage = np.einsum("ij,ji->i", design, inverse)
    residuals = distances - design @ (inverse @ distances)
    weights = inverse[1]  # of the distances in the value at 1/N = 0
    return float(weights @ distances), float(np.sqrt(np.sum((weights * residuals / (1 - leverage)) ** 2)))


def fewest_for_a_line(dim: int) -> int:
    """Pictures, so that the line's smallest subset, of 2 D, is at most half of them."""
    return max(_FEWEST, 4 * dim)
