"""Are pictures made, or copied? The nearest training picture of each, beside that of pictures nobody trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import binom

from eval.features.reference import pictures_hash, reference
from eval.judge.judge import wilson
from eval.metrics.pairs import check_pair, squared_distances, strips
from eval.metrics.registry import Metric, Row, Sample, percent_row
from sd_mini.data.arrays import Pictures, pieces, taken

QUANTILE = 0.05  # of the held-out pictures' distances, below which a picture is closer than is to be expected
SIDE = 16  # px at which pixels are compared


@dataclass(frozen=True, eq=False)
class Nearest:
    """(N,) each: the root mean square difference to the nearest training picture, and its number."""

    distances: np.ndarray
    numbers: np.ndarray


def small_pixels(pictures: Pictures) -> np.ndarray:
    """(N, 3, H, W) uint8 => (N, 3 * 16 * 16) float32 in [0, 255], each cell the mean of its pixels."""
    parts = (part for piece in pieces(pictures) for part in torch.from_numpy(np.ascontiguousarray(piece)).split(512))
    small, row = np.empty((len(pictures), 3 * SIDE * SIDE), np.float32), 0
    for part in parts:
        small[row : row + len(part)] = torch.nn.functional.adaptive_avg_pool2d(part.float(), SIDE).flatten(1).numpy()
        row += len(part)
    return small


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
    is about QUANTILE. low, high: its 95 % interval, in which both sets are samples. median_ratio: the median distance
    over the held-out ones', where that is not 0; n, n_held_out.
    """
    count, known = len(made.distances), len(held_out.distances)
    close = int((made.distances < np.quantile(held_out.distances, QUANTILE)).sum())
    low, high = _two_sample_interval(made.distances, held_out.distances, close)
    found = {
        "copied": close / count,
        "low": low,
        "high": high,
        "expected": QUANTILE,
        "n": count,
        "n_held_out": known,
    }
    typical = float(np.median(held_out.distances))
    return found | ({"median_ratio": float(np.median(made.distances)) / typical} if typical else {})


# Zou & Donner 2008: the two distances from the estimate to its limits, one for each source of error, add up as squares
def _two_sample_interval(made: np.ndarray, held_out: np.ndarray, close: int) -> tuple[float, float]:
    """Of the share `close` of those made: Wilson's, widened by how far the held-out quantile itself may lie off.

    So many of the held-out ones lie below the true quantile as the binomial distribution says.
    """
    share, (low, high) = close / len(made), wilson(close, len(made))
    levels = binom.ppf((0.025, 0.975), len(held_out), QUANTILE) / len(held_out)
    least, most = (float((made < np.quantile(held_out, level)).mean()) for level in levels)
    return (
        max(0.0, share - math.hypot(share - low, share - least)),
        min(1.0, share + math.hypot(high - share, most - share)),
    )


def _measure(sample: Sample) -> dict[str, Any] | None:
    """By pixels and by the first network's features, beside the reference pictures that nothing was trained on."""
    from eval.analysis.blame import MADE  # which imports metrics of the same registry

    pictures, question, training = sample.pictures, sample.question, sample.tools.training
    if training is None:
        sample.remarks.append("memorisation left out: the training pictures are not known")
        return None
    extractor, cache = sample.tools.networks[0], sample.tools.cache
    small = small_pixels(training.pictures)
    sample.nearest = nearest(small_pixels(pictures), small)
    trained = {pictures_hash(picture) for picture in training.pictures}
    held_out = np.array([pictures_hash(picture) not in trained for picture in question.reference])
    trained_on = int((~held_out).sum())
    remark = f"memorisation: {trained_on} of {len(held_out)} reference pictures are training pictures"
    if trained_on and held_out.sum() < 1 / QUANTILE:
        sample.remarks.append(f"{remark}; left out: compare with a split that was not trained on")
        return None
    if trained_on:
        sample.remarks.append(f"{remark}; only the others stand for held-out ones")
    apart = taken(question.reference, np.flatnonzero(held_out))
    part = {"pixels": audit(sample.nearest, nearest(small_pixels(apart), small))}
    known = reference(extractor, training.pictures, cache).features
    held_out_features = reference(extractor, question.reference, cache).features[held_out]
    part[extractor.name] = audit(nearest(sample.features(extractor, MADE), known), nearest(held_out_features, known))
    return {"training": training.name, "n_training": len(training), **part}


def _rows(part: Mapping[str, Any]) -> list[Row]:
    # by the network's features: pictures that are a little blurred always pass the comparison by pixels
    network = next(name for name in part if name not in ("training", "n_training", "pixels"))
    scores = part[network]
    name = f"closer to training pictures than {scores['expected']:.0%} of held-out ones, by {network}"
    return [percent_row(name, scores, "copied", scores["n"])]


MEMORISATION = Metric("memorisation", _measure, _rows)
