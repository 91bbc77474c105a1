"""How far a mean would move had other prompts been asked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DRAWS = 1000


# the cluster bootstrap (Field & Welsh 2007): pictures of one prompt are not independent, so prompts are drawn, whole
def prompt_interval(values: Sequence[float], prompts: Sequence[str], seed: int = 0) -> tuple[float, float]:
    """One value a picture, and its prompt, => the 95 % percentile interval of the mean over pictures.

    Raises ValueError for values and prompts that do not match in number, or none.
    """
    if len(values) != len(prompts) or not len(values):
        raise ValueError(f"prompt_interval: got {len(values)} values for {len(prompts)} prompts, expected one for each")
    clusters = np.unique(np.asarray(prompts), return_inverse=True)[1]
    sums = np.bincount(clusters, weights=np.asarray(values, dtype=np.float64))
    counts = np.bincount(clusters)
    drawn = np.random.default_rng(seed).integers(0, len(sums), (DRAWS, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
