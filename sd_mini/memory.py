"""Memory: is there room for the pictures that are about to be read, and is what was freed kept for the next batch?"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Collection
from pathlib import Path

import psutil

from sd_mini.errors import UserError

_CGROUP = Path("/sys/fs/cgroup")


def available() -> int:
    """Bytes that this machine, or the container this process lives in, can still give without swapping."""
    return _room()[0]


def total() -> int:
    """Bytes that this machine, or the container this process lives in, has in all."""
    return _room()[1]


def _room() -> tuple[int, int]:
    """What is left of a machine's memory and all of it, both within a container's limit (cgroup v2) if it has one."""
    machine = psutil.virtual_memory()
    try:
        limit, used = ((_CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        counters = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        limit = "max"  # no cgroup v2, or the root's, which has no limit
    if limit == "max":
        return machine.available, machine.total
    # files that were read lately count as used, and are given up when memory is asked for
    left = int(limit) - int(used) + int(counters.get("inactive_file", 0))
    return min(machine.available, left), min(machine.total, int(limit))


def check_room(what: str, count: int, side: int) -> None:
    """Raises UserError, the numbers named, where `count` pictures of `side` px, uint8 RGB, do not fit into memory.

    Every process of a machine keeps its own. What is free now may already lack what the others hold: it is compared
    with the need of this process alone, and the need of all with the whole memory.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed, free, whole = count * 3 * side * side, available(), total()
    mend = "ask for fewer by count, or for a smaller resolution"
    if needed > free:
        raise UserError(
            f"{what}: {count:,} pictures of {side} px take {_gib(needed)} of memory, and {_gib(free)} are available; "
            f"{mend}"
        )
    if processes * needed > whole:
        raise UserError(
            f"{what}: {count:,} pictures of {side} px in each of {processes} processes take "
            f"{_gib(processes * needed)} of memory, and there are {_gib(whole)} in all; {mend}, or start fewer "
            "processes"
        )


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks: given back after each batch, the kernel would have to clear them for the next
    one. A third of the time of a network at 224 px went there."""
    if os.name == "posix" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"


def let_go_of(paths: Collection[str]) -> None:
    """Let go of the pages of memory-mapped files that were read: they stay in the system's cache of files, and are no
    longer counted as this process's."""
    if not sys.platform.startswith("linux"):
        return
    libc, real = ctypes.CDLL(None, use_errno=True), set(map(os.path.realpath, paths))  # as the system lists them
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        addresses, *_, path = line.split(maxsplit=5)
        if path in real:
            first, last = (int(address, 16) for address in addresses.split("-"))
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)
