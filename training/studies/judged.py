"""Recipes side by side: runs over shared stages, judged by `python -m eval` in a process of its own, as training and
eval import no other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from sd_mini.errors import UserError


def link(run: Path, parts: Mapping[str, Path]) -> None:
    """A run over what others have made, like any other to whoever joins, measures or looks at it: "STAGE/final" or
    "cache" => the folder that stands for it."""
    for part, source in parts.items():
        (own := run / part).parent.mkdir(parents=True, exist_ok=True)
        if not own.is_symlink():
            own.symlink_to(source.absolute(), target_is_directory=True)


def report(
    pipeline: Path, out: Path, *options: str, log: Path | None = None, cores: Sequence[int] | None = None
) -> dict[str, Any]:
    """report.json of a pipeline folder or a run, without sweep and copies: what recipes are compared by.

    Raises ValueError where it ends with an error.
    """
    asked = ["--data", "shapes", "--sweep", "--training", "none", *options]  # no more than what is compared
    run([["eval", str(pipeline), "--out", str(out), *asked]], log, cores)
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def run(programs: Sequence[Sequence[str]], log: Path | None = None, cores: Sequence[int] | None = None) -> None:
    """`python -m` of each in turn, in one process, on these cores alone; what it prints goes to `log`, if given.

    Raises ValueError where one ends with another exit code than 0: its own last line where there is a log.
    """
    words = [word for program in programs for word in ("--", *program)][1:]
    argv = [sys.executable, "-m", "training.chain", *words]
    environment = dict(os.environ) if cores is None else {**os.environ, "OMP_NUM_THREADS": str(len(cores))}
    with log.open("w", encoding="utf-8") if log is not None else nullcontext() as file:
        child = subprocess.Popen(argv, stdout=file, stderr=file, env=environment)
        try:
            if cores is not None:
                os.sched_setaffinity(child.pid, cores)
            code = child.wait()
        except BaseException:
            child.terminate()  # upon which a training saves
            child.wait()
            raise
    if code:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log is not None else []
        said = next((f"{log} ends with: {line}" for line in reversed(lines) if line.strip()), "see above")
        raise UserError(f"python {' '.join(argv[1:])} ended with exit code {code}; {said}")
