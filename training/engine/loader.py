"""The batches of this process, step after step, made in the background if there are workers for it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from training.engine.batches import Batch, batch_ids

Pass = dict[str, Tensor]


@dataclass(frozen=True)
class StepInputs:
    """What one process needs of one step: the global batch's ids, and for each of its passes the rows and tensors."""

    step: int
    ids: np.ndarray
    rows: list[slice]
    passes: list[Pass]


class Steps(Dataset):
    """Item k is step k's `StepInputs`: a pure function of k, so it matters to nobody who makes it, or when."""

    def __init__(self, inputs: Callable[[Batch], Pass], count: int, seed: int, batch_size: int, rows: list[slice]):
        self.inputs, self.count, self.seed, self.batch_size, self.rows = inputs, count, seed, batch_size, rows

    def __getitem__(self, step: int) -> StepInputs:
        ids = batch_ids(self.seed, step, self.count, self.batch_size)
        passes = [self.inputs(Batch(self.seed, step, ids, rows)) for rows in self.rows]
        return StepInputs(step, ids, self.rows, passes)


def iterate(steps: Steps, first: int, last: int, workers: int) -> Iterator[StepInputs]:
    """Steps first..last - 1 in order; with `workers` they are made ahead, in processes of their own."""
    loader = DataLoader(
        steps,
        batch_size=None,
        sampler=range(first, last),
        collate_fn=_as_it_is,
        num_workers=workers,
        worker_init_fn=_leave_stopping_to_the_loop,
        prefetch_factor=2 if workers else None,
        # a forked worker shares the data; one that is started anew would get a copy of all of it
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        # its own draws would otherwise move the global generator
        generator=torch.Generator(),
    )
    return iter(loader)


def _as_it_is(item: StepInputs) -> StepInputs:
    return item


def _leave_stopping_to_the_loop(worker: int) -> None:
    # a scheduler signals all processes of a job at once; a worker sees for itself when its parent is gone
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
