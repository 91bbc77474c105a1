"""The one loop of all three stages: accumulation, clipping, EMA, logs, previews, checkpoints, resume.

A stage brings a `Task`: `inputs` gathers a batch, `objective` is the nn.Module that turns it into a loss per sample.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from tqdm.auto import tqdm

from sd_mini.config import Config
from training import checkpoint, optimizer
from training.batches import Batch, batch_ids, generator, row_slices
from training.ema import PowerEMA
from training.process import evaluating, tune_cpu


class TrainConfig(Config):
    """How long, how fast, and how often to look."""

    steps: int = Field(1000, ge=1)
    """optimizer updates"""
    batch_size: int = Field(64, ge=1)
    """pictures an update, over all processes and accumulation"""
    accumulation: int = Field(1, ge=1)
    """forward/backward passes that share one update"""
    lr: float = Field(1e-3, gt=0)
    """peak learning rate"""
    muon_lr: float | None = Field(None, gt=0)
    """peak learning rate of Muon, which then trains the matrices of the blocks; none: AdamW trains everything"""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """how the learning rate goes down to 0 after the warm-up ("constant" does not)"""
    warmup_steps: int = Field(50, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    """gradients are scaled down to this L2 norm"""
    ema_width: float | None = Field(None, gt=0, le=0.28)
    """relative width of the weights' power-function average (0.05 to 0.1); what is exported and previewed; none: off"""
    seed: int = 0
    log_every: int = Field(20, ge=1)
    preview_every: int = Field(250, ge=1)
    checkpoint_every: int = Field(250, ge=1)
    keep_last: int = Field(2, ge=1)
    """checkpoints that stay on disk"""


class Task(Protocol):
    """What a stage brings to the loop."""

    objective: nn.Module
    """forward(**inputs) => (losses (b,), {name: scalar tensor})"""
    count: int
    """training samples"""
    identity: dict[str, str]
    """hashes of what it is trained on; a checkpoint of anything else is refused"""

    def inputs(self, batch: Batch) -> dict[str, Any]: ...

    def validate(self, objective: nn.Module) -> dict[str, float]: ...

    def preview(self, objective: nn.Module) -> Image.Image: ...

    def export(self, objective: nn.Module, folder: Path, record: dict[str, Any]) -> None: ...


