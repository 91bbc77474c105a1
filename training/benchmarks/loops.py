"""The training loops that are compared: ours, and the plain one of diffusers' examples, each in its own process."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sd_mini import images
from sd_mini.data.batches import iterate
from sd_mini.timing import wait_for_device
from training.distributed.processes import join_processes
from training.engine.launch import Launch
from training.engine.loop import Loop
from training.engine.task import Origin, Task, TrainConfig

Updates = Callable[[], Iterator[Any]]
"""A loop as a generator: it builds everything up to its first yield; from then on each yield is one update."""


@contextmanager
def processes(
    loops: Mapping[str, Updates], block: int = 1, warm_up: int = 0
) -> Generator[tuple[dict[str, Callable[[], Any]], dict[str, Any]]]:
    """=> (the loops as contestants of a `Case`, what each yielded first), each loop in a spawned process of its own.

    A contestant's turn is `block` updates, and returns what the last one yielded. The first `warm_up` updates are made
    before. What a loop raises is raised here.
    """
    with ExitStack() as stack:
        pools = {}
        for name in loops:
            pools[name] = stack.enter_context(ProcessPoolExecutor(1, multiprocessing.get_context("spawn")))
            stack.callback(pools[name].submit, _close)  # before the pool's own exit, which waits for it
        starts = {name: pools[name].submit(_start, loop, warm_up) for name, loop in loops.items()}
        first = {name: start.result() for name, start in starts.items()}
        yield {name: lambda pool=pool: pool.submit(_advance, block).result() for name, pool in pools.items()}, first


_running: list[Any] = []  # the generator of this process


def _start(loop: Updates, warm_up: int) -> Any:
    _running.append(loop())
    first = next(_running[0])
    _advance(warm_up)
    return first


def _advance(updates: int) -> Any:
    last = None
    for _ in range(updates):
        last = next(_running[0])
    wait_for_device()
    return last


def _close() -> None:
    """End the generator, so that it removes its temporary folder."""
    _running.pop().close()


@contextmanager
def open_loop(launched: Launch, make_task: Callable[[Launch], Task], log_with: tuple[str, ...] = ()) -> Generator[Loop]:
    """Our loop at its start, in a temporary folder: nothing is written to the run but caches."""
    join_processes()
    task = make_task(launched)
    config = launched.config.train.model_copy(update={"ema_snapshots": 0})
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / launched.folder.name
        loop = Loop(task, config, folder, Origin(time.perf_counter(), {}), list(log_with))
        loop.folder.mkdir()
        loop.watch.start({}, 0)
        yield loop


def logged_updates(loop: Loop) -> Iterator[None]:
    """Updates of our loop with their log lines; no validation, previews or checkpoints."""
    for inputs in iterate(loop.steps, 0, 10**6, loop.config.workers):
        loop.update(inputs)
        if loop.step % loop.config.log_every == 0:
            loop.log()
        yield


def plain_loop(
    accelerator: Accelerator, network: nn.Module, rows: Dataset, train: TrainConfig, loss_of: Callable[[Any], Tensor]
) -> Iterator[float]:
    """The loop of diffusers' examples (train_text_to_image.py, train_autoencoderkl.py): a DataLoader, AdamW, clipping,
    a scheduler, EMA at every step, two `.item()` a step. `loss_of(batch)` is the mean loss of `network`; yields it."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=train.lr, betas=train.betas, weight_decay=train.weight_decay)
    schedule = get_scheduler(train.schedule, optimizer, num_warmup_steps=train.warmup_steps, num_training_steps=10**6)
    loader = DataLoader(rows, train.batch_size, shuffle=True, drop_last=True)
    ema = EMAModel(network.parameters(), decay=0.9999) if train.ema_width is not None else None
    network, optimizer, loader, schedule = accelerator.prepare(network, optimizer, loader, schedule)
    if ema is not None:
        ema.to(accelerator.device)
    train_loss = 0.0
    while True:
        for batch in loader:
            loss = loss_of(batch)
            train_loss += accelerator.gather(loss.repeat(train.batch_size)).mean().item()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(network.parameters(), train.clip_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if ema is not None:
                ema.step(network.parameters())
            yield loss.detach().item()


class Rows(Dataset):
    """`count` rows, each made when it is asked for."""

    def __init__(self, count: int, row: Callable[[int], Any]):
        self.count, self.row = count, row

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.row(index)


def decoded_pictures(pictures: Any, side: int) -> Callable[[int], Tensor]:
    """Number => pixels (3, side, side) in [-1, 1], from PIL through torchvision's transforms, as in the examples."""
    from torchvision import transforms  # seconds

    steps = [transforms.Resize(side), transforms.CenterCrop(side), transforms.ToTensor()]
    prepare = transforms.Compose([*steps, transforms.Normalize([0.5], [0.5])])
    pil_pictures = images.to_pil(pictures)
    return lambda number: prepare(pil_pictures[number].convert("RGB"))
