"""Progress bars, on a terminal or in a notebook; elsewhere, as in a log file or a pipe, there are none."""

from __future__ import annotations

import os
import sys
from typing import Any

from tqdm.auto import tqdm


def is_seen() -> bool:
    """Whether stderr is a place where a bar moves."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def quiet_libraries() -> None:
    """Keep the libraries' bars out of log files and pipes; before transformers is imported, which reads this once."""
    if not is_seen():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def progress(*args: Any, is_shown: bool = True, **options: Any) -> tqdm:
    """tqdm's bar with these arguments, quiet where nobody would see it move, and where not `is_shown`."""
    return tqdm(*args, disable=not (is_shown and is_seen()), **options)