class Loop:
    """Train to `config.steps` from the newest checkpoint in `folder`, or from the start; then export `folder/final`.

    `started`: when the work began, by `time.perf_counter`. SIGTERM and Ctrl-C save a checkpoint at the next step's end
    and exit 0 and 130.
    """

    def __init__(self, task: Task, config: TrainConfig, folder: Path, started: float):
        self.task, self.config, self.folder = task, config, folder
        self.accelerator = Accelerator()
        if self.accelerator.mixed_precision == "fp16":
            raise ValueError("mixed precision fp16: expected no or bf16, whose range needs no loss scaling")
        if config.accumulation * self.accelerator.num_processes > config.batch_size:
            raise ValueError(
                f"train.batch_size {config.batch_size}: expected at least one for each of {config.accumulation} "
                f"passes on {self.accelerator.num_processes} processes"
            )
        if self.accelerator.device.type == "cpu":
            tune_cpu(self.accelerator.num_processes)
        self.optimizer = optimizer.build(task.objective, config.lr, config.muon_lr, config.betas, config.weight_decay)
        schedule = {"constant": "constant_with_warmup"}.get(config.schedule, config.schedule)
        # not prepared by Accelerate, which would step it once a process instead of once an update
        self.schedule = get_scheduler(
            schedule, self.optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=config.steps
        )
        task.objective.to(self.accelerator.device)
        self.ema = PowerEMA(task.objective, config.ema_width) if config.ema_width is not None else None
        self.objective, self.optimizer = self.accelerator.prepare(task.objective, self.optimizer)
        self.step, self.seconds, self.stop_signal = 0, 0.0, None
        self.clock = started
        self.sums: dict[str, Tensor] = {}
        self.summed = 0  # updates in `sums`
        self.log_path = folder / "metrics.jsonl"

    @property
    def averaged(self) -> nn.Module:
        """What is evaluated, shown and exported: the average where there is one, else the trained weights."""
        return self.ema.module if self.ema else self.task.objective

    def run(self) -> None:
        config, main = self.config, self.accelerator.is_main_process
        self.resume()
        with self._signals(), self._progress() as bar:
            while self.step < config.steps:
                self.update()
                bar.update()
                if self.step % config.log_every == 0 or self.step == config.steps:
                    self.log(bar)
                if main and (self.step % config.preview_every == 0 or self.step == config.steps):
                    self.preview()
                stopping = self._asked_to_stop()
                if self.step % config.checkpoint_every == 0 or self.step == config.steps or stopping:
                    self.save()
                if stopping and self.step < config.steps:
                    self._say(f"stopped at step {self.step} of {config.steps}; the same command goes on from here")
                    sys.exit(0 if self.stop_signal == signal.SIGTERM else 130)
        if main:
            self.finish()
        self.accelerator.wait_for_everyone()

    def update(self) -> None:
        """One optimizer update from the global batch of this step."""
        config, processes = self.config, self.accelerator.num_processes
        ids = batch_ids(config.seed, self.step, self.task.count, config.batch_size)
        passes = row_slices(config.batch_size, processes, config.accumulation)
        for number, rows in enumerate(passes, start=1):
            batch = Batch(config.seed, self.step, ids, rows[self.accelerator.process_index], self.accelerator.device)
            # whatever the network draws itself (dropout) depends on the step and the rows alone
            torch.manual_seed(generator(config.seed, self.step, f"network/{batch.rows.start}").initial_seed())
            sync = contextlib.nullcontext() if number == len(passes) else self.accelerator.no_sync(self.objective)
            with sync:
                with self.accelerator.autocast():
                    losses, metrics = self.objective(**self.task.inputs(batch))
                # the mean over the global batch, whatever its parts; DDP averages over processes
                loss = losses.float().sum() * (processes / config.batch_size)
                self.accelerator.backward(loss)
            self._add({"loss": loss, **metrics}, len(passes))
        norm = self.accelerator.clip_grad_norm_(self.objective.parameters(), config.clip_norm)
        if not torch.isfinite(norm):
            raise ValueError(
                f"step {self.step}: the gradient is not finite; samples {ids.tolist()}; look at those or lower train.lr"
            )
        self._add({"grad_norm": norm}, 1)
        self.summed += 1
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.step += 1
        if self.ema:
            self.ema.update(self.task.objective, self.step)

    def _add(self, metrics: dict[str, Tensor], passes: int) -> None:
        for name, value in metrics.items():
            # the loss is already a share of the global batch; other metrics are means of a pass
            share = value.detach() if name == "loss" else value.detach() / passes
            self.sums[name] = self.sums.get(name, 0) + share

    def log(self, bar: tqdm) -> None:
        """One line of metrics.jsonl: means since the last line, over all processes."""
        means = {k: self.accelerator.reduce(v, "mean").item() / self.summed for k, v in self.sums.items()}
        self.sums, self.summed = {}, 0
        self._tick()
        lr = self.schedule.get_last_lr()
        rates = {"lr": lr[0]} if self.config.muon_lr is None else {"lr": lr[0], "muon_lr": lr[-1]}
        self._write({"step": self.step, **means, **rates, "seconds": round(self.seconds, 2)})
        speed = (bar.format_dict["rate"] or 0) * self.config.batch_size
        bar.set_postfix({"loss": f"{means['loss']:.4f}", "img/s": f"{speed:.0f}"}, refresh=False)

    def preview(self) -> None:
        """A grid of what the weights make now, `samples/step-NNNNNNNN.png`."""
        path = self.folder / "samples" / f"step-{self.step:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with torch.no_grad(), evaluating(self.averaged):
            self.task.preview(self.averaged).save(path)

    def save(self) -> None:
        self._tick()
        if self.accelerator.is_main_process:
            tensors = {
                "model": self.task.objective.state_dict(),
                "optimizer": checkpoint.optimizer_tensors(self.optimizer),
            }
            if self.ema:
                tensors["ema"] = self.ema.module.state_dict()
            if self.sums:
                tensors["sums"] = {name: value.float().reshape(1) for name, value in self.sums.items()}
            identity = self.task.identity
            # what LambdaLR keeps beside the functions that the config makes anew
            schedule = {k: v for k, v in self.schedule.state_dict().items() if k in ("last_epoch", "_last_lr")}
            state = {"step": self.step, "seconds": self.seconds, "summed": self.summed, "schedule": schedule}
            state["identity"] = identity
            checkpoint.save(self.folder / "checkpoints", self.step, tensors, state, self.config.keep_last)
        self.accelerator.wait_for_everyone()

    def resume(self) -> None:
        """Go on from the newest valid checkpoint, if there is one."""
        folder, complaints = checkpoint.newest(self.folder / "checkpoints")
        for complaint in complaints:
            self._say(f"skipped a damaged checkpoint, kept for you to look at: {complaint}")
        if folder is None:
            if complaints:
                raise ValueError(f"{self.folder}: no valid checkpoint is left; delete the folder to start again")
            return self._keep_log_up_to(0)
        tensors, state = checkpoint.load(folder)
        for name, now in self.task.identity.items():
            if state["identity"].get(name) != now:
                then = str(state["identity"].get(name))
                raise ValueError(
                    f"{folder} was trained on {name} {then[:12]}, which is now {now[:12]}; put the old one back, or "
                    f"delete {self.folder} to start again"
                )
        self.task.objective.load_state_dict(tensors["model"])
        checkpoint.load_optimizer_tensors(self.optimizer, tensors["optimizer"])
        if self.ema:
            self.ema.module.load_state_dict(tensors["ema"])
        self.step, self.seconds, self.summed = state["step"], state["seconds"], state["summed"]
        self.sums = {k: v[0].to(self.accelerator.device) for k, v in tensors.get("sums", {}).items()}
        self.schedule.load_state_dict(self.schedule.state_dict() | state["schedule"])
        for group, lr in zip(self.optimizer.param_groups, state["schedule"]["_last_lr"], strict=True):
            group["lr"] = lr
        self._keep_log_up_to(self.step)
        self._say(f"goes on from step {self.step} of {self.config.steps}")

    def finish(self) -> None:
        """Validate, then export the stage, with what it cost."""
        with torch.no_grad(), evaluating(self.averaged):
            scores = self.task.validate(self.averaged)
            self._tick()
            self._write({"step": self.step, **{f"valid/{k}": v for k, v in scores.items()}})
            record = {
                "seconds": round(self.seconds, 1),
                "steps": self.step,
                "parameters": sum(p.numel() for p in self.task.objective.parameters()),
                "scores": scores,
            }
            self.task.export(self.averaged, self.folder / "final", record)
        shown = ", ".join(f"{k} {v:.4g}" for k, v in scores.items())
        self._say(f"{self.step} steps in {self.seconds:.0f} s; {shown}; exported to {self.folder / 'final'}")

    def _asked_to_stop(self) -> bool:
        """Whether any process was: all have to stop at the same step, or the others would wait for ever."""
        if self.accelerator.num_processes == 1:
            return self.stop_signal is not None
        noted = torch.tensor(self.stop_signal or 0, device=self.accelerator.device)
        self.stop_signal = int(self.accelerator.gather(noted.view(1)).max()) or None
        return self.stop_signal is not None

    def _tick(self) -> None:
        now = time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now

    def _say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(f"{self.folder.name}: {text}", file=sys.stderr)

    def _write(self, line: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with self.log_path.open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")

    def _keep_log_up_to(self, step: int) -> None:
        """Drop the lines that a killed run had written after the checkpoint it now goes on from."""
        if not self.accelerator.is_main_process or not self.log_path.is_file():
            return
        lines = self.log_path.read_text(encoding="utf-8").splitlines()
        kept = [
            line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step and "valid/" not in line
        ]
        self.log_path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def _progress(self) -> tqdm:
        return tqdm(
            total=self.config.steps,
            initial=self.step,
            desc=self.folder.name,
            unit="step",
            mininterval=0.5 if sys.stderr.isatty() else 15,
            disable=not self.accelerator.is_main_process,
        )

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def note(number: int, frame: object) -> None:
            self.stop_signal = number

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
