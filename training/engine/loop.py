"""The one loop of all three stages: passes, updates, averages, logs, previews, checkpoints, resume.

A stage brings a `Task`: `inputs` gathers a batch, and each of its players' `objective` turns it into a loss per sample.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast
from torch import Tensor, nn

from sd_mini.errors import UserError
from training.distributed.processes import (
    Stop,
    joined_rows,
    make_accelerator,
    rounded_products,
    seed_network_draws,
    share,
    wait_for_everyone,
)
from training.engine import trace
from training.engine.batches import generator, row_slices
from training.engine.finite import FiniteWatch
from training.engine.learner import Learner, Speed
from training.engine.loader import Pass, StepInputs, Steps, iterate
from training.engine.means import Means
from training.engine.pace import Pace
from training.engine.task import Origin, Task, TrainConfig, export_record, mean_scores
from training.engine.watch import MEASURE, Watch
from training.optim.ema import WIDTHS
from training.storage import checkpoint, snapshots


class Loop:
    """Train to `config.steps` from the newest checkpoint in `folder`, or from the start; then export `folder/final`.

    SIGTERM and Ctrl-C save a checkpoint at the next step's end and exit with 143 and 130.
    """

    def __init__(self, task: Task, config: TrainConfig, folder: Path, origin: Origin, log_with: list[str]):
        self.task, self.config, self.folder, self.origin = task, config, folder, origin
        self.accelerator = make_accelerator(config.mixed_precision, folder, log_with)
        processes, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        if task.valid_count < processes:
            raise UserError(f"valid.count {task.valid_count}: expected at least one for each of {processes} processes")
        if len(task.players) > 1 and (self.accelerator.is_fsdp2 or config.gradient_checkpointing):
            raise UserError(
                f"players {', '.join(task.players)}: two cannot read each other's networks under FSDP2 or gradient "
                "checkpointing; leave both out"
            )
        speed = Speed(config.compile, config.gradient_checkpointing)
        self.learners = [
            Learner(
                player,
                self.accelerator,
                config.steps,
                ema_every=config.ema_every if config.ema_width is not None and not number else None,
                prefix=f"{name}." if number else "",
                speed=speed,
            )
            for number, (name, player) in enumerate(task.players.items())
        ]
        rows = [slices[self.rank] for slices in row_slices(config.batch_size, processes, config.accumulation)]
        self.steps = Steps(task.inputs, task.count, config.seed, config.batch_size, rows)
        self.step, self.seconds, self.clock = 0, 0.0, origin.started
        self.means = Means(self.accelerator)
        self.scores: dict[str, float] = {}
        self.pace = Pace(self.accelerator, config.batch_size)
        self.finite = FiniteWatch()
        self.watch = Watch(folder, self.accelerator, config.steps)

    def run(self) -> None:
        self.resume()
        self.watch.start(self.origin.config, self.step)
        try:
            exit_code = self._train()
        except BaseException:
            self.watch.bar.close()
            raise
        self.watch.finish()
        if exit_code is not None:
            sys.exit(exit_code)

    def _train(self) -> int | None:
        """To the end, and export; or to where it was asked to stop, and the exit code that says so."""
        config = self.config
        if self.step:
            if self.step == config.steps and config.ema_snapshots and snapshots.of_step(self.folder, self.step) is None:
                self.snapshot(due=True)  # it was to end later, or a kill came between
            self._evaluate_what_was_lost()
        if self.step < config.steps:
            means, self.means = self.means, Means(self.accelerator)  # of passes that are thrown away
            for learner in self.learners:
                learner.settle_buckets(lambda learner=learner: self.accumulate(learner, self.steps[self.step]))
            self.means = means
        with Stop(self.accelerator.num_processes) as stop:
            mark = time.perf_counter()
            for inputs in iterate(self.steps, self.step, config.steps, config.workers):
                self.update(inputs)
                self.watch.bar.update()
                self.pace.add(time.perf_counter() - mark)
                self.look(stopping := stop.asked())
                if stopping and self.step < config.steps:
                    self.watch.say(f"stopped at step {self.step} of {config.steps}; the same command goes on from here")
                    return stop.exit_code
                mark = time.perf_counter()
        self.finish()
        return (
            stop.exit_code if stop.signal is not None else None
        )  # asked at the last step: what follows must not begin

    def update(self, inputs: StepInputs) -> None:
        """One optimizer update of each player from the global batch of this step."""
        half = self.accelerator.mixed_precision == "bf16"
        with rounded_products() if half else nullcontext():
            self._update(inputs)

    def _update(self, inputs: StepInputs) -> None:
        self.finite.check()
        if self.config.trace:
            trace.write(self.folder, self.rank, inputs)
        at_work = [learner for learner in self.learners if self.step >= learner.start]
        self.pace.count(at_work, inputs, self.watch.say)
        for learner in at_work:
            learner.check_untouched()
            losses = self.accumulate(learner, inputs)
            norm = learner.update(self.step + 1)
            self.means.add({learner.prefix + "grad_norm": norm})
            self.finite.note(self.step + 1, inputs.ids, norm, losses)
        self.means.count()
        self.step += 1

    def accumulate(self, learner: Learner, inputs: StepInputs) -> list[tuple[np.ndarray, Tensor]]:
        """The gradient of the global batch's mean loss, over all passes and processes. (ids, losses) of each pass."""
        per_sample = []
        for rows, tensors in zip(inputs.rows, inputs.passes, strict=True):
            # whatever the network draws itself (dropout) depends on the step and the rows alone
            draws = generator(self.config.seed, inputs.step, f"network/{rows.start}")
            seed_network_draws(draws.initial_seed(), self.accelerator.device)
            with learner.exchanging(last_pass=rows is inputs.rows[-1]):
                with self.accelerator.autocast():
                    losses, metrics = learner.objective(**self.on_device(tensors))
                losses = losses.to(torch.promote_types(losses.dtype, torch.float32))
                # a pass's part of the mean over the global batch, as DDP averages over the processes
                part = len(losses) * self.accelerator.num_processes / self.config.batch_size
                loss = losses.mean() * part
                self.accelerator.backward(loss)
            shares = {"loss": loss.detach(), **{name: value.detach() * part for name, value in metrics.items()}}
            self.means.add({learner.prefix + name: value for name, value in shares.items()})
            per_sample.append((inputs.ids[rows], losses.detach()))
        return per_sample

    def _due(self, every: int) -> bool:
        return self.step == self.config.steps or self.step % every == 0

    def look(self, stopping: bool) -> None:
        """What is due at this step's end: a log line, a snapshot, a checkpoint; then the held-out set and a preview."""
        if self._due(self.config.log_every):
            self.log()
        self.snapshot()
        if self._due(self.config.checkpoint_every) or stopping:
            self.save()
        if not stopping or self.step == self.config.steps:
            self.evaluate()

    def snapshot(self, due: bool = False) -> None:
        config = self.config
        due = due or snapshots.due(self.step, config.steps, config.ema_snapshots)
        if config.ema_width is not None and due:
            self.finite.check()
            self.learners[0].average(self.step)
            snapshots.take(self.folder, self.step, self.learners[0].averages(), self.accelerator)

    def evaluate(self) -> None:
        self._evaluate([True] * 3)

    def _evaluate_what_was_lost(self) -> None:
        """A kill after the checkpoint from which this goes on may have come before that step was evaluated."""
        self.scores = self.watch.scores(self.step)
        there = (self.scores, self.watch.has_picture(self.step), self.watch.scores(self.step, MEASURE))
        lost = torch.tensor([not found for found in there], device=self.accelerator.device)
        # the main process has written them, so it knows for all
        self._evaluate(broadcast(lost).tolist())

    def _evaluate(self, wanted: list[bool]) -> None:
        """Of the held-out scores, the preview and the evaluators' scores, those wanted, where they are due."""
        looks = (
            (self.config.valid_every, self.validate, f"scoring {self.task.valid_count:,} held-out samples"),
            (self.config.preview_every, self.preview, "drawing a preview"),
            (self.task.measure_every, self.measure, "asking the evaluators"),
        )
        for (every, look, what), asked in zip(looks, wanted, strict=True):
            if asked and every is not None and self._due(every):
                with self.watch.doing(what):
                    look()

    def log(self) -> None:
        """One line of metrics.jsonl: means since the last line, over all processes."""
        self.finite.check()
        means = self.means.take()
        self._tick()
        rates = {name: rate for learner in self.learners for name, rate in learner.rates.items()}
        speed, utilisation = self.pace.take()
        self.watch.write(
            {"step": self.step, **means, **rates, "seconds": round(self.seconds, 2)},
            images_per_second=speed,
            model_flops_utilisation=utilisation,
        )
        self.watch.show(means["loss"], means["grad_norm"], speed, utilisation)

    @contextmanager
    def evaluated(self) -> Iterator[nn.Module]:
        """What is evaluated, shown and exported: the average where there is one, else the trained weights.

        At the last step a width that was not tracked is made of the snapshots; before, the nearest one stands for it.
        """
        self.finite.check()
        width = self.config.ema_width
        with self.learners[0].showing(width) as shown, torch.no_grad():
            if width is not None and width not in WIDTHS and self.step == self.config.steps:
                snapshots.put(shown, snapshots.at_width(self.folder, self.step, width))
            yield shown

    def validate(self) -> None:
        """Mean scores over the held-out samples, each looked at by one process."""
        count = self.task.valid_count
        rows = share(count, self.accelerator.num_processes, self.rank)
        with self.evaluated() as evaluated:
            own = self.task.validate(evaluated, rows)
        self.scores = mean_scores(joined_rows(own, rows, count, self.accelerator))
        self.watch.write_scores(self.step, self.scores)

    def preview(self) -> None:
        """A grid of what the weights make now, `samples/step-NNNNNNNN.png`."""
        with self.evaluated() as evaluated:
            if self.accelerator.is_main_process:
                self.watch.picture(self.task.preview(evaluated), self.step)
        wait_for_everyone()

    def measure(self) -> None:
        """The evaluators' scores of what the weights make now."""
        with self.evaluated() as evaluated:
            if self.accelerator.is_main_process:
                self.watch.write_scores(self.step, self.task.measure(evaluated), MEASURE)
        wait_for_everyone()

    def save(self) -> None:
        self.finite.check()
        self._tick()
        tensors = {file: values for learner in self.learners for file, values in learner.tensors().items()}
        if sums := self.means.save():
            tensors["sums"] = sums
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "sums": self.means.counts,
            "learners": {learner.prefix: learner.state() for learner in self.learners},
            "identity": self.task.identity,
            "config": self.origin.config,
            "begun_from": self.origin.begun_from,
        }
        if self.accelerator.is_main_process:
            self.watch.sync()
            keep = self.config.keep_last, self.config.keep_every
            checkpoint.save(self.folder / "checkpoints", self.step, tensors, state, *keep)
        wait_for_everyone()

    def resume(self) -> None:
        """Go on from the newest valid checkpoint, if there is one, or from the one that was asked for."""
        root = self.folder / "checkpoints"
        folder, complaints = checkpoint.newest(root)
        for complaint in complaints:
            self.watch.say(f"skipped a damaged checkpoint, kept for you to look at: {complaint}")
        wait_for_everyone()
        if folder is None and complaints and self.origin.resume is None:
            raise UserError(f"{self.folder}: no valid checkpoint is left; delete the folder to start again")
        if self.accelerator.is_main_process:
            checkpoint.set_aside(root)
        if folder is None and self.origin.resume is not None:
            folder = self.origin.resume
            if self.config.ema_width is not None and self.accelerator.is_main_process:
                snapshots.inherit(self.folder, folder, self.config.steps, self.config.ema_snapshots)
        if folder is None:
            return
        tensors, state = checkpoint.load(folder)
        checkpoint.check_identity(folder, state, self.task.identity)
        for learner in self.learners:
            learner.load(str(folder), tensors, state["learners"][learner.prefix])
        self.step, self.seconds = state["step"], state["seconds"]
        self.means.load(state["sums"], tensors)
        steps = self.config.steps
        before = state["config"].get("train.steps", steps)
        anew = f" (of {before} before: the learning rate follows the schedule of {steps} from here on)"
        self.watch.say(f"goes on from step {self.step} of {steps}{anew if steps != before else ''}")
        wait_for_everyone()

    def finish(self) -> None:
        """Export the stage, with what it cost."""
        with self.evaluated() as evaluated:
            self._tick()
            if self.accelerator.is_main_process:
                record = export_record(evaluated, self.seconds, self.step, self.scores, self.config.ema_width)
                self.task.export(evaluated, self.folder / "final", record)
        shown = ", ".join(f"{k} {v:.4g}" for k, v in list(self.scores.items())[:2])  # the curve is in metrics.jsonl
        self.watch.say(f"{self.step} steps in {self.seconds:.0f} s; {shown}; exported to {self.folder / 'final'}")
        wait_for_everyone()

    def on_device(self, tensors: Pass) -> Pass:
        """A pass's tensors where they are computed with."""
        device = self.accelerator.device
        if device.type == "cuda":  # a copy from memory that is not pinned would make the host wait
            resting = {name: value if value.is_cuda else value.pin_memory() for name, value in tensors.items()}
            return {name: value.to(device, non_blocking=True) for name, value in resting.items()}
        return {name: value.to(device) for name, value in tensors.items()}

    def _tick(self) -> None:
        now = time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now
