"""The batch of step k: its samples, its randomness and its rows, as pure functions of (seed, step).

Every process draws the global batch's randomness and keeps its own rows, so neither the number of processes, nor
accumulation, nor a resume changes what a step computes (the per-step reseed of EDM2's training loop, Karras et al.
2024). With workers the batches are gathered ahead, in the background. `Rows` are gathered from arrays that lie on disk.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sd_mini.data.arrays import pieces_of

_GOLDEN = (5**0.5 - 1) / 2  # multiples of it, modulo 1, are the most evenly spread (Weyl's sequence)


@dataclass(frozen=True)
class Batch:
    """The rows of step `step`'s global batch in one pass of one process.

    `ids`: sample numbers of the global batch, (B,); `rows`: the slice of them in this pass, b rows. Draws are on the
    CPU, where a generator gives the same numbers on every machine, unless `device` says otherwise.

    One name, one draw: two generators of one seed are not independent, even for different distributions (torch.randn
    is Box-Muller of the bits that torch.rand returns). Raises ValueError for a name that is drawn twice.
    """

    seed: int
    step: int
    ids: np.ndarray
    rows: slice
    _drawn: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    @property
    def own_ids(self) -> np.ndarray:
        return self.ids[self.rows]

    def normal(self, name: str, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        """N(0, 1) for each row of this pass, (b, *shape)."""
        return torch.randn(len(self.ids), *shape, generator=self._draws(name, device), device=device)[self.rows]

    def uniform(self, name: str, *shape: int) -> Tensor:
        """U[0, 1) for each row of this pass, (b, *shape)."""
        return self.uniform_all(name, *shape)[self.rows]

    def uniform_all(self, name: str, *shape: int) -> Tensor:
        """U[0, 1) for each row of the global batch, (B, *shape)."""
        return torch.rand(len(self.ids), *shape, generator=self._draws(name))

    def stratified(self, name: str) -> Tensor:
        """As `uniform`, (b,), but low-discrepancy: evenly spread over the global batch and over the steps."""
        start = torch.rand((), generator=generator(self.seed, 0, f"{name}/start"), dtype=torch.float64)
        return shifted_grid(len(self.ids), float(start) + self.step * _GOLDEN, self._draws(name))[self.rows]

    def _draws(self, name: str, device: torch.device | str = "cpu") -> torch.Generator:
        if name in self._drawn:
            raise ValueError(f"step {self.step}: {name!r} is drawn twice; give each draw a name of its own")
        self._drawn.add(name)
        return generator(self.seed, self.step, name, device)


def generator(seed: int, step: int, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by its arguments alone."""
    digest = hashlib.sha256(f"{seed}/{step}/{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def shifted_grid(count: int, offset: float, draws: torch.Generator | None = None) -> Tensor:
    """(i + offset) / count, i from 0 to count - 1, modulo 1 and in random order: (count,) in [0, 1).

    For a uniform `offset` each value alone is uniform: Kingma et al. 2021 ("Variational Diffusion Models"), app. I.1.
    Offsets that are multiples of the golden ratio fill [0, 1) evenly, however many there are.
    """
    places = torch.randperm(count, generator=draws, dtype=torch.float64)
    # rounding to float32 must not give 1
    return ((places + offset % 1) / count).float().clamp(max=1 - 2**-24)


class Order:
    """In which order samples are drawn: epoch after epoch, each a permutation, cut into batches.

    `weights` (count,): how often each sample is drawn an epoch, on average; all once without them. Orders of different
    names are independent.
    """

    def __init__(self, seed: int, count: int, batch_size: int, weights: np.ndarray | None = None, name: str = "order"):
        self.seed, self.batch_size, self.name = seed, batch_size, name
        self.cumulative = None if weights is None else np.cumsum(weights)
        self.epoch_size = count if self.cumulative is None else max(1, round(float(self.cumulative[-1])))
        self._epoch = lru_cache(maxsize=4)(self._drawn)  # a batch may reach into the next epoch

    def ids(self, step: int) -> np.ndarray:
        """Sample numbers of step `step`, (batch_size,)."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, places = positions // self.epoch_size, positions % self.epoch_size
        return np.concatenate([self._epoch(int(e))[places[epochs == e]] for e in np.unique(epochs)])

    def _drawn(self, epoch: int) -> np.ndarray:
        draws = generator(self.seed, epoch, self.name)
        places = torch.randperm(self.epoch_size, generator=draws).numpy()
        if self.cumulative is None:
            return places
        # systematic sampling: each sample its weight, rounded down or up, times
        draws = generator(self.seed, epoch, self.name.replace("order", "offset"))
        offset = float(torch.rand((), generator=draws, dtype=torch.float64))
        levels = (places + offset) * (self.cumulative[-1] / self.epoch_size)
        return np.searchsorted(self.cumulative, levels, side="right").clip(max=len(self.cumulative) - 1)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_epoch"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._epoch = lru_cache(maxsize=4)(self._drawn)


class BucketOrder:
    """As `Order`, of samples that lie in buckets, those of one bucket side by side; each batch is of one bucket.

    A round is so many batches as hold all samples once. Each bucket has its share of them, rounded down or up: which
    way changes from round to round, so that over the rounds every sample is drawn as often as any other, even the one
    sample of a bucket (it is then all of a batch). In a bucket samples are drawn epoch after epoch, as by `Order`.
    """

    def __init__(self, seed: int, counts: Sequence[int], batch_size: int, weights: np.ndarray | None = None):
        self.seed, self.starts = seed, np.cumsum([0, *counts])
        parts = [None if weights is None else weights[a:b] for a, b in pairwise(self.starts)]
        sizes = [count if part is None else float(part.sum()) for count, part in zip(counts, parts, strict=True)]
        self.round = max(1, round(sum(sizes) / batch_size))  # batches
        self.shares = np.cumsum(sizes) * (self.round / sum(sizes))
        self.start = float(torch.rand((), generator=generator(seed, 0, "buckets/start"), dtype=torch.float64))
        self.orders = [
            Order(seed, count, batch_size, part, f"order/{number}")
            for number, (count, part) in enumerate(zip(counts, parts, strict=True))
        ]
        self._before = 0, np.zeros(len(counts), np.int64)  # a round, and the batches of each bucket before it

    def ids(self, step: int) -> np.ndarray:
        """Sample numbers of step `step`, (batch_size,)."""
        number, place = divmod(step, self.round)
        places = torch.randperm(self.round, generator=generator(self.seed, number, "buckets")).numpy()
        buckets = np.searchsorted(self._ends(number, number + 1)[0], places[: place + 1], side="right")
        bucket = int(buckets[-1])
        drawn = int(self._drawn_before(number)[bucket] + (buckets[:-1] == bucket).sum())
        return self.starts[bucket] + self.orders[bucket].ids(drawn)

    def _ends(self, first: int, last: int) -> np.ndarray:
        """(last - first, buckets): where each bucket's batches end in each of those rounds, before these are shuffled:
        systematic sampling, its offset moved on by the golden ratio."""
        offsets = (self.start + np.arange(first, last) * _GOLDEN) % 1
        ends = np.ceil(self.shares - offsets[:, None]).clip(0, self.round).astype(np.int64)
        ends[:, -1] = self.round
        return ends

    def _drawn_before(self, number: int) -> np.ndarray:
        """How many batches of each bucket there are in the rounds before; counted on from the last that was asked."""
        known, counts = self._before if self._before[0] <= number else (0, np.zeros(len(self.shares), np.int64))
        counts = counts + np.diff(self._ends(known, number), axis=1, prepend=0).sum(0)
        self._before = number, counts
        return counts


def order_of(
    seed: int, bucket_counts: Sequence[int], batch_size: int, weights: np.ndarray | None
) -> Order | BucketOrder:
    """The order of samples that lie in so many buckets, if in one a plain one."""
    if len(bucket_counts) == 1:
        return Order(seed, bucket_counts[0], batch_size, weights)
    return BucketOrder(seed, bucket_counts, batch_size, weights)


def row_slices(batch_size: int, processes: int, accumulation: int) -> list[list[slice]]:
    """[accumulation][process] => its rows of the global batch; sizes differ by at most one when it does not divide."""
    edges = [batch_size * i // (processes * accumulation) for i in range(processes * accumulation + 1)]
    slices = [slice(a, b) for a, b in pairwise(edges)]
    return [slices[m * processes : (m + 1) * processes] for m in range(accumulation)]


def seed_network_draws(seed: int, device: torch.device) -> None:
    """Seed the generators of a network's own draws (dropout). `torch.manual_seed` would visit every device type."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


Pass = dict[str, Tensor]


@dataclass(frozen=True)
class StepInputs:
    """One step on one process: the global batch's ids (B,), and for each of its passes the rows and tensors."""

    step: int
    ids: np.ndarray
    rows: list[slice]
    passes: list[Pass]


class Steps(Dataset):
    """Item k is step k's `StepInputs`: a pure function of k, so any worker may gather it at any time."""

    def __init__(self, inputs: Callable[[Batch], Pass], order: Order | BucketOrder, rows: list[slice]):
        self.inputs, self.order, self.rows = inputs, order, rows

    def __getitem__(self, step: int) -> StepInputs:  # ty: ignore[lost-keyword-for-regular-parameter]
        ids = self.order.ids(step)
        passes = [self.inputs(Batch(self.order.seed, step, ids, rows)) for rows in self.rows]
        return StepInputs(step, ids, self.rows, passes)


def iterate(steps: Steps, first: int, last: int, workers: int) -> Iterator[StepInputs]:
    """Steps first..last - 1 in order; with `workers` processes they are gathered ahead."""
    loader = DataLoader(
        steps,
        batch_size=None,
        sampler=range(first, last),
        collate_fn=_identity,
        num_workers=workers,
        worker_init_fn=_leave_stopping_to_the_loop,
        prefetch_factor=2 if workers else None,
        # a forked worker shares the data's memory; a spawned one would copy all of it
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        # else its draws would advance the global generator
        generator=torch.Generator(),
    )
    return iter(loader)


def _identity(item: Any) -> Any:
    return item


def _leave_stopping_to_the_loop(worker: int) -> None:
    # a scheduler signals all processes of a job at once; a worker ends when its parent does
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Rounding(NamedTuple):
    """What the float format on disk cost an array: the largest absolute error, and both root mean squares."""

    largest: float
    rms_error: float
    rms: float

    @property
    def relative(self) -> float:
        return self.rms_error / self.rms if self.rms else 0.0

    def __str__(self) -> str:
        return f"at most {self.largest:.2g}, rms {self.relative:.2g} of the values' rms"


class Stored(NamedTuple):
    """One array of one shard, memory-mapped, and what its float format cost."""

    array: np.ndarray
    rounding: Rounding | None


class _Shard:
    """Reads rows of a memory-mapped array by `pread` where there is one: that is faster than touching the map's pages
    row by row, and none of them becomes this process's. The file is opened anew by each read, which takes some
    microseconds: a data set may have more shards than a process may hold files open."""

    def __init__(self, array: np.ndarray):
        self.array, self.path = array, None
        found = _map_of(array)
        if found is not None and hasattr(os, "preadv"):
            self.path, self.offset = str(found.filename), found.offset
            self.row_bytes = array.dtype.itemsize * int(np.prod(array.shape[1:]))

    def read(self, rows: np.ndarray) -> np.ndarray:
        """(b,) row numbers in order => (b, ...). Raises OSError for a file that was cut short."""
        if self.path is None:
            return self.array[rows]
        out = np.empty((len(rows), *self.array.shape[1:]), self.array.dtype)
        file = os.open(self.path, os.O_RDONLY)
        try:
            self._read_into(out.reshape(-1).view(np.uint8).data, rows, file)
        finally:
            os.close(file)
        return out

    def _read_into(self, left: memoryview, rows: np.ndarray, file: int) -> None:
        starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)  # of rows that lie side by side, read at once
        for first, count in zip(rows[starts].tolist(), np.diff(starts, append=len(rows)).tolist(), strict=True):
            place, end = self.offset + first * self.row_bytes, self.offset + (first + count) * self.row_bytes
            while place < end:
                read = os.preadv(file, [left[: end - place]], place)
                if not read:
                    raise OSError(f"{self.path} was cut short while it was read")
                left, place = left[read:], place + read


