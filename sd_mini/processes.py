"""Several processes of one launch, and several launches in one folder: who waits for whom."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from functools import lru_cache

import torch
import torch.distributed as dist
from accelerate import PartialState


def process_device() -> torch.device:
    """The device of this process, by Accelerate."""
    device = PartialState().device
    assert device is not None  # set by the state's first instance
    return device


def is_distributed() -> bool:
    """Whether the batch is distributed over several processes."""
    return dist.is_initialized() and dist.get_world_size() > 1


_IS_ALONE = ContextVar("is_alone", default=False)


@contextmanager
def alone() -> Generator[None]:
    """In which this process works as if it were the only one: caches are written without waiting for the others."""
    token = _IS_ALONE.set(True)
    try:
        yield
    finally:
        _IS_ALONE.reset(token)


def rank_and_ranks() -> tuple[int, int]:
    """This process's number and how many there are; (0, 1) where it works alone."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() and not _IS_ALONE.get() else (0, 1)


def patient_group() -> dist.ProcessGroup:
    """A gloo group of all processes with no practical timeout, for waits while one process works alone."""
    return _patient_group(dist.group.WORLD)


@lru_cache(maxsize=1)
def _patient_group(of: dist.ProcessGroup) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=timedelta(days=365))
    assert isinstance(group, dist.ProcessGroup)  # every process is a member
    return group


def wait_for_everyone() -> None:
    """A barrier without a practical timeout: the main process may evaluate or encode for hours, and NCCL's collectives
    give up after ten minutes, gloo's after thirty."""
    if is_distributed() and not _IS_ALONE.get():
        dist.barrier(group=patient_group())
