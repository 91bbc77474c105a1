"""Several programs one after the other in one process, which imports their libraries once.

python -m training.chain training.autoencoder --config a.yaml --run runs/mine -- training.text_encoder ... -- eval ...

Each is run as `python -m MODULE ARGUMENTS` would run it; the first that fails ends the chain with its exit code, and so
does one that SIGTERM stops, which exits with 0 if it is a training. `A --beside B -- C`: A and B run at the same time,
A in a process of its own with its share of the cores, and C when both have ended. What A says is shown when it has
ended, so that only B draws progress bars.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import groupby
from types import FrameType
from typing import TextIO


def main(argv: Sequence[str]) -> int:
    """`argv`: modules with their arguments, "--" or "--beside" between them. Returns the exit code."""
    steps = [_split(step, "--beside") for step in _split(argv, "--")]
    given, stopped = sys.argv, []

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.append(number)
        if frame is not None:  # not told by a training that has saved and ended
            sys.exit(128 + number)

    stop.told_later = True
    before = signal.signal(signal.SIGTERM, stop)
    try:
        for *others, own in steps:
            with _beside(others) as running:
                sys.argv = own
                if (code := _run(own[0])) or stopped:
                    return code
                if code := max([child.wait() for child in running], default=0):
                    return code
    finally:
        sys.argv = given
        signal.signal(signal.SIGTERM, before)
    return 0


def _split(words: Sequence[str], at: str) -> list[list[str]]:
    return [list(part) for between, part in groupby(words, lambda word: word == at) if not between]


@contextmanager
def _beside(programs: Sequence[Sequence[str]]) -> Iterator[list[subprocess.Popen]]:
    """Within, these run; those that still do at its end are told to stop, upon which a training saves."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    own_share = {**os.environ, "OMP_NUM_THREADS": str(max(1, count // (len(programs) + 1)))}
    running: list[subprocess.Popen] = []
    with ExitStack() as files:
        kept = partial(tempfile.TemporaryFile, "w+", newline="", errors="replace")
        said = [(files.enter_context(kept()), files.enter_context(kept())) for _ in programs]
        try:
            for words, (out, err) in zip(programs, said, strict=True):
                # by way of a chain, as a training that SIGTERM stops tells it so
                command = [sys.executable, "-m", "training.chain", *words]
                running.append(subprocess.Popen(command, stdout=out, stderr=err, env=own_share))
            yield running
        finally:
            for child in running:
                child.terminate()
            for child, (out, err) in zip(running, said, strict=False):
                child.wait()
                _show(err, sys.stderr)
                _show(out, sys.stdout)


def _show(file: TextIO, to: TextIO) -> None:
    """Of a progress bar no more than how it ended."""
    file.seek(0)
    lines = (line.rstrip("\r").rsplit("\r", 1)[-1] for line in file.read().split("\n"))
    to.writelines(f"{line}\n" for line in lines if line)


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
