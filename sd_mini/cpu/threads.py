"""Calls in parallel threads of one core each: for many operations too short to be parallelised one by one."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

import torch

T = TypeVar("T")
_DENORMAL = 5e-324  # the smallest float64


def cores() -> int:
    """How many parallel calls use the process's cores: OMP_NUM_THREADS, or all."""
    return torch.get_num_threads()


@contextmanager
def one_thread() -> Generator[None]:
    """Within, torch computes everything in the calling thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_threads(calls: Sequence[Callable[[], T]]) -> list[T]:
    """The results of all calls, in order, made without gradients; of several, each in a thread that uses one core.

    Two halves of a batch in two threads take three quarters of the time of the whole batch with each operation
    parallelised over both cores. An exception in a call is raised here.
    """
    if len(calls) == 1:
        return [_without_grad(calls[0])]
    pool = _pool(len(calls), _DENORMAL * 1.0 == 0)  # whether this thread flushes denormals
    return [future.result() for future in [pool.submit(_without_grad, call) for call in calls]]


def _without_grad(call: Callable[[], Any]) -> Any:
    with torch.no_grad():
        return call()


@lru_cache(maxsize=1)
def _pool(threads: int, flush_denormal: bool) -> ThreadPoolExecutor:
    def start() -> None:
        torch.get_num_threads()  # a thread's first call takes over what was last set in any thread
        torch.set_num_threads(1)  # of this thread alone
        torch.set_flush_denormal(flush_denormal)

    return ThreadPoolExecutor(threads, "sd_mini", start)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads are not forked
