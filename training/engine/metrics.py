"""What a training records: running means, the check for finite numbers, speed, metrics.jsonl, trackers, the bar."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from sd_mini import png
from sd_mini.data.batches import StepInputs
from sd_mini.errors import UserError
from sd_mini.files import atomic_text, sync
from sd_mini.progress import progress
from training.engine.flops import count_flops, measured_peak
from training.engine.learner import Learner

NO_TRACKER = "none"
_A_LINE_EVERY = 60  # s, in a log file
SCORE, EVALUATION = "valid/", "eval/"  # before the names of held-out scores, and of the evaluators' scores


def is_due(step: int, every: int, steps: int) -> bool:
    """At every `every`-th step, and at the last one of `steps`."""
    return step == steps or step % every == 0


class Means:
    """Sums by name over the updates since the last log line, kept on the device: adding to them never waits for it.

    A name that was first added later is divided by fewer updates.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self._added: set[str] = set()  # by this update

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add scalars of this update; of several passes each adds its part of the mean."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.float()
            self._added.add(name)

    def end_update(self) -> None:
        self.counts = {name: self.counts.get(name, 0) + (name in self._added) for name in self.sums}
        self._added = set()

    def take(self) -> dict[str, float]:
        """The means over updates and processes, and start again from zero. A collective: every process calls it."""
        values = self.accelerator.reduce(torch.stack(list(self.sums.values())), "mean").tolist()
        means = {name: value / self.counts[name] for name, value in zip(self.sums, values, strict=True)}
        self.sums, self.counts = {}, {}
        return means

    def save(self) -> dict[str, Tensor]:
        """The sums averaged over the processes, (1,) each, for a checkpoint; a collective.

        This process goes on from the averaged sums, as a resumed one does: both then log the same bits.
        """
        if not self.sums:
            return {}
        sums = self.accelerator.reduce(torch.stack(list(self.sums.values())), "mean")
        self.sums = dict(zip(self.sums, sums.unbind(), strict=True))
        return {name: value.view(1) for name, value in self.sums.items()}

    def load(self, counts: Mapping[str, int], tensors: Mapping[str, Any]) -> None:
        """Restore what `save` returned, and the `counts` of that moment."""
        self.counts = dict(counts)
        self.sums = {name: tensors["sums"][name][0].to(self.accelerator.device) for name in counts}


