"""Loops measured against each other: each in a process of its own, block by block in turn, on one machine."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from tqdm.auto import tqdm

Updates = Callable[[Sequence[str]], Iterator[float]]


class Spread(NamedTuple):
    """The median of several measurements, and the lowest and highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.3g} [{self.low:.3g}, {self.high:.3g}]"

    def record(self) -> dict[str, float]:
        """For JSON, in four significant digits."""
        return {name: float(f"{value:.4g}") for name, value in self._asdict().items()}


def ratios(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Of blocks that were measured one after the other."""
    return Spread.of([a / b for a, b in zip(above, below, strict=True)])


def measure(
    loops: Mapping[str, Updates], argv: Sequence[str], block: int, rounds: int, warm_up: int
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """=> (the first value of each loop, the seconds of each of its blocks of `block` updates).

    A loop is a generator: its first value is whatever it wants to say before it begins, then each is one update.
    Raises ValueError where a loop raises one before its first value.
    """
    context = multiprocessing.get_context("spawn")
    workers: dict[str, Connection] = {}
    for name, loop in loops.items():
        workers[name], other = context.Pipe()
        context.Process(target=_serve, args=(loop, argv, warm_up, other), daemon=True).start()
    first = {name: received(worker) for name, worker in workers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for _ in tqdm(range(rounds), desc="rounds"):
        for name, worker in workers.items():
            worker.send(block)
            seconds[name].append(worker.recv())
    for worker in workers.values():
        worker.send(0)
    return first, seconds


def received(pipe: Connection) -> Any:
    """What a worker sends. Raises ValueError where that is a user's mistake."""
    found = pipe.recv()
    if isinstance(found, ValueError):
        raise found
    return found


def _serve(loop: Updates, argv: Sequence[str], warm_up: int, pipe: Connection) -> None:
    """Send the first value; then, asked for so many updates, the seconds they took; 0 ends it."""
    updates = loop(argv)
    try:
        pipe.send(next(updates))
    except ValueError as error:
        pipe.send(error)
        return
    for _ in range(warm_up):
        next(updates)
    while count := pipe.recv():
        start = time.perf_counter()
        for _ in range(count):
            next(updates)
        pipe.send(time.perf_counter() - start)
