"""Watching a training: metrics.jsonl always, Accelerate's trackers, the progress bar, the pictures."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from PIL import Image
from tqdm.auto import tqdm

from sd_mini.errors import UserError
from sd_mini.files import atomic_text, sync

NONE = "none"
SCORE, MEASURE = "valid/", "eval/"  # before the names of held-out scores, and of the evaluators' scores


def check_trackers(names: Sequence[str]) -> list[str]:
    """What `--log_with` names, as Accelerate spells it. Raises ValueError for an unknown one and one not installed."""
    wanted = [name for name in names if name != NONE]
    known = [str(kind) for kind in LoggerType]
    available = [str(kind) for kind in get_available_trackers()]
    for name in wanted:
        if name not in known:
            raise UserError(f"--log_with {name}: expected {NONE} or one of {', '.join(known)}")
        if name != "all" and name not in available:
            raise UserError(f"--log_with {name}: expected it installed; run pip install {name}, or give another one")
    return wanted


class Watch:
    """What a person looks at while a stage in `folder` trains. Only the main process writes and shows anything."""

    def __init__(self, folder: Path, accelerator: Accelerator, steps: int):
        self.folder, self.accelerator, self.steps = folder, accelerator, steps
        self.path = folder / "metrics.jsonl"
        self.main = accelerator.is_main_process

    def start(self, config: dict[str, Any], step: int) -> None:
        """Open the trackers and the bar. What a killed run had logged after `step`, where it goes on, is dropped."""
        if self.main and self.path.is_file():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
            if kept != lines:
                atomic_text(self.path, "".join(line + "\n" for line in kept))
        if self.accelerator.log_with:
            plain = {k: v if isinstance(v, int | float | str) else str(v) for k, v in config.items()}
            self.accelerator.init_trackers("logs", plain, {"tensorboard": {"purge_step": step + 1}})
            threading.excepthook = _leave_to_main
        self.bar = tqdm(
            total=self.steps,
            initial=step,
            desc=self.folder.name,
            unit="step",
            mininterval=0.5 if sys.stderr.isatty() else 15,
            disable=not self.main,
        )

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Let the bar say why it stands still."""
        self.bar.set_description(f"{self.folder.name}, {what}")
        try:
            yield
        finally:
            self.bar.set_description(self.folder.name)

    def finish(self) -> None:
        self.bar.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()
        threading.excepthook = threading.__excepthook__

    def sync(self) -> None:
        """Bring the lines so far to the disk, before a checkpoint says that they are there."""
        if self.main and self.path.is_file():
            sync(self.path)

    def write(self, line: dict[str, Any], **timing: float) -> None:
        """A line of metrics.jsonl, and the same to the trackers; `timing` goes to the trackers alone, as no two runs
        share it."""
        if self.main:
            with self.path.open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
        if self.accelerator.trackers:
            self.accelerator.log({k: v for k, v in {**line, **timing}.items() if k != "step"}, step=line["step"])

    def write_scores(self, step: int, scores: dict[str, float], kind: str = SCORE) -> None:
        self.write({"step": step, **{kind + name: value for name, value in scores.items()}})

    def show(self, loss: float, norm: float, speed: float, utilisation: float) -> None:
        shown = {"loss": f"{loss:.4f}", "grad": f"{norm:.2g}", "img/s": f"{speed:.0f}", "MFU": f"{utilisation:.0%}"}
        self.bar.set_postfix(shown, refresh=False)

    def scores(self, step: int, kind: str = SCORE) -> dict[str, float]:
        """The scores of that kind that were logged at `step`; none if they were not, or were lost."""
        text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        for line in map(json.loads, text.splitlines()):
            scores = {name.removeprefix(kind): value for name, value in line.items() if name.startswith(kind)}
            if line["step"] == step and scores:
                return scores
        return {}

    def has_picture(self, step: int) -> bool:
        return self._picture(step).is_file()

    def _picture(self, step: int) -> Path:
        return self.folder / "samples" / f"step-{step:08d}.png"

    def picture(self, picture: Image.Image, step: int) -> None:
        """`samples/step-NNNNNNNN.png`, and to the trackers that take pictures."""
        path = self._picture(step)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
        values = {"samples": np.asarray(picture.convert("RGB"))[None]}  # (1, H, W, 3)
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                tracker.log_images(values, step, **_LAYOUT.get(tracker.name, {}))

    def say(self, text: str) -> None:
        if self.main:
            tqdm.write(f"{self.folder.name}: {text}", file=sys.stderr)


def _leave_to_main(failure: threading.ExceptHookArgs) -> None:
    """TensorBoard's writer thread that meets a full disk hands its error to the main thread, which says so once."""
    if not (issubclass(failure.exc_type, OSError) and type(failure.thread).__module__.startswith("tensorboard.")):
        threading.__excepthook__(failure)


_LAYOUT = {"tensorboard": {"dataformats": "NHWC"}}  # it takes channels first when it is not told
