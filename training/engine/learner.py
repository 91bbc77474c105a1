"""Who is trained: a stage brings one player, or two that work against each other, and the loop trains each alike."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sd_mini.errors import UserError
from training.distributed.sharding import own_part, part_like, whole
from training.optim import optimizer
from training.optim.ema import PowerEMA, nearest_width
from training.optim.optimizer import OptimizerConfig
from training.storage import checkpoint


@dataclass(frozen=True)
class Player:
    """What a player minimises, and how it learns.

    `objective`: forward(**inputs) => (losses (b,), {name: scalar tensor}). Its parameters are the player's own; another
    player's network is called through `fixed`, so that no gradient reaches it.
    """

    objective: nn.Module
    config: OptimizerConfig
    start: int = 0
    """the update from which it learns; before, it is not called"""


class Others(list):
    """Modules that an objective reads and does not train: no part of it, and its copies read the same ones."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Others:
        return self


@dataclass(frozen=True)
class Speed:
    """How a player's passes are run; none of it changes what is learned but for rounding."""

    compile: str | None = None
    gradient_checkpointing: bool = False


def fixed(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """`module(*args, **kwargs)` with a gradient to the arguments but none to the module's own parameters.

    How one player reads another: the generator has to know which way the discriminator's verdict would turn, and must
    not turn the discriminator itself.
    """
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    return torch.func.functional_call(module, parameters, args, kwargs)


class Learner:
    """A player at work: its module as Accelerate has wrapped it, its optimizer and schedule, its averages.

    `prefix` goes before the names of its files and metrics. `shown` is a plain copy that is never trained: it takes the
    weights that are to be evaluated, shown or exported. Only with `ema_every` are there averages, brought up to date
    every so many updates.
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
        # under FSDP2 it waits on the CPU: no device could be sure to have room for the whole beside its part
        self.shown = copy.deepcopy(self.module).requires_grad_(False).eval()
        if accelerator.is_fsdp2:
            self.shown.to("cpu")
        _speed_up(self.module, speed)
        # on a GPU Muon's float32 products are rounded anyhow (TF32)
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
        """Between its updates nobody may have left a gradient on a player's parameters."""
        leaked = [name for name, parameter in self.trained.items() if parameter.grad is not None]
        assert not leaked, f"another player's gradient reached {self.prefix}{leaked[0]}; read its network by `fixed`"

    def settle_buckets(self, make_pass: Callable[[], object]) -> None:
        """Let DDP order its gradient buckets, by passes that are thrown away.

        It does so after its first pass, and from three processes on the order decides how sums are rounded: a resumed
        run's first update would be rounded otherwise than the straight run's.
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
        """Gradients are exchanged between the processes in the last pass of an update only."""
        return nullcontext() if last_pass else self.accelerator.no_sync(self.objective)

    def update(self, step: int) -> Tensor:
        """One optimizer update, number `step` from 1 on, by the gradients that are there. Their norm, unclipped."""
        norm = self._clip()
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        if self.ema is not None and (step % self.ema_every == 0 or step == self.steps):
            self.average(step)
        return norm

    def average(self, step: int) -> None:
        """Bring the averages up to date, after update number `step`."""
        if self.ema is not None and step > self.averaged_at:
            self.ema.update(list(self.trained.values()), step, self.averaged_at)
            self.averaged_at = step

    def _clip(self) -> Tensor:
        """Scale the gradients down to `clip_norm` where they are longer; their L2 norm before."""
        gradients = [p.grad for p in self.trained.values() if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(gradients))
        # on the CPU the norm is there to be read, and most steps need no scaling; elsewhere reading it would be a wait
        if norm.device.type != "cpu" or norm.numpy() > self.config.clip_norm:
            factor = (self.config.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([own_part(g) for g in gradients], factor)
        return norm

    @property
    def rates(self) -> dict[str, float]:
        lr = self.schedule.get_last_lr()
        rates = {"lr": lr[0]} if self.config.muon_lr is None else {"lr": lr[0], "muon_lr": lr[-1]}
        return {self.prefix + name: rate for name, rate in rates.items()}

    @contextmanager
    def showing(self, width: float | None) -> Iterator[nn.Module]:
        """The plain copy with the weights of now: the average nearest to `width`, or (none) the trained ones.

        All processes have to ask, as what FSDP2 has split is gathered.
        """
        with torch.no_grad():
            trained = self.module.state_dict()
            for name, kept in self.shown.state_dict().items():
                kept.copy_(whole(trained[name]))
            if width is not None and self.ema is not None:
                copies = dict(self.shown.named_parameters())
                for name, average in zip(self.trained, self.ema.averages[nearest_width(width)], strict=True):
                    copies[name].copy_(whole(average))
        if not self.accelerator.is_fsdp2:
            yield self.shown
            return
        try:
            yield self.shown.to(self.accelerator.device)
        finally:
            self.shown.to("cpu")

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All that has to be kept, whole, by file; on the main process. The others get nothing, and have to ask too."""
        return {self.prefix + file: gathered(values, self.accelerator) for file, values in self._files().items()}

    def averages(self) -> dict[str, dict[str, Tensor]]:
        averages = self.ema.averages if self.ema is not None else {}
        return {f"ema-{width}": dict(zip(self.trained, tensors, strict=True)) for width, tensors in averages.items()}

    def state(self) -> dict[str, Any]:
        """How far the schedule is, whose functions the config makes anew, and how old the averages are."""
        return {"schedule": {"last_epoch": self.schedule.last_epoch}, "averaged_at": self.averaged_at}

    @torch.no_grad()
    def load(self, where: str, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        """Take back what `tensors` and `state` gave. Raises ValueError that names a missing file or tensor."""
        for file, expected in self._files().items():
            found = tensors.get(self.prefix + file)
            if found is None:
                raise UserError(f"{where}: {self.prefix}{file}.safetensors is missing; expected a whole checkpoint")
            checkpoint.check_keys(f"{where}/{self.prefix}{file}.safetensors", found, expected)
            for name, kept in expected.items():
                # in place: a moment keeps its parameter's strides, by which fused AdamW walks both
                own_part(kept).copy_(part_like(found[name].to(kept.device), kept))
        self.averaged_at = state["averaged_at"]
        # the rates of now, by the config's schedule: it may end at another step than it did
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
    """The tensors whole, on the main process, and none on the others. One at a time: only one takes a device's room."""
    kept = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if accelerator.is_main_process:
            kept[name] = full.cpu()
    return kept


def _speed_up(module: nn.Module, speed: Speed) -> None:
    if speed.gradient_checkpointing:
        able = [part for part in module.modules() if getattr(part, "_supports_gradient_checkpointing", False)]
        able += [part for part in module.modules() if getattr(part, "supports_gradient_checkpointing", False)]
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