class Rows:
    """N rows of a cached array, (N, ...), memory-mapped from its shards; what is read is copied out.

    rows[3] is one row, rows[a:b] and rows[ids] are several; `select(ids)` is a part of them that stays on disk.
    `rounding`: measured while encoding; None for whole numbers.
    """

    def __init__(self, parts: Sequence[Stored], ids: np.ndarray | None = None, readers: list[_Shard] | None = None):
        self.parts, self.shards, self.rounding = list(parts), [part.array for part in parts], None
        self.edges = np.cumsum([0, *map(len, self.shards)])
        self._ids = ids
        self.shape: tuple[int, ...] = (int(self.edges[-1]) if ids is None else len(ids), *self.shards[0].shape[1:])
        self.dtype = self.shards[0].dtype
        self._readers = list(map(_Shard, self.shards)) if readers is None else readers
        if parts[0].rounding is not None:
            errors, weights = np.array([part.rounding for part in parts]), np.diff(self.edges) / self.edges[-1]
            self.rounding = Rounding(float(errors[:, 0].max()), *np.sqrt(weights @ errors[:, 1:] ** 2).tolist())

    def __len__(self) -> int:
        return self.shape[0]

    def select(self, ids: Sequence[int] | np.ndarray) -> Rows:
        """These rows alone, in this order; nothing is read."""
        ids = self._checked(ids)
        return Rows(self.parts, ids if self._ids is None else self._ids[ids], self._readers)

    def pieces(self) -> Iterator[np.ndarray]:
        """All rows in order, some megabytes at a time."""
        return pieces_of(self)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (row for piece in self.pieces() for row in piece)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype, copy=False)

    def __getitem__(self, ids: Any) -> np.ndarray:
        """A row number => (...); a slice or (B,) row numbers => (B, ...). Raises IndexError outside 0..len - 1."""
        if isinstance(ids, slice):
            return self._gather(np.arange(len(self))[ids])
        if isinstance(ids, int | np.integer):
            return self._gather(self._checked([ids]))[0]
        return self._gather(self._checked(ids))

    def _checked(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        ids = np.asarray(ids)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise IndexError(f"expected a list of row numbers, got {ids.dtype} of shape {ids.shape}")
        if ids.size and (ids.min() < 0 or ids.max() >= len(self)):
            raise IndexError(f"row numbers {ids.min()}..{ids.max()}, expected them in 0..{len(self) - 1}")
        return ids.astype(np.int64)

    def _gather(self, ids: np.ndarray) -> np.ndarray:
        ids = ids if self._ids is None else self._ids[ids]
        order = np.argsort(ids)  # shard by shard, in the order on disk
        ordered = ids[order]
        cuts = np.searchsorted(ordered, self.edges)
        out = np.empty((len(ids), *self.shape[1:]), self.dtype)
        for number in np.flatnonzero(np.diff(cuts)):
            here = slice(cuts[number], cuts[number + 1])
            out[order[here]] = self._readers[number].read(ordered[here] - self.edges[number])
        return out


def _map_of(array: Any) -> np.memmap | None:
    """The memory map that an array is a view of, if it is one, and as a whole."""
    whole = array
    while isinstance(array, np.ndarray):
        if isinstance(array, np.memmap):
            is_whole = array.shape == whole.shape and array.flags.c_contiguous
            return array if is_whole and isinstance(array.base, mmap.mmap) else None
        array = array.base
    return None
