"""The Frechet distance of two sets of features: FID where they are Inception's (Heusel et al. 2017), and else not."""

from __future__ import annotations

import torch
from torch import Tensor


def statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """(N, D), N of at least 2, => mean (D,) and covariance (D, D), unbiased, in float64."""
    if len(features) < 2:
        raise ValueError(f"{len(features)} pictures have no covariance; expected at least 2")
    features = features.double()
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


# |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2), Heusel et al. 2017, eq. 6, in a form whose roots are real
def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Means (D,) and covariances (D, D), of any rank, => the squared distance of the two Gaussians, in float64."""
    values, vectors = torch.linalg.eigh(cov_a.double())
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    between = torch.linalg.eigvalsh(root @ cov_b.double() @ root).clamp(min=0).sqrt().sum()
    shift = (mean_a.double() - mean_b.double()).square().sum()
    return float(shift + cov_a.double().trace() + cov_b.double().trace() - 2 * between)
