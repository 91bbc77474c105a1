"""The evaluators in the loop: `python -m eval.serve`, a program of its own, asked every so many steps.

Training and evaluation do not import each other. So the pipeline as it stands is saved, measured over there as any
other, and the numbers come back.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from pydantic import Field

from sd_mini.config import Config
from sd_mini.data.captioned import DataConfig
from sd_mini.errors import UserError

ROOT = Path(__file__).parent.parent.parent


class EvaluateConfig(Config):
    """The evaluators in the loop, on the first captions of `valid`; of shapes, on what `python -m eval` asks first."""

    every: int | None = Field(None, ge=1)
    """steps between two evaluations of the pipeline as it stands; null: off"""
    prompts: int = Field(64, ge=2)
    """pictures made for each"""
    batch: int = Field(64, ge=1)
    """made at a time"""
    features: tuple[str, ...] = ("mini",)
    """networks whose features are compared, as `python -m eval --features`"""
    clip: str | None = None
    """open_clip model for the CLIP score, as `python -m eval --clip`"""


class Evaluator:
    """Scores of a pipeline by the evaluators of `python -m eval`.

    Where they are asked for, the main process starts theirs at once: it opens the data and the networks, so that what
    is wrong with them is said before the training, in a ValueError of one line. `cache`: where the features of the
    reference pictures are kept.
    """

    def __init__(self, config: EvaluateConfig, data: DataConfig, cache: Path):
        options = ["--data", data.model_dump_json(), "--cache", str(cache), "--prompts", str(config.prompts)]
        options += ["--batch", str(config.batch), "--features", *config.features]
        options += ["--clip", config.clip] if config.clip is not None else []
        self.command = [sys.executable, "-m", "eval.serve", *options]
        self.process: subprocess.Popen | None = None
        if config.every is not None and PartialState().is_main_process:
            self.start()

    def start(self) -> None:
        self.process = self._process()
        self._answer()

    def scores(self, save: Callable[[str], object]) -> dict[str, float]:
        """`save` writes the pipeline into a folder. Raises ValueError where it cannot be measured."""
        if self.process is None:
            self.start()
        with tempfile.TemporaryDirectory(prefix="sd-mini-evaluated-") as folder:
            save(folder)
            with suppress(BrokenPipeError):  # it has ended, which the missing answer says
                print(folder, file=self.process.stdin, flush=True)
            return self._answer()["scores"]

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise UserError(
                f"evaluate: {' '.join(self.command[1:3])} ended with exit code {self.process.wait()}; see above, mend "
                "it and run the same command again, or leave evaluate.every out"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise UserError(f"evaluate: {answer['error']}")
        return answer

    def _process(self) -> subprocess.Popen:
        # alone, whatever group of processes this one belongs to, and found from whatever folder this was started in
        grouped = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
        own = {name: value for name, value in os.environ.items() if name not in grouped}
        own["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        own["OMP_NUM_THREADS"] = str(
            torch.get_num_threads()
        )  # `accelerate launch` leaves 1 there, whatever this one has
        process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=own)
        weakref.finalize(self, _end, process)  # it ends by itself, too, when this process dies
        return process


def _end(process: subprocess.Popen) -> None:
    with suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:  # a loader's process, forked later, holds the other end of its stdin open
        process.terminate()
        process.wait()
    process.stdout.close()
