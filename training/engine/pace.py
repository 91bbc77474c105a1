"""How fast the updates go: pictures a second, and how much of the machine they use."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator

from training.engine.flops import count_flops, measured_peak
from training.engine.learner import Learner
from training.engine.loader import StepInputs


class Pace:
    """Adds up the time of updates alone: validation, previews and saving are not in it."""

    def __init__(self, accelerator: Accelerator, batch_size: int):
        self.accelerator, self.batch_size = accelerator, batch_size
        self.flops: int | None = None  # of an update of this process
        self.counted: frozenset[str] = frozenset()  # the inputs it was counted with
        self.seconds, self.updates = 0.0, 0

    def count(self, learners: Sequence[Learner], inputs: StepInputs, say: Callable[[str], None]) -> None:
        """Count an update's FLOPs, from its first pass, whenever it has other inputs than before; on the main process,
        which is the one that shows them."""
        names = frozenset(inputs.passes[0])
        if names == self.counted or not self.accelerator.is_main_process:
            return
        self.counted = names
        first, rows = inputs.rows[0], sum(rows.stop - rows.start for rows in inputs.rows)
        try:
            passes = [count_flops(learner.shown, learner.trained, inputs.passes[0]) for learner in learners]
        except Exception as error:  # an operation without a fake form: no reason to stop a training
            say(f"MFU is not shown, as the FLOPs cannot be counted ({' '.join(str(error).split())[:200]})")
            passes = [0]
        self.flops = sum(passes) * rows // (first.stop - first.start)

    def add(self, seconds: float) -> None:
        self.seconds, self.updates = self.seconds + seconds, self.updates + 1

    def take(self) -> tuple[float, float]:
        """(pictures a second over all processes, MFU of this one) since it was last asked."""
        rate = self.updates / self.seconds if self.updates else 0.0
        self.seconds, self.updates = 0.0, 0
        dtype = torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else torch.float32
        peak = measured_peak(self.accelerator.device, dtype) if self.flops else 1.0
        return rate * self.batch_size, (self.flops or 0) * rate / peak
