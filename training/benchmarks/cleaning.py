"""What cleaning costs, and what it finds: synthetic captioned pictures with planted faults."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import psutil

from sd_mini.timing import Case
from training.benchmarks.planted import score, write_planted

_CHECKOUT = Path(__file__).parents[2]  # where the program is found


def cleaning(argv: Sequence[str], rounds: int = 3) -> None:
    """Pictures a second of all five steps, memory, and what was found of each planted fault."""
    rows = int(argv[0])
    with tempfile.TemporaryDirectory(dir=".") as home:
        source, out = (Path(home).absolute() / name for name in ("source", "out"))
        write_planted(source, rows, max(rows // 100, 10), workers=os.cpu_count() or 1)
        fields = {"source": str(source), "split": "train"}
        config = source.with_name("config.yaml")
        test, quality = {**fields, "split": "test"}, {"max_repeats": max(rows // 1000, 2)}
        config.write_text(json.dumps({"data": fields, "test": test, "quality": quality}))
        command = [sys.executable, "-m", "training.data.prepare", "--config", str(config), "--out", str(out)]
        memory = _Memory()

        def clear() -> None:
            shutil.rmtree(out, ignore_errors=True)

        rate = {"pictures/s": lambda seconds: rows / seconds}
        with memory:
            Case(
                "cleaning",
                {"five steps": lambda: subprocess.run(command, check=True, cwd=_CHECKOUT)},
                rounds,
                figures=rate,
                prepare=clear,
            ).run()
        print(f"resident memory at most {memory.total:.0f} MiB in all processes, {memory.largest:.0f} MiB in one")
        result = score(out, rows)
    for name, (right, total) in result.by_kind.items():
        print(f"{name:>26}: {right} of {total}, {100 * right / total:.2f} %")
    print(f"clean rows refused: {result.clean_refused} of {result.clean}")


class _Memory:
    """Resident memory (MiB) of this process's children while a block runs, sampled twice a second.

    `total` counts pages that several processes share once (PSS), `largest` is of one process with all its pages.
    """

    total = largest = 0.0

    def __enter__(self) -> None:
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _sample(self) -> None:
        own = psutil.Process()
        while not self._is_over.is_set():
            sizes = []
            for process in own.children(recursive=True):
                try:
                    sizes.append(process.memory_full_info())
                except psutil.Error:
                    continue
            self.total = max(self.total, sum(getattr(size, "pss", size.rss) for size in sizes) / 2**20)
            self.largest = max([self.largest, *(size.rss / 2**20 for size in sizes)])
            self._is_over.wait(0.5)
