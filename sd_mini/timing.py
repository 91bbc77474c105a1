"""Benchmarks: contestants measured in turn, so that a slow spell of the machine meets all of them alike."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sd_mini.progress import progress


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


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Of turns that were taken one after the other."""
    return Spread.of([a / b for a, b in zip(numerators, denominators, strict=True)])


@dataclass(frozen=True)
class Case:
    """One benchmark: the contestants, of which the first is the baseline of the ratios, and the figures printed.

    A contestant is a call: one turn of it is measured. `figures` maps a unit to its value for a turn's seconds; without
    any, nothing is printed. `prepare` runs before every turn and is not measured.
    """

    name: str
    contestants: Mapping[str, Callable[[], Any]]
    rounds: int
    warm_up_rounds: int = 0
    figures: Mapping[str, Callable[[float], float]] = field(default_factory=lambda: {"s": float})
    prepare: Callable[[], object] = lambda: None

    def run(self) -> Turns:
        turns = Turns({name: [] for name in self.contestants}, {name: [] for name in self.contestants})
        for number in progress(range(-self.warm_up_rounds, self.rounds), desc=f"{self.name}, rounds"):
            for name, contestant in self.contestants.items():
                self.prepare()
                start = time.perf_counter()
                result = contestant()
                wait_for_device()
                seconds = time.perf_counter() - start
                if number >= 0:
                    turns.seconds[name].append(seconds)
                    turns.results[name].append(result)
        if self.figures:
            self._print(turns)
        return turns

    def _print(self, turns: Turns) -> None:
        baseline, width = next(iter(self.contestants)), max(map(len, self.contestants))
        for name in self.contestants:
            columns = [f"{turns.figure(name, of_seconds)} {unit}" for unit, of_seconds in self.figures.items()]
            if name != baseline:
                columns.append(f"{turns.ratio(name, baseline)} times as long as {baseline}")
            print(f"{name:>{width}}: {', '.join(columns)}")


class Turns(NamedTuple):
    """Of each contestant, the seconds of every measured turn and what the turn returned."""

    seconds: dict[str, list[float]]
    results: dict[str, list[Any]]

    def figure(self, name: str, of_seconds: Callable[[float], float]) -> Spread:
        return Spread.of([of_seconds(seconds) for seconds in self.seconds[name]])

    def ratio(self, name: str, baseline: str) -> Spread:
        return ratios(self.seconds[name], self.seconds[baseline])


def wait_for_device() -> None:
    """Until the GPU has done what this process gave it, if anything. Imports no torch: that would count as memory."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()
