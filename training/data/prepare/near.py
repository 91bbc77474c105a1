"""Pairs of 64-bit hashes that differ in few bits, without comparing all with all."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

_PAIRS = 2**22  # candidate pairs compared at once: 100 MiB


# multi-index hashing (Norouzi, Punjani, Fleet 2012): of two hashes that differ in at most r bits, one of m bands
# differs in at most floor(r / m); all neighbours of each query's bands are looked up, and the whole hashes compared
def near_pairs(index: np.ndarray, queries: np.ndarray, bits: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(N,) and (M,) uint64 => chunks of (query numbers, index numbers) at most `bits` apart; a pair may come twice."""
    bands = 4 if len(index) < 2**20 else 3  # about log2(N) bits a band
    edges = [64 * band // bands for band in range(bands + 1)]
    for low, high in pairwise(edges):
        width = high - low
        keys, asked = (_band(values, low, width) for values in (index, queries))
        order = np.argsort(keys, kind="stable")
        ends = np.cumsum(np.bincount(keys, minlength=1 << width))  # of each key's run in `order`
        for mask in _masks(width, bits // bands):
            near = asked ^ mask
            stops = ends[near]
            starts = np.where(near > 0, ends[near - 1], 0)
            yield from _verified(index, queries, order, starts, stops, bits)


def _band(values: np.ndarray, low: int, width: int) -> np.ndarray:
    return ((values >> np.uint64(low)) & np.uint64((1 << width) - 1)).astype(np.int64)


def _masks(width: int, radius: int) -> Iterator[int]:
    for count in range(radius + 1):
        for places in combinations(range(width), count):
            yield sum(1 << place for place in places)


def _verified(
    index: np.ndarray, queries: np.ndarray, order: np.ndarray, starts: np.ndarray, stops: np.ndarray, bits: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each query's candidates order[start:stop] => those that are near, in chunks of bounded size."""
    (filled,) = np.nonzero(stops > starts)
    counts = (stops - starts)[filled]
    totals = np.cumsum(counts)
    begin = 0
    while begin < len(filled):
        done = totals[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(totals, done + _PAIRS, side="right")))
        part = counts[begin:end]
        asked = np.repeat(filled[begin:end], part)
        # 0, 1, ... within each run
        within = np.arange(part.sum()) - np.repeat(np.cumsum(part) - part, part)
        members = order[np.repeat(starts[filled[begin:end]], part) + within]
        is_near = np.bitwise_count(index[members] ^ queries[asked]) <= bits
        yield asked[is_near], members[is_near]
        begin = end


def picture_pairs(
    index: np.ndarray, hashes: np.ndarray, mirrored: np.ndarray, bits: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pictures by their hashes and mirrored hashes => different pairs (query numbers, index numbers), sorted."""
    chunks = [np.stack(pair, 1) for queries in (hashes, mirrored) for pair in near_pairs(index, queries, bits)]
    pairs = np.unique(np.concatenate(chunks), axis=0) if chunks else np.empty((0, 2), np.int64)
    return pairs[:, 0], pairs[:, 1]


def groups(a: np.ndarray, b: np.ndarray) -> list[np.ndarray]:
    """Pairs => the numbers that hang together, each group sorted. Only what is in a pair takes memory."""
    members, places = np.unique(np.concatenate([a, b]), return_inverse=True)
    first, second = places[: len(a)], places[len(a) :]
    graph = coo_matrix((np.ones(len(a), bool), (first, second)), shape=(len(members), len(members)))
    labels = connected_components(graph, directed=False)[1]
    order = np.argsort(labels, kind="stable")
    return np.split(members[order], np.flatnonzero(np.diff(labels[order])) + 1) if len(members) else []
