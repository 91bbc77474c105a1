"""The one loop of all three stages: passes, updates, averages, logs, previews, checkpoints, resume.

A stage brings a `Task`: `inputs` gathers a batch, and each of its players' `objective` turns it into a loss per sample.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from training import checkpoint, snapshots, trace
from training.batches import generator, row_slices
from training.ema import WIDTHS
from training.finite import FiniteWatch
from training.flops import count_flops, measured_peak
from training.loader import Pass, StepInputs, Steps, iterate
from training.players import Learner, Speed
from training.process import Stop, make_accelerator, seed_network_draws, share
from training.task import Origin, Task, TrainConfig, mean_scores
from training.watch import Watch


class Loop:
    """Train to `config.steps` from the newest checkpoint in `folder`, or from the start; then export `folder/final`.

    SIGTERM and Ctrl-C save a checkpoint at the next step's end and exit 0 and 130.
    """

    def __init__(self, task: Task, config: TrainConfig, folder: Path, origin: Origin, log_with: list[str]):
        self.task, self.config, self.folder, self.origin = task, config, folder, origin
        self.accelerator = make_accelerator(config.mixed_precision, folder, log_with)
        processes, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        if config.accumulation * processes > config.batch_size:
            raise ValueError(
                f"train.batch_size {config.batch_size}: expected at least one for each of {config.accumulation} "
                f"passes on {processes} processes"
            )
        if task.valid_count < processes:
            raise ValueError(f"valid.count {task.valid_count}: expected at least one for each of {processes} processes")
        speed = Speed(config.compile, config.gradient_checkpointing)
        self.learners = [
            Learner(
                player,
                self.accelerator,
                config.steps,
                averaged=config.ema_width is not None and not number,
                prefix=f"{name}." if number else "",
                speed=speed,
            )
            for number, (name, player) in enumerate(task.players.items())
        ]
        rows = [slices[self.rank] for slices in row_slices(config.batch_size, processes, config.accumulation)]
        self.steps = Steps(task.inputs, task.count, config.seed, config.batch_size, rows)
        self.step, self.seconds, self.clock = 0, 0.0, origin.started
        self.sums: dict[str, Tensor] = {}
        self.summed = 0  # updates in `sums`
        self.scores: dict[str, float] = {}
        self.flops = 0  # of an update of this process
        self.working, self.worked = 0.0, 0  # seconds and updates since the last log line
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
        with Stop(self.accelerator.num_processes) as stop:
            mark = time.perf_counter()
            for inputs in iterate(self.steps, self.step, config.steps, config.workers):
                self.update(inputs)
                self.watch.bar.update()
                self.working, self.worked = self.working + time.perf_counter() - mark, self.worked + 1
                self.look(stopping := stop.asked())
                if stopping and self.step < config.steps:
                    self.watch.say(f"stopped at step {self.step} of {config.steps}; the same command goes on from here")
                    return stop.exit_code
                mark = time.perf_counter()
        self.finish()
        return None

    def update(self, inputs: StepInputs) -> None:
        """One optimizer update of each player from the global batch of this step."""
        self.finite.check()
        if self.config.trace:
            trace.write(self.folder, self.rank, inputs)
        if not self.flops and self.accelerator.is_main_process:
            self.flops = self._count_flops(inputs)
        for learner in self.learners:
            learner.check_untouched()
            losses = self.accumulate(learner, inputs)
            norm = learner.update(self.step + 1)
            self._add({learner.prefix + "grad_norm": norm})
            self.finite.note(self.step, inputs.ids, norm, losses)
        self.summed += 1
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
                    losses, metrics = learner.objective(**self._on_device(tensors))
                losses = losses.to(torch.promote_types(losses.dtype, torch.float32))
                # a pass's part of the mean over the global batch, as DDP averages over the processes
                part = len(losses) * self.accelerator.num_processes / self.config.batch_size
                loss = losses.mean() * part
                self.accelerator.backward(loss)
            shares = {"loss": loss.detach(), **{name: value.detach() * part for name, value in metrics.items()}}
            self._add({learner.prefix + name: value for name, value in shares.items()})
            per_sample.append((inputs.ids[rows], losses.detach()))
        return per_sample

    def look(self, stopping: bool) -> None:
        """What is due at this step's end: a log line, a snapshot, the held-out set, a checkpoint, a preview."""
        config, last = self.config, self.step == self.config.steps

        def due(every: int) -> bool:
            return last or self.step % every == 0

        if due(config.log_every):
            self.log()
        if config.ema_width is not None and snapshots.due(self.step, config.steps, config.ema_snapshots):
            self.finite.check()
            snapshots.take(self.folder, self.step, self.learners[0].averages(), self.accelerator)
        if due(config.valid_every):
            self.validate()
        if due(config.checkpoint_every) or stopping:
            self.save()
        if due(config.preview_every):
            self.preview()

    def log(self) -> None:
        """One line of metrics.jsonl: means since the last line, over all processes."""
        self.finite.check()
        sums = torch.stack(list(self.sums.values()))
        values = (self.accelerator.reduce(sums, "mean") / self.summed).tolist()
        means = dict(zip(self.sums, values, strict=True))
        self.sums, self.summed = {}, 0
        self._tick()
        rates = {name: rate for learner in self.learners for name, rate in learner.rates.items()}
        pace = self.worked / self.working if self.worked else 0.0  # updates a second
        self.working, self.worked = 0.0, 0
        speed, utilisation = pace * self.config.batch_size, self._utilisation(pace)
        self.watch.write(
            {"step": self.step, **means, **rates, "seconds": round(self.seconds, 2)},
            images_per_second=speed,
            model_flops_utilisation=utilisation,
        )
        self.watch.show(means["loss"], means["grad_norm"], speed, utilisation)

    def evaluated(self) -> nn.Module:
        """What is evaluated, shown and exported: the average where there is one, else the trained weights.

        At the last step a width that was not tracked is made of the snapshots; before, the nearest one stands for it.
        """
        self.finite.check()
        width, learner = self.config.ema_width, self.learners[0]
        shown = learner.show(width)
        if width is not None and width not in WIDTHS and self.step == self.config.steps:
            snapshots.put(shown, snapshots.at_width(self.folder, self.step, width))
        return shown

    @torch.no_grad()
    def validate(self) -> None:
        """Mean scores over the held-out samples, each looked at by one process."""
        count = self.task.valid_count
        rows = share(count, self.accelerator.num_processes, self.rank)
        own = self.task.validate(self.evaluated(), rows)
        table = torch.zeros(len(own), count, dtype=torch.float64)  # each process fills its own columns
        table[:, rows] = torch.from_numpy(np.stack([np.asarray(scores, np.float64) for scores in own.values()]))
        table = self.accelerator.reduce(table.to(self.accelerator.device), "sum").tolist()
        self.scores = mean_scores(dict(zip(own, table, strict=True)))
        self.watch.write({"step": self.step, **{f"valid/{k}": v for k, v in self.scores.items()}})

    @torch.no_grad()
    def preview(self) -> None:
        """A grid of what the weights make now, `samples/step-NNNNNNNN.png`."""
        evaluated = self.evaluated()
        if self.accelerator.is_main_process:
            self.watch.picture(self.task.preview(evaluated), self.step)

    def save(self) -> None:
        self.finite.check()
        self._tick()
        tensors = {file: values for learner in self.learners for file, values in learner.tensors().items()}
        if self.sums:
            names = list(self.sums)
            sums = self.accelerator.reduce(torch.stack([self.sums[name] for name in names]), "mean")
            tensors["sums"] = dict(zip(names, sums.view(-1, 1), strict=True))
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "summed": self.summed,
            "scores": self.scores,
            "schedules": {learner.prefix: learner.state() for learner in self.learners},
            "identity": self.task.identity,
            "config": self.origin.config,
        }
        if self.accelerator.is_main_process:
            keep = self.config.keep_last, self.config.keep_every
            checkpoint.save(self.folder / "checkpoints", self.step, tensors, state, *keep)
        self.accelerator.wait_for_everyone()

    def resume(self) -> None:
        """Go on from the newest valid checkpoint, if there is one, or from the one that was asked for."""
        folder, complaints = checkpoint.newest(self.folder / "checkpoints")
        for complaint in complaints:
            self.watch.say(f"skipped a damaged checkpoint, kept for you to look at: {complaint}")
        if folder is None and complaints:
            raise ValueError(f"{self.folder}: no valid checkpoint is left; delete the folder to start again")
        folder = folder or self.origin.resume
        if folder is None:
            return
        tensors, state = checkpoint.load(folder)
        checkpoint.check_identity(folder, state, self.task.identity)
        for learner in self.learners:
            learner.load(str(folder), tensors, state["schedules"][learner.prefix])
        self.step, self.seconds, self.summed = state["step"], state["seconds"], state["summed"]
        self.sums = {k: v[0].to(self.accelerator.device) for k, v in tensors.get("sums", {}).items()}
        self.scores = state["scores"]
        self.watch.say(f"goes on from step {self.step} of {self.config.steps}")

    def finish(self) -> None:
        """Export the stage, with what it cost."""
        evaluated = self.evaluated()
        self._tick()
        if self.accelerator.is_main_process:
            record = {
                "seconds": round(self.seconds, 1),
                "steps": self.step,
                "parameters": sum(p.numel() for p in evaluated.parameters()),
                "scores": self.scores,
                "ema_width": self.config.ema_width,
            }
            with torch.no_grad():
                self.task.export(evaluated, self.folder / "final", record)
        shown = ", ".join(f"{k} {v:.4g}" for k, v in list(self.scores.items())[:2])  # the curve is in metrics.jsonl
        self.watch.say(f"{self.step} steps in {self.seconds:.0f} s; {shown}; exported to {self.folder / 'final'}")
        self.accelerator.wait_for_everyone()

    def _count_flops(self, inputs: StepInputs) -> int:
        """FLOPs of one update of this process, from its first pass; the others have as many rows, give or take one."""
        first, rows = inputs.rows[0], sum(rows.stop - rows.start for rows in inputs.rows)
        tensors = self._on_device(inputs.passes[0])
        passes = [count_flops(r.shown, r.trained, tensors, self.accelerator.autocast()) for r in self.learners]
        return sum(passes) * rows // (first.stop - first.start)

    def _utilisation(self, pace: float) -> float:
        """MFU of this process: FLOPs of its passes over the time they and all else took, and its measured peak."""
        dtype = torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else torch.float32
        return self.flops * pace / measured_peak(self.accelerator.device, dtype)

    def _add(self, shares: dict[str, Tensor]) -> None:
        for name, value in shares.items():
            self.sums[name] = self.sums.get(name, 0) + value.float()

    def _on_device(self, tensors: Pass) -> Pass:
        return {name: value.to(self.accelerator.device, non_blocking=True) for name, value in tensors.items()}

    def _tick(self) -> None:
        now = time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now
