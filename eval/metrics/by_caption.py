"""Where captions repeat, as those of classes do: each caption's pictures against the real ones of the same caption."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eval.features.reference import reference
from eval.judge.judge import wilson
from eval.metrics.kid import kernel_distance
from eval.metrics.pairs import check_pair, squared_distances, strips
from eval.metrics.registry import Metric, Row, Sample

NEIGHBOURS = 5
_FEWEST = 10  # pictures of each caption, made and real
_MOST = 100  # captions


def nearest_labels(features: np.ndarray, known: np.ndarray, labels: Sequence[str]) -> list[str]:
    """(N, D), and (M, D) with M labels => for each row the most common label of the NEIGHBOURS nearest known rows; of
    labels that are equally common, the one that is first met from the nearest on (Cover & Hart 1967)."""
    a, b = check_pair("nearest_labels", features, known, minimum=NEIGHBOURS)
    found = []
    for rows in strips(a):
        distances = np.concatenate([squared_distances(rows, columns) for columns in strips(b)], axis=1)
        near = np.argsort(distances, axis=1, kind="stable")[:, :NEIGHBOURS]
        found += [Counter(labels[i] for i in row).most_common(1)[0][0] for row in near.tolist()]
    return found


def _measure(sample: Sample) -> dict[str, Any] | None:
    from eval.analysis.blame import MADE, REAL  # which imports metrics of the same registry

    question, prompts = sample.question, sample.prompts
    names = question.reference_captions
    if names is None or not _repeat(prompts, names):
        return None
    part = {}
    for extractor in sample.tools.networks:
        known = reference(extractor, question.reference, sample.tools.cache).features
        # real pictures that are in the reference are nearest to themselves
        compared = (MADE, REAL) if question.is_apart else (MADE,)
        sets = {name: sample.features(extractor, name) for name in compared if name in sample.sets}
        labels = {name: nearest_labels(features, known, names) for name, features in sets.items()}
        part[extractor.distance] = {
            "captions": {
                caption: _of_caption(caption, prompts, names, sets, labels, known) for caption in sorted(set(prompts))
            },
            **_found(labels, prompts, range(len(prompts))),
        }
    return part


def _repeat(prompts: Sequence[str], names: Sequence[str]) -> bool:
    """Whether there are several captions, and enough pictures of each, asked for and real."""
    asked, real = Counter(prompts), Counter(names)
    enough = all(count >= _FEWEST and real[caption] >= _FEWEST for caption, count in asked.items())
    return 1 < len(asked) <= _MOST and enough


def _of_caption(
    caption: str,
    prompts: Sequence[str],
    names: Sequence[str],
    sets: Mapping[str, np.ndarray],
    labels: Mapping[str, Sequence[str]],
    known: np.ndarray,
) -> dict[str, Any]:
    rows = np.flatnonzero([prompt == caption for prompt in prompts])
    theirs = known[np.array([name == caption for name in names])]
    kid = {f"kid_{name}": kernel_distance(features[rows], theirs) for name, features in sets.items()}
    return {**kid, **_found(labels, prompts, rows.tolist()), "n_reference": len(theirs)}


def _found(labels: Mapping[str, Sequence[str]], prompts: Sequence[str], rows: Sequence[int]) -> dict[str, Any]:
    """How often the nearest real pictures are of the caption that was asked for, with Wilson's interval."""
    found: dict[str, Any] = {"n": len(rows)}
    for name, own in labels.items():
        right = sum(own[row] == prompts[row] for row in rows)
        low, high = wilson(right, len(rows))
        found |= {f"found_{name}": right / len(rows), f"low_{name}": low, f"high_{name}": high}
    return found


def _rows(part: Mapping[str, Any]) -> list[Row]:
    rows = []
    for name, found in part.items():
        real = f" (real pictures {100 * found['found_real']:.1f} %)" if "found_real" in found else ""
        interval = f"{100 * found['low_made']:.1f}–{100 * found['high_made']:.1f}"
        by = name.removeprefix("FD-")
        rows.append(
            Row(
                f"nearest to its caption's, by {by}",
                f"{100 * found['found_made']:.1f} %{real}",
                interval,
                str(found["n"]),
            )
        )
    return rows


BY_CAPTION = Metric("by_caption", _measure, _rows)
