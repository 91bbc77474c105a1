"""Made pictures against real ones, as one network sees both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.features.features import Extractor
from eval.features.moments import statistics
from eval.features.reference import FeatureSet, reference
from eval.judge.judge import wilson
from eval.metrics import kid
from eval.metrics.bootstrap import bootstrap_rows, prompt_interval
from eval.metrics.fid import distance_to, fewest_for_a_line, frechet_infinity, null_bias
from eval.metrics.prdc import NEIGHBOURS, each_picture
from eval.metrics.registry import Metric, Row, Sample
from sd_mini.data.arrays import Pictures

_DRAWS = 200  # of prompts, for the distance's interval
_WIDEST = 256  # features; wider ones take too long for an interval


def compare(
    extractor: Extractor, made: np.ndarray, real: Pictures, prompts: Sequence[str], cache: Path
) -> tuple[dict[str, Any], list[str]]:
    """Features (N, D) of what was made, and (M, 3, R, R) uint8 => every distance by this network, and what is to be
    said about them, a line each.

    fd: the Frechet distance, called `name`; fd_infinity: what it would be of infinitely many pictures, where there are
    enough for that; bias: the part of fd that is there by N alone; kid; precision, recall, density, coverage; their
    95 % intervals as low, high (of fd) and NAME_low, NAME_high, those of the two distances for at most 256 features;
    n, n_reference, dim, extractor (its hash), preprocessing. An interval is over what is made: the reference is taken
    as it is.
    """
    seen, known = FeatureSet.of(made), reference(extractor, real, cache)
    count, dim = seen.features.shape
    bias = null_bias(known.covariance, count, len(real))
    found = {
        "name": extractor.distance,
        "fd": seen.distance(known),
        "bias": bias,
        "kid": kid.kernel_distance(seen.features, known.features),
        "n": count,
        "n_reference": len(real),
        "dim": dim,
        "extractor": extractor.hash,
        "preprocessing": extractor.preprocessing,
    }
    remarks = []
    if count < 2 * dim or bias > 0.1 * found["fd"]:
        remarks.append(_few(extractor.distance, count, dim, found["fd"], bias))
    found["kid_low"], found["kid_high"] = _kid_interval(found["kid"], seen, known, prompts)
    moved = moved_by_prompts(seen, known, prompts) if dim <= _WIDEST else None
    if moved is not None:
        found["low"], found["high"] = (found["fd"] + float(end) for end in np.quantile(moved, (0.025, 0.975)))
    if count >= fewest_for_a_line(dim):
        found |= infinity(seen, known, moved)
    else:
        remarks.append(
            f"{extractor.distance} infinity left out: {count} pictures, at least {fewest_for_a_line(dim)} needed for "
            f"{dim} features"
        )
    if min(count, len(real)) > NEIGHBOURS:
        found |= _neighbours(seen, known, prompts)
    else:
        remarks.append(f"precision and recall left out: {count} pictures, more than {NEIGHBOURS} needed")
    return found, remarks


def _few(name: str, count: int, dim: int, distance: float, bias: float) -> str:
    """What is to be said of a distance that is in good part bias, which is an expectation and may exceed it."""
    part = f"about {bias:.3g} of {distance:.3g} is bias by their number"
    if bias >= distance:
        part = f"the distance, {distance:.3g}, is no larger than the bias that is expected by their number, {bias:.3g}"
    return (
        f"{name}: {count} pictures are few for {dim} features; {part} (at unit covariance d (d + 5) / (2 N)): compare "
        "at equal N only, or ask for more"
    )


def _neighbours(seen: FeatureSet, known: FeatureSet, prompts: Sequence[str]) -> dict[str, float]:
    """Precision and density with their intervals over prompts; recall and coverage are shares of the real pictures."""
    found: dict[str, float] = {}
    for name, values in each_picture(known.features, seen.features).items():
        found[name] = float(values.mean())
        is_made = name in ("precision", "density")
        ends = prompt_interval(values, prompts) if is_made else wilson(int(values.sum()), len(values))
        found[f"{name}_low"], found[f"{name}_high"] = ends
    return found


def _kid_interval(value: float, seen: FeatureSet, known: FeatureSet, prompts: Sequence[str]) -> tuple[float, float]:
    shares = kid.each_picture(seen.features, known.features)
    low, high = (end - float(shares.mean()) for end in prompt_interval(shares, prompts))
    return value + low, value + high


def infinity(seen: FeatureSet, known: FeatureSet, moved: np.ndarray | None) -> dict[str, float]:
    """fd_infinity, and its 95 % interval where `moved` says how far other prompts move the distance.

    Other prompts move the whole line, by about as much as the distance of all pictures; other subsets turn it.
    """
    value, error = frechet_infinity(seen.features, known.mean, known.covariance)
    if moved is None:
        return {"fd_infinity": value}
    reach = 1.96 * float(np.hypot(moved.std(), error))
    return {"fd_infinity": value, "fd_infinity_low": value - reach, "fd_infinity_high": value + reach}


def moved_by_prompts(seen: FeatureSet, known: FeatureSet, prompts: Sequence[str]) -> np.ndarray:
    """(_DRAWS,): how far the distance moves when other prompts are drawn. Drawn sets hold copies, which adds a bias; so
    it is around their own mean."""
    distance = distance_to(known.mean, known.covariance)
    found = [distance(*statistics(seen.features[rows])) for rows in bootstrap_rows(prompts, _DRAWS)]
    return np.array(found) - np.mean(found)


def _measure(sample: Sample) -> dict[str, Any]:
    """Every network's distances, and each stage's part of them."""
    # blame imports the reconstruction metric, which stands in the same registry
    from eval.analysis.blame import MADE, REAL, share_out

    question, tools = sample.question, sample.tools
    part = {}
    for extractor in tools.networks:
        name = extractor.distance
        made = sample.features(extractor, MADE)
        part[name], remarks = compare(extractor, made, question.reference, sample.prompts, tools.cache)
        sample.remarks += remarks
        if tools.blame and REAL in sample.sets and question.is_apart:
            known = reference(extractor, question.reference, tools.cache)
            others = [name for name in sample.sets if name != MADE]
            apart = {name: FeatureSet.of(sample.features(extractor, name)).distance(known) for name in others}
            shares = share_out({**apart, MADE: part[name]["fd"]})
            sample.blame[name] = {"shares": {stage: {"share": share} for stage, share in shares.items()}}
    return part


def _rows(part: Mapping[str, Any]) -> list[Row]:
    return [row for name, scores in part.items() for row in _rows_of(name, scores)]


def _rows_of(name: str, found: Mapping[str, Any]) -> list[Row]:
    n = f"{found['n']} : {found['n_reference']}"
    ends = f"{found['low']:.4g}–{found['high']:.4g}" if "low" in found else ""
    rows = [Row(name, f"{found['fd']:.4g}", ends, n)]
    if "fd_infinity" in found:
        has_ends = "fd_infinity_low" in found
        ends = f"{found['fd_infinity_low']:.4g}–{found['fd_infinity_high']:.4g}" if has_ends else ""
        rows.append(Row(f"{name} of infinitely many", f"{found['fd_infinity']:.4g}", ends, n))
    kid = "KID" if name == "FID" else f"KID by {name.removeprefix('FD-')}"
    rows.append(Row(f"{kid} (unbiased)", f"{found['kid']:.4g}", f"{found['kid_low']:.4g}–{found['kid_high']:.4g}", n))
    by = "" if name == "FID" else f" by {name.removeprefix('FD-')}"
    for key in ("precision", "recall", "density", "coverage") if "precision" in found else ():
        ends = f"{found[key + '_low']:.3f}–{found[key + '_high']:.3f}"
        rows.append(Row(f"{key}{by}", f"{found[key]:.3f}", ends, n))
    return rows


def _lines(part: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, found in part.items():
        infinity = f", {found['fd_infinity']:.4g} of infinitely many" if "fd_infinity" in found else ""
        lines.append(f"{name} {found['fd']:.4g} of {found['n']}{infinity}, KID {found['kid']:.4g}")
    return lines


DISTANCES = Metric("distances", _measure, _rows, _lines)
