"""What `python -m eval` says of a pipeline on shapes, in a process of its own: training and eval import no other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def report(
    pipeline: Path, out: Path, *options: str, log: Path | None = None, cores: Sequence[int] | None = None
) -> dict[str, Any]:
    """report.json of a pipeline folder or a run, without sweep and copies: what recipes are compared by.

    Its own error line stands for ours. Raises ValueError where it ends with one.
    """
    asked = ["--data", "shapes", "--sweep", "--training", "none", *options]  # no more than what is compared
    run([["eval", str(pipeline), "--out", str(out), *asked]], log, cores)
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def run(programs: Sequence[Sequence[str]], log: Path | None = None, cores: Sequence[int] | None = None) -> None:
    """`python -m` of each in turn, in one process, with what it prints in `log`, on these cores alone.

    Raises ValueError, with the last line printed, where one ends with another exit code than 0.
    """
    words = [word for program in programs for word in ("--", *program)][1:]
    environment: Mapping[str, str] = os.environ
    if cores is not None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(len(cores))}
    argv = [sys.executable, "-m", "training.chain", *words]
    with open(log or os.devnull, "w", encoding="utf-8") as file:
        done = subprocess.Popen(argv, stdout=file, stderr=file if log else None, env=environment)
        if cores is not None:
            os.sched_setaffinity(done.pid, cores)
        code = done.wait()
    if code:
        lines = log.read_text(encoding="utf-8").split("\n") if log is not None else []
        said = next((f"; {log} ends with: {line}" for line in reversed(lines) if line), "")
        raise ValueError(f"python -m {' '.join(argv[3:])} ended with exit code {code}{said or '; see above'}")
