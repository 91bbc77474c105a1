"""Remarks: what a user should know and nothing stops for, a line on stderr."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import get_ident

from tqdm import tqdm

from sd_mini.texts import printable

_collected: ContextVar[list[str] | None] = ContextVar("collected remarks", default=None)  # of a thread


def remark(line: str) -> None:
    """Print `line` on stderr, above any progress bar; of several processes started together only the first does."""
    if (lines := _collected.get()) is not None:
        lines.append(" ".join(line.split()))
    line = printable(" ".join(line.split()))
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(f"note: {line}", file=sys.stderr)


@contextmanager
def collected() -> Generator[list[str]]:
    """The remarks that this thread makes in the block, and the warnings that it logs as `sd_mini`, for whoever does not
    sit at the terminal; they are printed as well."""
    lines: list[str] = []
    handler = _Lines(lines)
    token = _collected.set(lines)
    logging.getLogger("sd_mini").addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger("sd_mini").removeHandler(handler)
        _collected.reset(token)


class _Lines(logging.Handler):
    """Warnings of the thread that made this => lines."""

    def __init__(self, lines: list[str]):
        super().__init__(logging.WARNING)
        self.lines, self.thread = lines, get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self.thread:
            self.lines.append(" ".join(record.getMessage().split()))
