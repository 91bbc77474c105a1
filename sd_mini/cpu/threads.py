"""Work shared out over threads that use one core each: for many operations too short to be shared out one by one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import TypeVar

import torch

T = TypeVar("T")
_TINY = 5e-324  # denormal


def cores() -> int:
    """How many calls side by side use the process's cores."""
    return torch.get_num_threads()


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, everything is computed in the calling thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def shared(calls: Sequence[Callable[[], T]]) -> list[T]:
    """The results of all calls, made without gradients; of several, each in a thread of its own that uses one core.

    Two halves of a batch side by side take three quarters of the time of the whole with every operation shared out
    over both cores.
    """
    if len(calls) == 1:
        return [_without_grad(calls[0])]
    pool = _pool(len(calls), _TINY * 1.0 == 0)  # whether this thread flushes denormals
    return [future.result() for future in [pool.submit(_without_grad, call) for call in calls]]


def _without_grad(call: Callable[[], T]) -> T:
    with torch.no_grad():
        return call()


@lru_cache(maxsize=1)
def _pool(threads: int, flush_denormal: bool) -> ThreadPoolExecutor:
    def start() -> None:
        torch.set_num_threads(1)  # of this thread
        torch.set_flush_denormal(flush_denormal)

    return ThreadPoolExecutor(threads, "sd_mini", start)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads are not forked
