"""The cores of this process, and how OpenMP's threads wait for work, which is to be said before torch is imported."""

from __future__ import annotations

import os

# Iterations that a thread of libgomp spins before it sleeps. By its own default a thread that waits keeps its core busy
# for milliseconds, and takes it from whatever else runs there: beside one busy process a training fell to a tenth.
SPIN_COUNT = "1000"
_USERS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def let_threads_sleep() -> None:
    """Let OpenMP's threads sleep soon while they wait, unless the environment says how they are to wait.

    No effect once torch, and with it OpenMP, has been loaded: call it first in a program.
    """
    if not any(name in os.environ for name in _USERS):
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
