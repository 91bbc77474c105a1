"""The trainable parties of a stage: one network, or a generator and a discriminator, each with its own optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sd_mini.errors import UserError
from training.optim import optimizer
from training.optim.ema import nearest_width
from training.optim.optimizer import OptimizerConfig
from training.optim.update import PowerEMA, full_tensor, local_part, part_like
from training.storage import checkpoint


@dataclass(frozen=True)
class Player:
    """What is trained by one optimizer, and how.

    `objective`: forward(**inputs) => (losses (b,), {name: scalar tensor}). Its parameters are the player's own; another
    player's network is called through `fixed`, so that no gradient reaches it.
    """

    objective: nn.Module
    config: OptimizerConfig
    start: int = 0
    """the update from which it learns; before, it is not called"""


class Others(list):
    """Modules that an objective calls and does not train: no part of its state dict, and not copied with it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Others:
        return self


@dataclass(frozen=True)
class Speed:
    """How a player's passes are run; changes nothing but rounding."""

    compile: str | None = None
    gradient_checkpointing: bool = False


def fixed(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """`module(*args, **kwargs)` with a gradient to the arguments but none to the module's own parameters.

    The generator's loss needs the discriminator's gradient at its pictures, and must not train the discriminator.
    """
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    return torch.func.functional_call(module, parameters, args, kwargs)


class Learner:
    """A player in training: its module as wrapped by Accelerate, its optimizer, schedule and averages.

    `prefix` goes before the names of its files and metrics. `shown` is a plain copy that is never trained: it takes the
    weights to be evaluated, previewed or exported. `ema_every`: updates between two of the averages; None: no averages.
    """

    def __init__(
        self,
        player: Player,
        accelerator: Accelerator,
        steps: int,
        ema_every: int | None,
        prefix: str = "",
        speed: Speed = Speed(),
    ):
        self.prefix, self.config, self.start, self.accelerator = prefix, player.config, player.start, accelerator
        self.module = player.objective.to(accelerator.device)
        if accelerator.is_fsdp2:  # which takes no channels_last parameters
            self.module.to(memory_format=torch.contiguous_format)
        # under FSDP2 it stays on the CPU: a device may lack room for the full network beside its part
        self.shown = copy.deepcopy(self.module).requires_grad_(False).eval()
        if accelerator.is_fsdp2:
            self.shown.to("cpu")
        _speed_up(self.module, speed)
        # on a GPU `rounded_products` sets the precision of Muon's products instead (TF32)
        half = accelerator.mixed_precision == "bf16" and accelerator.device.type == "cpu"
        raw = optimizer.build(self.module, self.config, half)
        self.schedule = optimizer.build_schedule(raw, self.config, max(1, steps - self.start))
        # under FSDP2 this shards the module in place; under DDP it wraps it
        self.objective, self.optimizer = accelerator.prepare(self.module, raw)
        self.raw_optimizer = raw
        raw.create_state()
        self.trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self.steps, self.ema_every, self.averaged_at = steps, ema_every, 0
        self.ema = PowerEMA(list(self.trained.values())) if ema_every is not None else None

    def check_untouched(self) -> None:
        """Asserts that the passes of other players left no gradient on these parameters."""
        leaked = [name for name, parameter in self.trained.items() if parameter.grad is not None]
        assert not leaked, f"another player's gradient reached {self.prefix}{leaked[0]}; read its network by `fixed`"

    def settle_buckets(self, make_pass: Callable[[], object]) -> None:
        """Let DDP order its gradient buckets, by passes that are discarded.

        It orders them after its first pass, and with three or more processes the order decides how sums are rounded:
        without this a resumed run's first update would not equal the uninterrupted run's.
        """
        if not isinstance(self.objective, DistributedDataParallel):
            return
        before = [buffer.clone() for buffer in self.module.buffers()]
        for _ in range(2):  # the second pass is the first that is ordered
            make_pass()
            self.optimizer.zero_grad()
        for buffer, value in zip(self.module.buffers(), before, strict=True):
            buffer.copy_(value)

    def exchanging(self, last_pass: bool) -> AbstractContextManager:
        """Gradients are all-reduced in the last pass of an update only."""
        return nullcontext() if last_pass else self.accelerator.no_sync(self.objective)

    def update(self, step: int) -> Tensor:
        """Optimizer update number `step`, from 1, by the accumulated gradients; their L2 norm before clipping."""
        norm = self._clip()
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()

        # Power-function averages of the weights (EDM2).
        if self.ema_every is not None and (step % self.ema_every == 0 or step == self.steps):
            self.average(step)
        return norm

    def average(self, step: int) -> None:
        """Update the averages with the weights after update number `step`, unless that is done."""
        if self.ema is not None and step > self.averaged_at:
            self.ema.update(list(self.trained.values()), step, self.averaged_at)
            self.averaged_at = step

    def _clip(self) -> Tensor:
        """Scale the gradients down to `clip_norm` where they are longer; their L2 norm before."""
        gradients = [p.grad for p in self.trained.values() if p.grad is not None]
        norm = full_tensor(torch.nn.utils.get_total_norm(gradients))
        # on a CPU reading the norm is free and saves most steps the scaling; a GPU would make the host wait
        if norm.device.type != "cpu" or norm.numpy() > self.config.clip_norm:
            factor = (self.config.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([local_part(g) for g in gradients], factor)
        return norm

    @property
    def rates(self) -> dict[str, float]:
        lr: list[Any] = self.schedule.get_last_lr()
        rates = {"lr": lr[0]} if self.config.muon_lr is None else {"lr": lr[0], "muon_lr": lr[-1]}
        return {self.prefix + name: rate for name, rate in rates.items()}

    @contextmanager
    def showing(self, width: float | None) -> Generator[nn.Module]:
        """`shown` with the current weights: the tracked average nearest to `width`, or (None) the trained ones.

        A collective: FSDP2's parts are gathered.
        """
        with torch.no_grad():
            trained = self.module.state_dict()
            for name, kept in self.shown.state_dict().items():
                kept.copy_(full_tensor(trained[name]))
            if width is not None and self.ema is not None:
                copies = dict(self.shown.named_parameters())
                for name, average in zip(self.trained, self.ema.averages[nearest_width(width)], strict=True):
                    copies[name].copy_(full_tensor(average))
        if not self.accelerator.is_fsdp2:
            yield self.shown
            return
        try:
            yield self.shown.to(self.accelerator.device)
        finally:
            self.shown.to("cpu")

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds, full tensors by file, on the main process; empty on the others. A collective."""
        return {self.prefix + file: gathered(values, self.accelerator) for file, values in self._files().items()}

    def averages(self) -> dict[str, dict[str, Tensor]]:
        averages = self.ema.averages if self.ema is not None else {}
        return {f"ema-{width}": dict(zip(self.trained, tensors, strict=True)) for width, tensors in averages.items()}

    def state(self) -> dict[str, Any]:
        """The schedule's step, and the update of the averages; the schedule itself follows from the config."""
        return {"schedule": {"last_epoch": self.schedule.last_epoch}, "averaged_at": self.averaged_at}

    @torch.no_grad()
    def load(self, where: str, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        """Restore what `tensors` and `state` returned. Raises UserError that names a missing file or tensor."""
        for file, expected in self._files().items():
            saved = tensors.get(self.prefix + file)
            if saved is None:
                raise UserError(f"{where}: {self.prefix}{file}.safetensors is missing; expected a whole checkpoint")
            checkpoint.check_keys(f"{where}/{self.prefix}{file}.safetensors", saved, expected)
            for name, kept in expected.items():
                # in place: fused AdamW needs each moment in its parameter's memory order
                local_part(kept).copy_(part_like(saved[name].to(kept.device), kept))
        self.averaged_at = state["averaged_at"]
        # learning rates by this config's schedule, which may end at another step than the checkpoint's
        done, schedule = state["schedule"]["last_epoch"], self.schedule
        rates = [lr * factor(done) for lr, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        schedule.load_state_dict(schedule.state_dict() | {"last_epoch": done, "_last_lr": rates})
        for group, lr in zip(self.raw_optimizer.param_groups, rates, strict=True):
            group["lr"] = lr

    def _files(self) -> dict[str, dict[str, Tensor]]:
        return {"model": self.module.state_dict(), "optimizer": self._optimizer_tensors(), **self.averages()}

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizer's state as one flat dict, "PARAMETER.NAME" => tensor."""
        states = ((name, self.raw_optimizer.state[p]) for name, p in self.trained.items())
        return {f"{name}.{key}": value for name, state in states for key, value in state.items()}


def gathered(tensors: Mapping[str, Tensor], accelerator: Accelerator) -> dict[str, Tensor]:
    """Full tensors on the CPU of the main process, empty on the others. One at a time, to bound the device's memory."""
    gathered_tensors = {}
    for name, tensor in tensors.items():
        full = full_tensor(tensor.detach())
        if accelerator.is_main_process:
            gathered_tensors[name] = full.cpu()
    return gathered_tensors


def _speed_up(module: nn.Module, speed: Speed) -> None:
    if speed.gradient_checkpointing:
        names = ("_supports_gradient_checkpointing", "supports_gradient_checkpointing")  # diffusers', transformers'
        able: list[Any] = [part for name in names for part in module.modules() if getattr(part, name, False)]
        if not able:
            raise UserError(
                "train.gradient_checkpointing: expected a network that can do it, and none here can; leave it out"
            )
        for part in able:
            # diffusers' name, then transformers'
            enable = getattr(part, "enable_gradient_checkpointing", None) or part.gradient_checkpointing_enable
            enable()
    if speed.compile is not None:
        # regional compilation: the blocks of a list share one graph, which is compiled once
        lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
        backends = torch._dynamo.list_backends(exclude_tags=())
        if isinstance(speed.compile, str) and speed.compile not in backends:
            raise UserError(f"train.compile {speed.compile!r}: expected one of {', '.join(backends)}")
        if not lists:
            raise UserError("train.compile: expected a network of repeated blocks, and here are none; leave it out")
        for block in (block for blocks in lists for block in blocks):
            block.compile(backend=speed.compile)
