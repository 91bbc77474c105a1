"""Remarks: what a user should know and nothing stops for, a line on stderr."""

from __future__ import annotations

import os
import sys

from tqdm import tqdm


def remark(line: str) -> None:
    """Print `line` on stderr, above any progress bar; of several processes started together only the first does."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(f"note: {' '.join(line.split())}", file=sys.stderr)
