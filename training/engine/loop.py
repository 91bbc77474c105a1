"""The training loop of all stages: updates, log lines, checkpoints, resume.

A stage brings a `Task`: its `inputs` gathers a batch, and each of its players' `objective` turns it into a loss per
sample.
"""

from __future__ import annotations

import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sd_mini.data.batches import Pass, StepInputs, Steps, generator, iterate, order_of, row_slices, seed_network_draws
from sd_mini.errors import UserError
from sd_mini.processes import patient_group, wait_for_everyone
from training.distributed.processes import make_accelerator, rounded_products
from training.engine.inspection import Inspection
from training.engine.learner import Learner, Speed
from training.engine.metrics import FiniteCheck, Means, Pace, Watch, is_due, write_trace
from training.engine.task import Origin, Task, TrainConfig
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
        order = order_of(config.seed, task.bucket_counts, config.batch_size, task.weights)
        self.steps = Steps(task.inputs, order, rows)
        self.step, self.seconds, self.clock = 0, 0.0, origin.started
        self.means, self.finite = Means(self.accelerator), FiniteCheck()
        self.pace = Pace(self.accelerator, config.batch_size)
        self.watch = Watch(folder, self.accelerator, config.steps)
        self.inspection = Inspection(task, config, self.accelerator, self.learners[0], self.watch, self.finite)

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
        """Train and export, or stop where a signal asked for it; then the exit code is returned."""
        config = self.config
        # Finish what an interruption left undone after the checkpoint.
        if self.step:
            missing = config.ema_snapshots and snapshots.of_step(self.folder, self.step) is None
            if missing and self.step == config.steps and config.ema_width is not None:
                self.inspection.snapshot(self.step)  # the run was to be longer, or a kill came between
            self.inspection.run_missing(self.step)
        last = config.steps if not self.inspection.is_over else self.step
        if self.step < last:
            self._settle_buckets()
        snapshot_steps, intervals = self.inspection.snapshot_steps, self.inspection.intervals
        with Stop(self.accelerator.num_processes) as stop:
            mark = time.perf_counter()
            for inputs in iterate(self.steps, self.step, last, config.workers):
                self.update(inputs)
                self.watch.bar.update()
                self.pace.add(time.perf_counter() - mark)
                is_stopping = stop.is_asked()

                # Log line, EMA snapshot, checkpoint.
                if is_due(self.step, config.log_every, config.steps):
                    self.log()
                if self.step in snapshot_steps:
                    self.inspection.snapshot(self.step)
                if is_due(self.step, config.checkpoint_every, config.steps) or is_stopping:
                    self.save()
                if is_stopping and self.step < config.steps:
                    self.watch.message(f"stopped at step {self.step} of {config.steps}; rerun the command to resume")
                    return stop.exit_code

                # Held-out scores, preview, evaluation.
                if any(is_due(self.step, interval, config.steps) for interval in intervals):
                    self.inspection.run(self.step)
                    if self.step < config.steps and self.inspection.is_over:
                        self.save()
                        self.watch.message(f"stopped at step {self.step}: nothing better in {config.patience} looks")
                        break
                mark = time.perf_counter()
        self._tick()
        self.inspection.export(self.step, self.seconds)
        return stop.exit_code if stop.signal is not None else None  # asked at the last step: no next program may begin

    def update(self, inputs: StepInputs) -> None:
        """One optimizer update of each player from the global batch of this step."""
        self.finite.check()  # of the update before, whose norm has been copied by now
        if self.config.trace:
            write_trace(self.folder, self.rank, inputs)
        active = [learner for learner in self.learners if self.step >= learner.start]
        self.pace.count(active, inputs, self.watch.message)
        is_half = self.accelerator.mixed_precision == "bf16"
        with rounded_products() if is_half else nullcontext():
            for learner in active:
                learner.check_untouched()

                # Forward and backward passes, accumulating gradients.
                losses = self.accumulate(learner, inputs)

                # Clip the gradient, update weights and averages.
                norm = learner.update(self.step + 1)

                # Record what is logged; nothing here waits for the device.
                self.means.add({learner.prefix + "grad_norm": norm})
                self.finite.record(self.step + 1, inputs.ids, norm, losses)
        self.means.end_update()
        self.step += 1

    def accumulate(self, learner: Learner, inputs: StepInputs) -> list[tuple[np.ndarray, Tensor]]:
        """The gradient of the global batch's mean loss, over all passes and processes.

        Returns (sample ids (b,), losses (b,)) of each pass of this process.
        """
        per_sample = []
        for rows, tensors in zip(inputs.rows, inputs.passes, strict=True):
            # what the network draws itself (dropout) depends on the step and the rows alone
            draws = generator(self.config.seed, inputs.step, f"network/{rows.start}")
            seed_network_draws(draws.initial_seed(), self.accelerator.device)
            with learner.exchanging(last_pass=rows is inputs.rows[-1]):
                with self.accelerator.autocast():
                    losses, metrics = learner.objective(**self.on_device(tensors))
                losses = losses.to(torch.promote_types(losses.dtype, torch.float32))
                # this pass's weight in the mean over the global batch; DDP divides by the number of processes
                weight = len(losses) * self.accelerator.num_processes / self.config.batch_size
                loss = losses.mean() * weight
                self.accelerator.backward(loss)
            weighted = {"loss": loss.detach(), **{name: value.detach() * weight for name, value in metrics.items()}}
            self.means.add({learner.prefix + name: value for name, value in weighted.items()})
            per_sample.append((inputs.ids[rows], losses.detach()))
        return per_sample

    def on_device(self, tensors: Pass) -> Pass:
        """A pass's tensors on the accelerator's device."""
        device = self.accelerator.device
        if device.type == "cuda":  # a copy from memory that is not pinned would make the host wait
            pinned = {name: value if value.is_cuda else value.pin_memory() for name, value in tensors.items()}
            return {name: value.to(device, non_blocking=True) for name, value in pinned.items()}
        return {name: value.to(device) for name, value in tensors.items()}

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
        self.watch.show_progress(self.step, means["loss"], means["grad_norm"], speed, utilisation)

    def save(self) -> None:
        """Write `checkpoints/step-NNNNNNNN`: all that the updates to come depend on."""
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
        """Restore the newest valid checkpoint of this folder, else the one that --resume names, if there is any."""
        root = self.folder / "checkpoints"
        folder, complaints = checkpoint.newest(root)
        for complaint in complaints:
            self.watch.message(f"skipped a damaged checkpoint, kept for you to look at: {complaint}")
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
        changed = f" (of {before} before: the learning rate follows the schedule of {steps} from here on)"
        self.watch.message(f"resumed at step {self.step} of {steps}{changed if steps != before else ''}")
        wait_for_everyone()

    def _settle_buckets(self) -> None:
        """Let DDP order its gradient buckets by passes whose gradients and metrics are discarded."""
        means, self.means = self.means, Means(self.accelerator)
        for learner in self.learners:
            learner.settle_buckets(lambda learner=learner: self.accumulate(learner, self.steps[self.step]))
        self.means = means

    def _tick(self) -> None:
        now = time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now


class Stop:
    """A context manager that records SIGTERM and Ctrl-C, so that the loop can end after a whole update."""

    def __init__(self, processes: int):
        self.signal: int | None = None
        # exchanged after every update, which the device must not wait for: so on the CPU
        self.group = patient_group() if processes > 1 else None

    def is_asked(self) -> bool:
        """Whether any process got a signal: all stop at the same step, or the others would wait for ever."""
        if self.group is not None:
            received = torch.tensor([self.signal or 0])
            dist.all_reduce(received, dist.ReduceOp.MAX, group=self.group)
            self.signal = received.tolist()[0] or None
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """As the shell has it, 143 for SIGTERM and 130 for Ctrl-C: so a chain of programs ends here."""
        return 128 + (self.signal or 0)

    def __enter__(self) -> Stop:
        def record(number: int, frame: object) -> None:
            self.signal = number

        self._before = {number: signal.signal(number, record) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
