"""Step 5: nothing is kept that is in the test source, or nearly so."""

from __future__ import annotations

import numpy as np

from training.data.prepare.config import PrepareConfig
from training.data.prepare.duplicates import is_alike
from training.data.prepare.search import PairSearch
from training.data.prepare.verdicts import Rows, Verdicts


def refuse_test_rows(
    config: PrepareConfig,
    rows: Rows,
    test: Rows,
    readable: np.ndarray,
    find_pairs: PairSearch,
    verdicts: Verdicts,
) -> None:
    """Equal pictures, near-duplicate pictures whatever their captions, equal captions.

    `readable`: (M,) bool, the rows of the test source that were read.
    """
    (asked,) = np.nonzero(readable)
    _refuse_equal(rows.content, test.content, asked, verdicts, "exact")
    _refuse_near(config, rows, test, asked, find_pairs, verdicts)
    if not config.decontamination.captions or not test.caption.any():
        return
    if test.is_class_like(readable):
        verdicts.remarks.append(
            "class-like test captions: fewer different ones than half the rows; training captions may repeat them"
        )
        return
    _refuse_equal(rows.caption, test.caption, asked, verdicts, "caption")


def _refuse_equal(own: np.ndarray, test: np.ndarray, asked: np.ndarray, verdicts: Verdicts, reason: str) -> None:
    (alive,) = np.nonzero(verdicts.alive)
    values, first = np.unique(test[asked], return_index=True)
    is_equal = np.isin(own[alive], values) & (own[alive] != 0)
    others = asked[first[np.searchsorted(values, own[alive][is_equal])]]
    verdicts.refuse(alive[is_equal], "decontamination", reason, others)


def _refuse_near(
    config: PrepareConfig, rows: Rows, test: Rows, asked: np.ndarray, find_pairs: PairSearch, verdicts: Verdicts
) -> None:
    (alive,) = np.nonzero(verdicts.alive)
    queries, members = find_pairs("test", rows.hash[alive], test.hash[asked], test.mirrored[asked])
    pairs = np.stack([alive[members], asked[queries]], 1)
    pairs = pairs[is_alike(rows.thumbnail, test.thumbnail, pairs, config.duplicates.min_correlation)]
    refused, first = np.unique(pairs[:, 0], return_index=True)
    verdicts.refuse(refused, "decontamination", "near", pairs[first, 1])
