"""The search for near-duplicate pictures as tasks of an engine: each takes some of the queries to the whole index."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sd_mini.files import atomic_file
from training.data.prepare.engine import Engine, Task, run_missing
from training.data.prepare.near import picture_pairs

_LEAST_QUERIES = 25_000  # of a task
_MOST_TASKS = 1024  # each sorts the whole index


@dataclass(frozen=True)
class PairSearch:
    """Finds near pairs by `engine`; what tasks write goes into `folder`."""

    engine: Engine
    folder: Path
    bits: int

    def __call__(
        self, name: str, index: np.ndarray, hashes: np.ndarray, mirrored: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Index hashes (N,), query hashes and mirrored hashes (M,) => near pairs (query numbers, index numbers)."""
        index_file, query_file = (self.folder / f"{name}-{what}.npy" for what in ("index", "queries"))
        _save(index_file, index)
        _save(query_file, np.stack([hashes, mirrored]))
        step = max(_LEAST_QUERIES, -(-len(hashes) // _MOST_TASKS))
        starts = range(0, len(hashes), step)
        paths = [self.folder / f"{name}-pairs-{number:05d}.npy" for number in range(len(starts))]

        def task(number: int, path: Path) -> Task:
            start = starts[number]
            return Task(write_pairs, (index_file, query_file, start, start + step, self.bits, path))

        run_missing(self.engine, paths, "comparing pictures", task)
        pairs = np.concatenate([np.load(path) for path in paths] or [np.empty((0, 2), np.int64)])
        return pairs[:, 0], pairs[:, 1]


def write_pairs(index: Path, queries: Path, start: int, stop: int, bits: int, path: Path) -> None:
    """The task: pairs (K, 2) of query and index numbers."""
    hashes, mirrored = np.load(queries, mmap_mode="r")[:, start:stop]
    a, b = picture_pairs(np.load(index), np.asarray(hashes), np.asarray(mirrored), bits)
    _save(path, np.stack([a + start, b], 1))


def _save(path: Path, array: np.ndarray) -> None:
    with atomic_file(path) as partial, partial.open("wb") as file:
        np.save(file, array)