class FiniteCheck:
    """Records each update's gradient norm, and checks it when the next update begins or anything is to be written.

    A batch, gradient or weight that is not finite makes the norm so. Reading the norm at once would make the host wait
    for a GPU in every update; one update later it has been copied. Nothing that is not finite is ever saved.
    """

    def __init__(self) -> None:
        self._records: list[
            tuple[int, np.ndarray, Tensor, list[tuple[np.ndarray, Tensor]], torch.cuda.Event | None]
        ] = []

    def record(self, step: int, ids: np.ndarray, norm: Tensor, losses: list[tuple[np.ndarray, Tensor]]) -> None:
        """`step` as it is logged, from 1; `ids` of the global batch; (ids, losses (b,)) of this process's passes."""
        event = None
        if norm.device.type == "cuda":
            # an asynchronous copy to pinned memory; the event tells when it has arrived
            host = torch.empty((), dtype=norm.dtype, pin_memory=True).copy_(norm.detach(), non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            host = norm.detach().cpu()
        self._records.append((step, ids, host, losses, event))

    def check(self) -> None:
        """Raises UserError that names the samples, where a recorded norm is not finite."""
        for step, ids, norm, losses, event in self._records:
            if event is not None:
                event.synchronize()
            if not math.isfinite(norm.numpy()):
                broken = [
                    int(i) for pass_ids, values in losses for i in pass_ids[~torch.isfinite(values).cpu().numpy()]
                ]
                culprits = f", and the loss of {broken} is not" if broken else ""
                raise UserError(
                    f"step {step}: the gradient is not finite{culprits}; the batch was {ids.tolist()}: look at those "
                    "samples, or start another --run with a lower train.lr"
                )
        self._records.clear()


class Pace:
    """Pictures a second and model FLOPs utilisation (MFU), over the time of updates alone."""

    def __init__(self, accelerator: Accelerator, batch_size: int):
        self.accelerator, self.batch_size = accelerator, batch_size
        self.flops = 0  # of the present update of this process
        self.counted: dict[frozenset[str], int] = {}  # an update's, by the names of its inputs
        self.seconds, self.updates, self.all_flops = 0.0, 0, 0

    def count(self, learners: Sequence[Learner], inputs: StepInputs, message: Callable[[str], None]) -> None:
        """Count an update's FLOPs from its first pass, once for inputs of the same names; on the main process, which is
        the one that shows them."""
        names = frozenset(inputs.passes[0])
        if not self.accelerator.is_main_process:
            return
        if names in self.counted:
            self.flops = self.counted[names]
            return
        first, rows = inputs.rows[0], sum(rows.stop - rows.start for rows in inputs.rows)
        try:
            passes = [count_flops(learner.shown, learner.trained, inputs.passes[0]) for learner in learners]
        except Exception as error:  # an operation without a fake form: no reason to stop a training
            message(f"MFU is not shown, as the FLOPs cannot be counted ({' '.join(str(error).split())[:200]})")
            passes = [0]
        # of the first pass, scaled to all rows of this process
        self.flops = self.counted[names] = sum(passes) * rows // (first.stop - first.start)

    def add(self, seconds: float) -> None:
        self.seconds, self.updates = self.seconds + seconds, self.updates + 1
        self.all_flops += self.flops

    def take(self) -> tuple[float, float]:
        """(pictures a second over all processes, MFU of this one) since the last call."""
        # MFU: FLOPs of a second of updates over the peak of the device (Chowdhery et al. 2022)
        seconds = self.seconds or 1.0
        pictures, flops = self.updates * self.batch_size / seconds, self.all_flops / seconds
        self.seconds, self.updates, self.all_flops = 0.0, 0, 0
        dtype = torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else torch.float32
        peak = measured_peak(self.accelerator.device, dtype) if flops else 1.0
        return pictures, flops / peak


def check_trackers(names: Sequence[str]) -> list[str]:
    """What `--log_with` names, as Accelerate spells it. Raises ValueError for an unknown one and one not installed."""
    wanted = [name for name in names if name != NO_TRACKER]
    known = [str(kind) for kind in LoggerType]
    available = [str(kind) for kind in get_available_trackers()]
    for name in wanted:
        if name not in known:
            raise UserError(f"--log_with {name}: expected {NO_TRACKER} or one of {', '.join(known)}")
        if name != "all" and name not in available:
            raise UserError(f"--log_with {name}: expected it installed; run pip install {name}, or give another one")
    return wanted


class Watch:
    """metrics.jsonl, the trackers, the progress bar and the previews of a stage in `folder`; the main process alone."""

    def __init__(self, folder: Path, accelerator: Accelerator, steps: int):
        self.folder, self.accelerator, self.steps = folder, accelerator, steps
        self.path = folder / "metrics.jsonl"
        self.main = accelerator.is_main_process

    def start(self, config: dict[str, Any], step: int) -> None:
        """Open the trackers and the bar, and drop the lines that an interrupted run logged after `step`."""
        if self.main and self.path.is_file():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
            if kept != lines:
                atomic_text(self.path, "".join(line + "\n" for line in kept))
        if self.accelerator.log_with:
            plain = {k: v if isinstance(v, int | float | str) else str(v) for k, v in config.items()}
            self.accelerator.init_trackers("logs", plain, {"tensorboard": {"purge_step": step + 1}})
            threading.excepthook = _leave_to_main
        self.said = time.monotonic()
        self.bar = progress(
            total=self.steps,
            initial=step,
            desc=self.folder.name,
            unit="step",
            mininterval=0.5,
            is_shown=self.main,
        )

    @contextmanager
    def status(self, what: str) -> Generator[None]:
        """Show in the bar what is done between two updates."""
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
        """Flush the lines so far to the disk, before a checkpoint that stands after them."""
        if self.main and self.path.is_file():
            sync(self.path)

    def write(self, line: dict[str, Any], **timing: float) -> None:
        """Append a line to metrics.jsonl and give it to the trackers; `timing` goes to the trackers alone, so that the
        file of two equal runs is equal."""
        if self.main:
            with self.path.open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
        if self.accelerator.trackers:
            self.accelerator.log({k: v for k, v in {**line, **timing}.items() if k != "step"}, step=line["step"])

    def write_scores(self, step: int, scores: dict[str, float], kind: str = SCORE) -> None:
        self.write({"step": step, **{kind + name: value for name, value in scores.items()}})

    def show_progress(self, step: int, loss: float, norm: float, speed: float, utilisation: float) -> None:
        """In the bar; without a terminal a line a minute, for who reads the log."""
        values = {"loss": f"{loss:.4f}", "grad": f"{norm:.2g}", "img/s": f"{speed:.0f}", "MFU": f"{utilisation:.0%}"}
        self.bar.set_postfix(values, refresh=False)
        if self.bar.disable and time.monotonic() - self.said >= _A_LINE_EVERY:
            self.said = time.monotonic()
            self.message(f"step {step:,} of {self.steps:,}, " + ", ".join(f"{k} {v}" for k, v in values.items()))

    def scores(self, step: int, kind: str = SCORE) -> dict[str, float]:
        """The scores of that kind that were logged at `step`; empty if there are none."""
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
        png.save(picture, path)  # with what it was made with, where that is attached
        values = {"samples": np.asarray(picture.convert("RGB"))[None]}  # (1, H, W, 3)
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                tracker.log_images(values, step, **_LAYOUT.get(tracker.name, {}))

    def message(self, text: str) -> None:
        if self.main:
            tqdm.write(f"{self.folder.name}: {text}", file=sys.stderr)


def _leave_to_main(failure: threading.ExceptHookArgs) -> None:
    """TensorBoard's writer thread hands the error of a full disk to the main thread, which reports it once."""
    if not (issubclass(failure.exc_type, OSError) and type(failure.thread).__module__.startswith("tensorboard.")):
        threading.__excepthook__(failure)


_LAYOUT = {"tensorboard": {"dataformats": "NHWC"}}  # its default is channels first


def write_trace(folder: Path, rank: int, inputs: StepInputs) -> None:
    """Append to `trace-RANK.jsonl`, by which two runs can be compared row by row, a line for each row of this process:
    step, place in the global batch, sample id, a hash of each input.

    Inputs that are not one row a sample (a batch's texts, which belong to all its pictures) are left out.
    """
    with (folder / f"trace-{rank}.jsonl").open("a", encoding="utf-8") as file:
        for rows, tensors in zip(inputs.rows, inputs.passes, strict=True):
            for number, row in enumerate(range(rows.start, rows.stop)):
                hashes = {
                    name: hashlib.sha256(value[number].contiguous().numpy().tobytes()).hexdigest()[:16]
                    for name, value in tensors.items()
                    if value.dim() and len(value) == rows.stop - rows.start
                }
                line = {"step": inputs.step, "row": row, "id": int(inputs.ids[row]), **hashes}
                file.write(json.dumps(line) + "\n")
