"""The interface between a stage and the loop, and the user's options of the loop."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np
from PIL import Image
from pydantic import Field, field_validator, model_validator
from torch import nn

from sd_mini.data.batches import Batch, Pass
from sd_mini.data.rejected import Rejected
from sd_mini.errors import UserError
from training.engine.best import check_wish
from training.engine.learner import Player
from training.optim.ema import WIDTHS
from training.optim.optimizer import OptimizerConfig


class TrainConfig(OptimizerConfig):
    """Length, speed, and the intervals of logging, validation, previews and checkpoints."""

    steps: int = Field(1000, ge=1)
    """optimizer updates"""
    batch_size: int = Field(64, ge=1)
    """pictures an update, over all processes and accumulation"""
    accumulation: int = Field(1, ge=1)
    """forward/backward passes an update"""
    ema_width: float | None = Field(None, gt=0, le=0.28)
    """relative width of the weights' power-function average (0.05 to 0.1); exported and previewed; null: off"""
    ema_every: int = Field(1, ge=1)
    """updates between two updates of the averages; a few more cost less time and change next to nothing"""
    ema_snapshots: int = Field(8, ge=0)
    """snapshots of the averages over the training, from which any other width can be computed afterwards"""
    mixed_precision: Literal["no", "bf16", "auto"] | None = None
    """precision of the passes, over float32 weights; auto: bf16 where the device multiplies in it; null: that of
    `accelerate launch`"""
    compile: str | None = None
    """torch.compile backend for the networks' repeated blocks ("inductor"); null: off"""
    gradient_checkpointing: bool = False
    """recompute the blocks' activations in the backward pass: less memory, more time"""
    workers: int = Field(0, ge=0)
    """processes that gather batches ahead"""
    seed: int = 0
    log_every: int = Field(20, ge=1)
    valid_every: int = Field(500, ge=1)
    """steps between two validations on the held-out set"""
    preview_every: int = Field(250, ge=1)
    checkpoint_every: int = Field(250, ge=1)
    keep_last: int = Field(2, ge=1)
    """newest checkpoints kept"""
    keep_every: int | None = Field(None, ge=1)
    """checkpoints of its multiples are kept for good"""
    keep_best: str | None = None
    """export the weights with the best score instead of the last, "lowest valid/loss" or "highest eval/exact" for
    example; null: the last"""
    patience: int | None = Field(None, ge=1)
    """looks at the score of keep_best without a better one, after which training ends; null: never"""
    trace: bool = False
    """write the ids and a hash of every input row of every step, to compare two runs"""

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _no(cls, value: Any) -> Any:
        return "no" if value is False else value  # as YAML reads it

    @model_validator(mode="after")
    def _best_of_a_score(self) -> Self:
        if self.keep_best is not None:
            check_wish(self.keep_best)
            if self.ema_width is not None and self.ema_width not in WIDTHS:
                raise UserError(
                    f"train.ema_width {self.ema_width}: is made of snapshots at the end, and keep_best scores before; "
                    f"give {' or '.join(map(str, WIDTHS))}"
                )
        elif self.patience is not None:
            raise UserError(f"train.patience {self.patience}: counts looks at train.keep_best, which is not given")
        return self

    @model_validator(mode="after")
    def _snapshots_for_the_width(self) -> Self:
        if self.ema_width is not None and self.ema_width not in WIDTHS and self.ema_snapshots < 4:
            raise UserError(
                f"ema_width {self.ema_width} is made of snapshots; expected ema_snapshots of at least 4, or a width "
                f"that is tracked: {' or '.join(map(str, WIDTHS))}"
            )
        return self

    def check(self, processes: int) -> None:
        """Raises UserError for a batch of fewer samples than passes times processes."""
        if self.accumulation * processes > self.batch_size:
            raise UserError(
                f"train.batch_size {self.batch_size}: expected at least one for each of {self.accumulation} passes on "
                f"{processes} processes"
            )


class Task(Protocol):
    """A stage, as the loop uses it. Each `objective` is the first player's own module."""

    players: dict[str, Player]
    """in the order of their updates; the first is validated, previewed, evaluated and exported"""
    valid_count: int
    """held-out samples"""
    identity: dict[str, str]
    """hashes of the data and the other stages; a checkpoint with others is refused"""
    weights: np.ndarray | None
    """(count,): how often each training sample is drawn an epoch; all once where there are none"""
    bucket_counts: list[int]
    """how many training samples there are of each shape, side by side; each batch is of one shape"""
    valid_sources: list[str] | None
    """the source of each held-out sample, where they come from several: each is scored apart, too"""
    rejected: list[Rejected]
    """rows of the data that are left out"""
    evaluate_every: int | None
    """steps between two calls of `EvaluatedTask.evaluate`; none: never"""

    def inputs(self, batch: Batch) -> Pass:
        """The keyword arguments of every player's `objective` for a pass of b rows, on the CPU."""
        ...

    def validate(self, objective: Any, rows: slice) -> dict[str, np.ndarray]:
        """Scores of those held-out samples, (n,) each, by name, with the same draws at every step."""
        ...

    def preview(self, objective: Any) -> Image.Image: ...

    def export(self, objective: Any, folder: Path, record: dict[str, Any]) -> None: ...


class EvaluatedTask(Task, Protocol):
    """A task whose `evaluate_every` may be a number."""

    def evaluate(self, objective: Any) -> dict[str, float]:
        """The evaluators' scores of the pipeline as it stands, by name; called on the main process alone."""
        ...


@dataclass(frozen=True)
class Origin:
    """Where a training begins: its start by `time.perf_counter`, its flat config, and the checkpoint to begin from if
    its folder has none; `begun_from` is the path given by --resume."""

    started: float
    config: dict[str, Any]
    resume: Path | None = None
    begun_from: str | None = None


def mean_scores(scores: Mapping[str, Sequence[float]], sources: Sequence[str] | None = None) -> dict[str, float]:
    """Scores a sample => their means, rounded once, so the order of samples and processes does not matter.

    With the `sources` of the samples the first score, which stands for the rest, is also given of each: SOURCE/NAME.
    """
    means = {name: math.fsum(values) / len(values) for name, values in scores.items()}
    first, values = next(iter(scores.items()))
    for source in dict.fromkeys(sources or ()):
        own = [value for value, of in zip(values, sources or (), strict=True) if of == source]
        means[f"{source}/{first}"] = math.fsum(own) / len(own)
    return means


def export_record(
    objective: nn.Module, seconds: float, steps: int, scores: dict[str, float], ema_width: float | None
) -> dict[str, Any]:
    """The part of an exported stage's contract that describes its training."""
    return {
        "seconds": round(seconds, 1),
        "steps": steps,
        "parameters": sum(p.numel() for p in objective.parameters()),
        "scores": scores,
        "ema_width": ema_width,
    }
