"""Which samples and which randomness make up the global batch of step k: pure functions of (seed, step).

Every process draws the whole batch's randomness and takes its own rows, so neither the number of processes, nor
accumulation, nor a resume changes what a step sees (the per-step reseed of EDM2's training loop, Karras et al. 2024).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

_GOLDEN = (5**0.5 - 1) / 2  # multiples of it, modulo 1, are the most evenly spread (Weyl's sequence)


@dataclass(frozen=True)
class Batch:
    """The rows of step `step`'s global batch that one process works on at one time.

    `ids` are the global batch's sample numbers, `rows` the slice of them that is meant here. Draws are on the CPU,
    where a generator gives the same numbers on every machine, unless another device is asked for, which has its own.

    One name, one draw: two generators of one seed are not independent, whatever is drawn from them (torch.randn is
    Box-Muller of the very bits that torch.rand returns). A name that is drawn twice raises ValueError.
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
        """N(0, 1) for each of the own rows, (b, *shape)."""
        return torch.randn(len(self.ids), *shape, generator=self._draws(name, device), device=device)[self.rows]

    def uniform(self, name: str, *shape: int) -> Tensor:
        """U[0, 1) for each of the own rows, (b, *shape)."""
        return self.uniform_all(name, *shape)[self.rows]

    def uniform_all(self, name: str, *shape: int) -> Tensor:
        """U[0, 1) for each row of the global batch, (B, *shape)."""
        return torch.rand(len(self.ids), *shape, generator=self._draws(name))

    def stratified(self, name: str) -> Tensor:
        """As `uniform`, (b,), but as evenly spread as can be, over the global batch and over the steps."""
        start = torch.rand((), generator=generator(self.seed, 0, f"{name}/start"), dtype=torch.float64)
        return shifted_grid(len(self.ids), float(start) + self.step * _GOLDEN, self._draws(name))[self.rows]

    def _draws(self, name: str, device: torch.device | str = "cpu") -> torch.Generator:
        if name in self._drawn:
            raise ValueError(f"step {self.step}: {name!r} is drawn twice; give each draw a name of its own")
        self._drawn.add(name)
        return generator(self.seed, self.step, name, device)


def generator(seed: int, step: int, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator, on the CPU unless told otherwise, that depends on nothing but its arguments."""
    digest = hashlib.sha256(f"{seed}/{step}/{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def shifted_grid(count: int, offset: float, draws: torch.Generator | None = None) -> Tensor:
    """(i + offset) / count, i from 0 to count - 1, modulo 1 and in random order: (count,) in [0, 1).

    For a uniform `offset` each value alone is uniform: Kingma et al. 2021 ("Variational Diffusion Models"), app. I.1.
    Offsets that grow by the golden ratio fill [0, 1) evenly, too, however many of them are taken.
    """
    places = torch.randperm(count, generator=draws, dtype=torch.float64)
    # float32 rounds what is close below 1 up to it
    return ((places + offset % 1) / count).float().clamp(max=1 - 2**-24)


def batch_ids(seed: int, step: int, count: int, batch_size: int) -> np.ndarray:
    """Sample numbers of step `step`: the concatenated epochs' permutations of `count`, cut into batches."""
    start = step * batch_size
    positions = np.arange(start, start + batch_size)
    epochs, places = positions // count, positions % count
    return np.concatenate([_permutation(seed, int(e), count)[places[epochs == e]] for e in np.unique(epochs)])


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return torch.randperm(count, generator=generator(seed, epoch, "order")).numpy()


def row_slices(batch_size: int, processes: int, accumulation: int) -> list[list[slice]]:
    """[accumulation][process] => its rows of the global batch; sizes differ by at most one when it does not divide."""
    edges = [batch_size * i // (processes * accumulation) for i in range(processes * accumulation + 1)]
    slices = [slice(a, b) for a, b in pairwise(edges)]
    return [slices[m * processes : (m + 1) * processes] for m in range(accumulation)]
