"""Made pictures against real ones, as one network sees both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.features import Extractor
from eval.fid import distance_to, frechet_infinity, null_bias
from eval.kid import kernel_distance
from eval.moments import statistics
from eval.prdc import NEIGHBOURS, precision_recall_density_coverage
from eval.reference import Seen, reference

_DRAWS = 200  # of prompts, for the distance's interval
_WIDEST = 256  # features; wider ones take too long for an interval
FEWEST_FOR_A_LINE = 20


def compare(
    extractor: Extractor, made: np.ndarray, real: np.ndarray, prompts: Sequence[str], cache: Path
) -> tuple[dict[str, Any], list[str]]:
    """Two (N, 3, R, R) uint8 => every distance by this network, and what is to be said about them, a line each.

    fd: the Frechet distance, called `name`; low, high: its 95 % interval over prompts, the reference kept;
    fd_infinity, fd_infinity_error: what it would be of infinitely many pictures, and its standard error; bias: the part
    of fd that is there by N alone; kid; precision, recall, density, coverage; n, n_reference, dim, extractor (its
    hash), preprocessing.
    """
    seen, known = Seen.of(extractor(made)), reference(extractor, real, cache)
    count, dim = seen.features.shape
    bias = null_bias(known.covariance, count, len(real))
    found = {
        "name": extractor.distance,
        "fd": seen.distance(known),
        "bias": bias,
        "kid": kernel_distance(seen.features, known.features),
        "n": count,
        "n_reference": len(real),
        "dim": dim,
        "extractor": extractor.hash,
        "preprocessing": extractor.preprocessing,
    }
    remarks = []
    if count < 2 * dim or bias > 0.1 * found["fd"]:
        remarks.append(
            f"{extractor.distance}: {count} pictures are few for {dim} features; about {bias:.3g} of {found['fd']:.3g} "
            "is bias by their number (at unit covariance d (d + 5) / (2 N)): compare at equal N only, or ask for more"
        )
    if dim <= _WIDEST:
        found["low"], found["high"] = _interval(found["fd"], seen, known, prompts)
    if count >= FEWEST_FOR_A_LINE:
        found["fd_infinity"], found["fd_infinity_error"] = frechet_infinity(seen.features, known.mean, known.covariance)
    else:
        remarks.append(f"{extractor.distance} infinity left out: {count} pictures, at least {FEWEST_FOR_A_LINE} needed")
    if min(count, len(real)) > NEIGHBOURS:
        found |= precision_recall_density_coverage(known.features, seen.features)
    else:
        remarks.append(f"precision and recall left out: {count} pictures, more than {NEIGHBOURS} needed")
    return found, remarks


def _interval(value: float, seen: Seen, known: Seen, prompts: Sequence[str]) -> tuple[float, float]:
    """How far the distance moves when other prompts are drawn. Drawn sets hold copies, which adds a bias; so it is
    their spread around their own mean that is laid around the value."""
    clusters = np.unique(np.asarray(prompts), return_inverse=True)[1]
    members = np.split(np.argsort(clusters, kind="stable"), np.cumsum(np.bincount(clusters))[:-1])
    draw, distance, found = np.random.default_rng(0), distance_to(known.mean, known.covariance), []
    for _ in range(_DRAWS):
        rows = np.concatenate([members[i] for i in draw.integers(0, len(members), len(members))])
        found.append(distance(*statistics(seen.features[rows])))
    low, high = np.quantile(np.array(found) - np.mean(found), (0.025, 0.975))
    return value + float(low), value + float(high)
