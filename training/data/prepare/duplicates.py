"""Step 4: rows that repeat another, and of step 3 the captions that repeat over many pictures."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np

from training.data.prepare import hashes
from training.data.prepare.config import DuplicatesConfig, QualityConfig
from training.data.prepare.facts import Facts
from training.data.prepare.near import groups
from training.data.prepare.search import PairSearch
from training.data.prepare.verdicts import Rows, Verdicts


def refuse_repeated_captions(own: QualityConfig, rows: Rows, verdicts: Verdicts) -> None:
    """Captions that stand with more than `max_repeats` different pictures: all their rows."""
    if own.max_repeats is None or not rows.caption.any():
        return
    if rows.is_class_like(verdicts.alive):
        verdicts.remarks.append(
            "class-like captions: fewer different ones than half the rows; repeated captions are kept"
        )
        return
    (alive,) = np.nonzero(verdicts.alive & (rows.caption != 0))
    # each caption's different pictures
    pairs = np.unique(np.stack([rows.caption[alive], rows.content[alive]], 1), axis=0)
    captions, counts = np.unique(pairs[:, 0], return_counts=True)
    repeated = alive[np.isin(rows.caption[alive], captions[counts > own.max_repeats])]
    verdicts.refuse(repeated, "quality", "repeated_caption", -1)


def refuse_duplicates(
    own: DuplicatesConfig, rows: Rows, facts: Facts, find_pairs: PairSearch, verdicts: Verdicts
) -> None:
    """Equal pictures, then near-duplicate pictures with the same caption, then long captions that are the same."""
    _refuse_exact(rows, verdicts)
    _refuse_near(own, rows, facts, find_pairs, verdicts)
    if own.min_words is not None and rows.caption.any():
        if rows.is_class_like(verdicts.alive):
            verdicts.remarks.append("class-like captions: captions are not compared with each other")
            return
        _refuse_captions(own, rows, facts, verdicts)


def _refuse_all_but_keepers(
    members: np.ndarray, labels: np.ndarray, rows: Rows, verdicts: Verdicts, reason: str
) -> None:
    """Row numbers and the group of each; a group's keeper is its largest picture, then its longest caption, then its
    first row."""
    order = np.lexsort((members, -rows.length[members], -rows.area[members], labels))
    members, labels = members[order], labels[order]
    is_keeper = np.concatenate([[True], labels[1:] != labels[:-1]])
    keepers = members[is_keeper][np.cumsum(is_keeper) - 1]
    verdicts.refuse(members[~is_keeper], "duplicates", reason, keepers[~is_keeper])


def _refuse_exact(rows: Rows, verdicts: Verdicts) -> None:
    (alive,) = np.nonzero(verdicts.alive)
    if len(alive):
        _refuse_all_but_keepers(alive, rows.content[alive], rows, verdicts, "exact")


def _refuse_near(own: DuplicatesConfig, rows: Rows, facts: Facts, find_pairs: PairSearch, verdicts: Verdicts) -> None:
    (alive,) = np.nonzero(verdicts.alive)
    own_hashes = rows.hash[alive]
    a, b = find_pairs("near", own_hashes, own_hashes, rows.mirrored[alive])
    a, b = alive[np.minimum(a, b)], alive[np.maximum(a, b)]
    pairs = np.unique(np.stack([a, b], 1)[a != b], axis=0)
    pairs = pairs[is_alike(rows.thumbnail, rows.thumbnail, pairs, own.min_correlation)]
    is_same = _same_captions(own, rows, facts, pairs)
    same = pairs[is_same]
    _refuse_groups(same, rows, verdicts, "near")
    different = pairs[~is_same]
    verdicts.kept_pairs = different[verdicts.alive[different].all(1)]


def _refuse_groups(pairs: np.ndarray, rows: Rows, verdicts: Verdicts, reason: str) -> None:
    found = groups(pairs[:, 0], pairs[:, 1])
    if found:
        labels = np.repeat(np.arange(len(found)), [len(group) for group in found])
        _refuse_all_but_keepers(np.concatenate(found), labels, rows, verdicts, reason)


def is_alike(a: np.ndarray, b: np.ndarray, pairs: np.ndarray, least: float, chunk: int = 2**18) -> np.ndarray:
    """Pairs (K, 2) of rows of the thumbnails `a` and `b` => (K,) whether they correlate enough, a chunk at a time."""
    parts = [
        hashes.correlations(a[pairs[start : start + chunk, 0]], b[pairs[start : start + chunk, 1]]) >= least
        for start in range(0, len(pairs), chunk)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, bool)


def _same_captions(own: DuplicatesConfig, rows: Rows, facts: Facts, pairs: np.ndarray) -> np.ndarray:
    """Pairs (K, 2) => (K,) whether their captions are the same by `min_jaccard`."""
    is_same = rows.caption[pairs[:, 0]] == rows.caption[pairs[:, 1]]
    (doubtful,) = np.nonzero(~is_same)
    captions = facts.take(np.unique(pairs[doubtful]).tolist(), ["captions"])
    for k in doubtful:
        first, second = (captions[row]["captions"][0] for row in pairs[k].tolist())
        is_same[k] = hashes.jaccard(first, second) >= own.min_jaccard
    return is_same


def _refuse_captions(own: DuplicatesConfig, rows: Rows, facts: Facts, verdicts: Verdicts) -> None:
    """MinHash finds the candidates, the exact Jaccard similarity decides."""
    pairs = np.array(sorted(_caption_candidates(facts, verdicts.alive)), np.int64).reshape(-1, 2)
    _refuse_groups(pairs[_same_captions(own, rows, facts, pairs)], rows, verdicts, "caption")


def _caption_candidates(facts: Facts, alive: np.ndarray) -> set[tuple[int, int]]:
    """Pairs of rows whose captions share one of MinHash's bands."""
    keys, members, start = [], [], 0
    for table in facts.shards(["bands"]):
        bands = table["bands"].combine_chunks()
        (local,) = np.nonzero(bands.is_valid().to_numpy(zero_copy_only=False) & alive[start : start + len(table)])
        values = bands.take(local).flatten().to_numpy().reshape(-1, hashes.BANDS).astype(np.uint64)
        keys.append(values | (np.arange(hashes.BANDS, dtype=np.uint64) << np.uint64(32)))  # the band's place before it
        members.append(np.repeat(local + start, hashes.BANDS))
        start += len(table)
    key, member = np.concatenate(keys).ravel(), np.concatenate(members)
    order = np.lexsort((member, key))
    key, member = key[order], member[order]
    pairs: set[tuple[int, int]] = set()
    for run in np.split(member, np.flatnonzero(np.diff(key)) + 1):
        # of a long run neighbours are enough to hang it together where all are the same
        several = combinations(run.tolist(), 2) if len(run) <= 50 else pairwise(run.tolist())
        pairs.update(several)
    return pairs
