"""Diversity within a prompt: how unlike the pictures of one prompt are, as a share of what real pictures of it are.

A model may get every picture right, and near to real ones as a set, by making the same picture of a prompt each time:
what compares sets of one picture a prompt does not see that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from scipy.stats import binom

from eval.judge.judge import judge_found, read_picture
from eval.makers.repeated import Repeated, several_of_each
from eval.metrics.bootstrap import DRAWS
from eval.metrics.pairs import squared_distances
from eval.metrics.registry import Metric, Row, Sample
from sd_mini.shapes import AnyScene

LAYOUTS = {2: 6, 3: 4}  # like objects => in how many ways they fill the four quarters, which the data draws alike
ORDERS = {2: 2, 3: 6}  # of level 2, groups => in how many orders their rows stand, which the data draws alike


# Friedman & Dieng 2023, eq. 1: the exponential of the entropy of the eigenvalues of K / n
def vendi_score(similarities: np.ndarray) -> float:
    """(n, n), symmetric, ones on the diagonal => from 1, all alike, to n, nothing alike: the effective number of
    different pictures."""
    values = np.linalg.eigvalsh(similarities / len(similarities))
    kept = values[values > 1e-12]
    return float(np.exp(-(kept * np.log(kept)).sum()))


def within_prompts(made: np.ndarray, real: np.ndarray, prompts: Sequence[str]) -> dict[str, Any]:
    """Features (N, D) of pictures made, and of real ones, each prompt's side by side => `vendi` and `distance`.

    vendi: of the Vendi score less 1, distance: of the mean distance between two pictures, what those made have as a
    share of the real ones, both summed over prompts. Similarity is exp(-d^2 / (2 s^2)), s^2 the median squared distance
    of two real pictures of a prompt. Real pictures that are all the same give None for both.
    """
    squares = [[_between(part) for part in parts] for parts in (_by_prompt(made, prompts), _by_prompt(real, prompts))]
    pairs = np.concatenate([part[np.triu_indices(len(part), 1)] for part in squares[1]])
    scale = float(np.median(pairs))
    if not scale:
        return {"vendi": None, "distance": None}
    effective = [[vendi_score(np.exp(-part / (2 * scale))) - 1 for part in parts] for parts in squares]
    distance = [[np.sqrt(part).sum() / (len(part) * (len(part) - 1)) for part in parts] for parts in squares]
    return {"vendi": share(*effective), "distance": share(*distance)}


def layouts(found: Sequence[Any], scenes: Sequence[AnyScene], prompts: Sequence[str]) -> dict[str, Any] | None:
    """Objects found in each picture => how evenly the right pictures of a count prompt fill the picture's quarters, or,
    of level 2, how evenly those of a prompt of groups take the orders in which these stand.

    The entropy of the layouts, summed over prompts, as a share of what as many drawings of the data have on average.
    None where no prompt has two right pictures. `n`: right pictures.
    """
    made, real, n = [], [], 0
    for rows in _rows_by_prompt(prompts):
        scene = scenes[rows.start]
        ways = _ways(scene)
        right = [found[row] for row in rows if judge_found(found[row], scenes[row]).exact] if ways else []
        if ways and len(right) > 1:
            filled = Counter(_layout(objects, scene) for objects in right)
            made.append(_entropy(np.array(list(filled.values())) / len(right)))
            real.append(_expected_entropy(len(right), ways))
            n += len(right)
    return {**share(made, real), "n": n} if made else None


def _ways(scene: AnyScene) -> int | None:
    """In how many ways the data lays a scene out; None of one whose layouts are not counted."""
    if scene.kind == "groups":
        return ORDERS[len(scene.groups)]
    return LAYOUTS.get(scene.groups[0].count) if scene.kind == "count" else None


def _layout(objects: Sequence[Any], scene: AnyScene) -> Hashable:
    """Which quarters the objects fill; of groups, their colours from the top."""
    if scene.kind == "groups":
        heights = {group.colour: [one.y for one in objects if one.colour == group.colour] for group in scene.groups}
        return tuple(sorted(heights, key=lambda colour: float(np.mean(heights[colour]))))
    return frozenset((one.x > 0.5, one.y > 0.5) for one in objects)


def share(made: Sequence[float], real: Sequence[float]) -> dict[str, float]:
    """One value a prompt => the ratio of the sums, with the 95 % interval over prompts (cluster bootstrap)."""
    pairs, draw = np.array([made, real], dtype=np.float64), np.random.default_rng(0)
    rows = draw.integers(0, len(made), (DRAWS, len(made)))
    drawn = pairs[:, rows].sum(2)
    low, high = np.quantile(drawn[0] / drawn[1], (0.025, 0.975))
    total = pairs.sum(1)
    return {"share": float(total[0] / total[1]), "low": float(low), "high": float(high), "n_prompts": len(made)}


def _entropy(shares: np.ndarray) -> float:
    return float(-(shares * np.log(shares)).sum())


def _expected_entropy(count: int, ways: int) -> float:
    """The mean entropy of the shares of `count` draws from `ways` equally likely layouts: below log(ways)."""
    times = np.arange(1, count + 1)
    shares = times / count
    return float(-ways * (binom.pmf(times, count, 1 / ways) * shares * np.log(shares)).sum())


def _between(features: np.ndarray) -> np.ndarray:
    """(n, D) => (n, n) squared distances, 0 on the diagonal."""
    squares = squared_distances(features, features)
    np.fill_diagonal(squares, 0)
    return squares


def _rows_by_prompt(prompts: Sequence[str]) -> list[range]:
    rows, start = [], 0
    for _, own in groupby(prompts):
        count = len(list(own))
        rows.append(range(start, start + count))
        start += count
    return rows


def _by_prompt(features: np.ndarray, prompts: Sequence[str]) -> list[np.ndarray]:
    every = np.asarray(features, dtype=np.float64)
    return [every[rows.start : rows.stop] for rows in _rows_by_prompt(prompts)]


def measure_repeated(sample: Sample, repeated: Repeated, pictures: np.ndarray) -> dict[str, Any]:
    """What is measured on `pictures`, which were made of `repeated.captions`."""
    part: dict[str, Any] = {"compared_with": repeated.source}
    for extractor in sample.tools.networks:
        found = within_prompts(extractor(pictures), extractor(repeated.real), repeated.captions)
        if found["vendi"] is None:
            sample.remarks.append("diversity left out: most real pictures of a prompt are one and the same")
        else:
            part[extractor.name] = found
    if repeated.scenes is not None:
        found = [read_picture(picture, repeated.scenes[0].level) for picture in pictures]
        part["layouts"] = layouts(found, repeated.scenes, repeated.captions)
        if part["layouts"] is None:
            sample.remarks.append("layouts left out: no count prompt has two right pictures")
            del part["layouts"]
    return part


def _measure(sample: Sample) -> dict[str, Any] | None:
    repeated = sample.question.repeated
    if repeated is None or sample.repeated is None:
        if several_of_each(sample.prompts):
            sample.remarks.append("diversity left out: no real pictures of these prompts, or nearest ones, are known")
        return None
    return measure_repeated(sample, repeated, sample.repeated)


def _rows(part: Mapping[str, Any]) -> list[Row]:
    rows = []
    for name, found in part.items():
        if name == "compared_with":
            continue
        is_layouts = name == "layouts"
        scores = found if is_layouts else found["vendi"]
        what = "layouts of right count pictures" if is_layouts else f"diversity within a prompt, Vendi by {name}"
        interval = f"{100 * scores['low']:.1f}–{100 * scores['high']:.1f}"
        rows.append(Row(f"{what}, of the data's", f"{100 * scores['share']:.1f} %", interval, str(scores["n_prompts"])))
    return rows


def _line(part: Mapping[str, Any]) -> list[str]:
    return [f"{row.name}: {row.value} [{row.interval}] of {row.n} prompts" for row in _rows(part)]


DIVERSITY = Metric("diversity", _measure, _rows, _line)
