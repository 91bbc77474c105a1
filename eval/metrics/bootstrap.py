"""How far a mean would move had other prompts been asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

DRAWS = 1000
FEWEST = 30  # clusters to draw from; below it their spread tells too little (Cameron, Gelbach & Miller 2008, sec. I)


def few_prompts(prompts: Sequence[str]) -> int | None:
    """The number of different prompts where it is below FEWEST and each stands for several pictures; else none."""
    different = len(set(prompts))
    return different if different < FEWEST and len(prompts) >= 2 * different else None


def bootstrap_rows(prompts: Sequence[str], draws: int, seed: int = 0) -> Iterator[np.ndarray]:
    """`draws` times the rows of a set of pictures as it might have been.

    Pictures of one prompt are not independent, so prompts are drawn, whole (the cluster bootstrap, Field & Welsh 2007).
    Where prompts are few, pictures are drawn within each: the interval is then over pictures of these very prompts.
    """
    clusters = np.unique(np.asarray(prompts), return_inverse=True)[1]
    order, counts = np.argsort(clusters, kind="stable"), np.bincount(clusters)
    starts, draw = np.cumsum(counts) - counts, np.random.default_rng(seed)
    members = np.split(order, starts[1:])
    own = np.repeat(np.arange(len(counts)), counts)
    for _ in range(draws):
        if few_prompts(prompts) is None:
            yield np.concatenate([members[i] for i in draw.integers(0, len(counts), len(counts))])
        else:
            yield order[starts[own] + draw.integers(0, counts[own])]


def prompt_interval(values: Sequence[float] | np.ndarray, prompts: Sequence[str], seed: int = 0) -> tuple[float, float]:
    """One value a picture, and its prompt, => the 95 % percentile interval of the mean over pictures.

    Raises ValueError for values and prompts that do not match in number, or none.
    """
    if len(values) != len(prompts) or not len(values):
        raise ValueError(f"prompt_interval: got {len(values)} values for {len(prompts)} prompts, expected one for each")
    numbers = np.asarray(values, dtype=np.float64)
    low, high = np.quantile([numbers[rows].mean() for rows in bootstrap_rows(prompts, DRAWS, seed)], (0.025, 0.975))
    return float(low), float(high)
