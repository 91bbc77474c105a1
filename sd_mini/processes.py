"""Several processes of one launch, and several launches in one folder: who waits for whom."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState

from sd_mini.errors import UserError


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


@contextmanager
def only_writer(folder: Path, wait: bool = False) -> Generator[None]:
    """Lock `folder` for this process, as two trainings in one folder would overwrite each other's files.

    If another process holds the lock, wait for it with `wait`, else raise UserError. The kernel releases the lock when
    the process ends.
    """
    if os.name != "posix":
        yield
        return
    import fcntl

    with (folder / ".lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another process is training here; wait for it, stop it, or give another --run"
            ) from None
        yield
