"""Several programs one after the other in one process, which imports their libraries once.

python -m training.chain training.autoencoder --config a.yaml --run runs/mine -- training.text_encoder ... -- eval ...

Each is run as `python -m MODULE ARGUMENTS` would run it; the first that fails ends the chain with its exit code, and so
does one that SIGTERM stops, which exits with 0 if it is a training.
"""

from __future__ import annotations

import runpy
import signal
import sys
from collections.abc import Sequence
from itertools import groupby
from types import FrameType


def main(argv: Sequence[str]) -> int:
    """`argv`: modules with their arguments, "--" between them. Returns the exit code."""
    commands = [list(words) for between, words in groupby(argv, lambda word: word == "--") if not between]
    given, stopped = sys.argv, []

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.append(number)
        if frame is not None:  # not told by a training that has saved and ended
            sys.exit(128 + number)

    stop.told_later = True
    before = signal.signal(signal.SIGTERM, stop)
    try:
        for module, *arguments in commands:
            sys.argv = [module, *arguments]
            if (code := _run(module)) or stopped:
                return code
    finally:
        sys.argv = given
        signal.signal(signal.SIGTERM, before)
    return 0


def _run(module: str) -> int:
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
