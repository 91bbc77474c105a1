"""Several programs one after the other in one process, which imports their libraries once.

python -m training.chain training.autoencoder --config a.yaml --run runs/mine -- training.text_encoder ... -- eval ...

Each is run as `python -m MODULE ARGUMENTS` would run it; the first that fails, or is stopped, ends the chain with its
exit code.
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
    given = sys.argv

    def stop(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        for module, *arguments in commands:
            sys.argv = [module, *arguments]
            if code := _run(module):
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
