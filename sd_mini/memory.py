"""Memory: is there room for the pictures that are about to be read, and is what was freed kept for the next batch?"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import psutil

from sd_mini.errors import UserError

_CGROUP = Path("/sys/fs/cgroup")


def available() -> int:
    """Bytes that this machine, or the container this process lives in, can still give without swapping."""
    return min([psutil.virtual_memory().available, *_container()])


def _container() -> list[int]:
    """What is left below a container's limit (cgroup v2), if there is one."""
    try:
        limit, used = ((_CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        counters = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []  # no cgroup v2, or the root's, which has no limit
    # files that were read lately count as used, and are given up when memory is asked for
    return [] if limit == "max" else [int(limit) - int(used) + int(counters.get("inactive_file", 0))]


def check_room(what: str, count: int, side: int) -> None:
    """Raises UserError, the numbers named, where `count` pictures of `side` px, uint8 RGB, do not fit into memory.

    Every process of a machine keeps its own.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed, free = processes * count * 3 * side * side, available()
    if needed > free:
        each = f" in each of {processes} processes" if processes > 1 else ""
        raise UserError(
            f"{what}: {count:,} pictures of {side} px take {_gib(needed)} of memory{each}, and {_gib(free)} are "
            "available; ask for fewer by count, or for a smaller resolution"
        )


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks: given back after each batch, the kernel would have to clear them for the next
    one. A third of the time of a network at 224 px went there."""
    if os.name == "posix" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
