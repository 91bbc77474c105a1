"""What is done with the weights between two updates: snapshots, held-out scores, previews, evaluation, export."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn

from sd_mini.errors import UserError
from sd_mini.processes import wait_for_everyone
from training.distributed.processes import joined_rows, rows_of_process
from training.engine.best import BestKeeper
from training.engine.learner import Learner
from training.engine.metrics import EVALUATION, SCORE, FiniteCheck, Watch, is_due
from training.engine.task import EvaluatedTask, Task, TrainConfig, export_record, mean_scores
from training.optim.ema import WIDTHS
from training.storage import snapshots


class Inspection:
    """Of the first learner: what is scored, shown and exported is its average where there is one, else its weights.

    All methods are collectives: every process calls them, with the same `step`.
    """

    def __init__(
        self,
        task: Task,
        config: TrainConfig,
        accelerator: Accelerator,
        learner: Learner,
        watch: Watch,
        finite: FiniteCheck,
    ):
        self.task, self.config, self.accelerator = task, config, accelerator
        self.learner, self.watch, self.finite = learner, watch, finite
        self.folder: Path = watch.folder
        self.scores: dict[str, float] = {}  # held-out, the newest
        wish = config.keep_best
        self.keeper = BestKeeper(self.folder, wish, config.patience) if wish is not None else None
        if self.keeper is not None and self.keeper.name.startswith(EVALUATION) and task.evaluate_every is None:
            raise UserError(f"train.keep_best {wish}: nothing evaluates the pipeline; set evaluate.every")

    def run(self, step: int, wanted: Sequence[bool] = (True, True, True)) -> None:
        """Of the held-out scores, the preview and the evaluation those that are `wanted` and due at `step`."""
        inspections = (
            (self.config.valid_every, self.validate, f"scoring {self.task.valid_count:,} held-out samples"),
            (self.config.preview_every, self.preview, "drawing a preview"),
            (self.task.evaluate_every, self.evaluate, "evaluating the pipeline"),
        )
        for (every, inspect, status), is_wanted in zip(inspections, wanted, strict=True):
            if is_wanted and every is not None and is_due(step, every, self.config.steps):
                with self.watch.status(status):
                    inspect(step)

    def run_missing(self, step: int) -> None:
        """After a resume: what an interruption between the checkpoint of `step` and its inspection left undone."""
        if self.keeper is not None:
            self.keeper.check()
        self.scores = self.watch.scores(step)
        present = (self.scores, self.watch.has_picture(step), self.watch.scores(step, EVALUATION))
        missing = torch.tensor([not result for result in present], device=self.accelerator.device)
        # only the main process writes them, so all take its answer
        self.run(step, broadcast(missing).tolist())

    @contextmanager
    def weights(self, step: int) -> Generator[nn.Module]:
        """The learner's plain copy, with the weights to inspect, in evaluation mode and without gradients.

        At the last step an EMA width that was not tracked is made of the snapshots; before, the nearest tracked one
        stands for it.
        """
        self.finite.check()
        width = self.config.ema_width
        with self.learner.showing(width) as objective, torch.no_grad():
            if width is not None and width not in WIDTHS and step == self.config.steps:
                snapshots.put(objective, snapshots.at_width(self.folder, step, width))
            yield objective

    @property
    def snapshot_steps(self) -> frozenset[int]:
        """The steps after which the averages are saved."""
        steps, count = self.config.steps, self.config.ema_snapshots
        if self.config.ema_width is None:
            return frozenset()
        return frozenset(step for step in range(1, steps + 1) if snapshots.due(step, steps, count))

    @property
    def intervals(self) -> list[int]:
        """Updates from one inspection to the next, of each kind that is asked for."""
        intervals = (self.config.valid_every, self.config.preview_every, self.task.evaluate_every)
        return [interval for interval in intervals if interval is not None]

    def snapshot(self, step: int) -> None:
        """Save the averages."""
        self.finite.check()
        self.learner.average(step)
        snapshots.take(self.folder, step, self.learner.averages(), self.accelerator)

    def validate(self, step: int) -> None:
        """Mean scores over the held-out samples, each scored by one process."""
        count = self.task.valid_count
        rows = rows_of_process(count, self.accelerator.num_processes, self.accelerator.process_index)
        with self.weights(step) as objective:
            local_scores = self.task.validate(objective, rows)
            self.scores = mean_scores(joined_rows(local_scores, rows, count, self.accelerator), self.task.valid_sources)
            self._record(step, self.scores, SCORE, objective)

    def preview(self, step: int) -> None:
        """A grid of pictures, `samples/step-NNNNNNNN.png`."""
        with self.weights(step) as objective:
            if self.accelerator.is_main_process:
                self.watch.picture(self.task.preview(objective), step)
        wait_for_everyone()

    def evaluate(self, step: int) -> None:
        """The evaluators' scores of the pipeline with these weights."""
        with self.weights(step) as objective:
            if self.accelerator.is_main_process:
                task = cast(EvaluatedTask, self.task)  # as its `evaluate_every` is a number
                self._record(step, task.evaluate(objective), EVALUATION, objective)
        wait_for_everyone()

    def _record(self, step: int, scores: dict[str, float], kind: str, objective: nn.Module) -> None:
        """Keep the weights where they are the best; log the scores."""
        if self.keeper is not None and self.keeper.name.startswith(kind) and self.accelerator.is_main_process:
            self.keeper.look(step, {kind + name: value for name, value in scores.items()}, objective)
        self.watch.write_scores(step, scores, kind)

    @property
    def is_over(self) -> bool:
        """Whether `patience` has run out; all processes take the main one's answer."""
        if self.keeper is None or self.keeper.patience is None:
            return False
        over = torch.tensor([self.keeper.is_over], device=self.accelerator.device)
        return bool(broadcast(over)[0])

    def export(self, step: int, seconds: float) -> None:
        """Write the stage to `final/`, with what it took."""
        with self.weights(step) as objective:
            if self.accelerator.is_main_process:
                best = self.keeper.put(objective) if self.keeper is not None else None
                scores = self.watch.scores(best["step"]) if best is not None else self.scores
                record = export_record(objective, seconds, step, scores, self.config.ema_width)
                if best is not None:
                    record["best"] = best
                self.task.export(objective, self.folder / "final", record)
        scores = ", ".join(f"{k} {v:.4g}" for k, v in list(self.scores.items())[:2])  # the curve is in metrics.jsonl
        self.watch.message(f"{step} steps in {seconds:.0f} s; {scores}; exported to {self.folder / 'final'}")
        wait_for_everyone()
