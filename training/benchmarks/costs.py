"""What the loop, a checkpoint, encoding captions and decoding latents cost."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from sd_mini import shapes
from sd_mini.data import cache
from sd_mini.errors import UserError
from sd_mini.stages.contract import KINDS, load_stage
from sd_mini.text_encoder.adapter import TextStage
from sd_mini.timing import Case, Spread
from training.benchmarks.loops import logged_updates, open_loop
from training.distributed.processes import join_processes, tune_cpu
from training.engine.launch import parse
from training.storage import checkpoint
from training.text_encoder.data import CHUNK


class Clock(dict[str, float]):
    """Seconds spent in the functions it wraps, by name."""

    def around(self, name: str, function: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self[name] = self.get(name, 0.0) + time.perf_counter() - start
            return result

        return timed


def loop_cost(argv: Sequence[str], updates: int = 100) -> None:
    """Share of a step that is neither forward, backward nor optimizer, log lines included; on the CPU.

    Validation, previews and checkpoints come on top, each at its own price.
    """
    stage, *options = argv
    if stage not in KINDS:
        raise UserError(f"loop {stage}: no such stage; expected one of {', '.join(KINDS)}")
    program = import_module(f"training.{stage}.task").main
    launched = parse(program.config, stage, options)
    if launched is None:
        return
    with open_loop(launched, program.make_task, launched.log_with) as loop:
        (learner,) = loop.learners
        clock, steps = Clock(), logged_updates(loop)
        learner.objective.forward = clock.around("forward", learner.objective.forward)
        loop.accelerator.backward = clock.around("backward", loop.accelerator.backward)
        learner.optimizer.step = clock.around("optimizer", learner.optimizer.step)

        def update() -> dict[str, float]:
            clock.clear()
            next(steps)
            loop.watch.bar.update()
            if loop.step == 1:
                loop.log()  # which measures the machine's peak the first time
            return dict(clock)

        turns = Case("loop", {"update": update}, updates, warm_up_rounds=10, figures={}).run()
        loop.watch.finish()
    seconds = turns.seconds["update"]
    spent: list[dict[str, float]] = turns.results["update"]
    shares = {name: sum(one[name] for one in spent) for name in spent[0]}
    shares["the loop"] = sum(seconds) - sum(shares.values())
    print(f"{updates} updates, {1000 * Spread.of(seconds).median:.1f} ms each (median)")
    for name, value in shares.items():
        print(f"{name:>10} {1000 * value / updates:8.2f} ms {100 * value / sum(seconds):6.2f} %")


def save_cost(argv: Sequence[str] = (), rounds: int = 7, parameters: int = 100_000_000) -> None:
    """A checkpoint of so many parameters, with moments and two averages, against a plain write of the same bytes."""
    tensors = {
        file: {f"w{i}": torch.randn(parameters // 25) for i in range(25 * size)}
        for file, size in (("model", 1), ("optimizer", 2), ("ema-0.05", 1), ("ema-0.1", 1))
    }
    with tempfile.TemporaryDirectory(dir=".") as folder:
        root = Path(folder)

        def plain_write(is_synced: bool) -> None:
            for file, values in tensors.items():
                save_file(values, root / f"{file}.safetensors")
                if is_synced:
                    checkpoint.sync(root / f"{file}.safetensors")

        def clear() -> None:
            for path in root.glob("*.safetensors"):
                path.unlink()
            os.sync()

        numbers = iter(range(rounds))
        contestants = {
            "plain": lambda: plain_write(is_synced=False),
            "plain, synced": lambda: plain_write(is_synced=True),
            "checkpoint": lambda: checkpoint.save(root, next(numbers), tensors, {}, 1),
        }
        Case("save", contestants, rounds, prepare=clear).run()


def encode_cost(argv: Sequence[str], count: int = 100_000) -> None:
    """So many unique captions through a text stage into a cache on disk: seconds, and how the memory grew.

    The captions are those of shapes scenes, each numbered, so that no two are alike and their lengths differ.
    """
    (folder,) = argv
    stage = TextStage.from_parts(load_stage(folder, "text_encoder").parts)
    scenes = shapes.sample_scenes(count, "train", seed=1)
    captions = [f"{i} {shapes.caption(scene, i % 4)}" for i, scene in enumerate(scenes)]
    join_processes()
    tune_cpu(1)
    memory: list[int] = []  # anonymous bytes after each chunk: resident without what is mapped from files

    def encode_rows(rows: slice) -> dict[str, np.ndarray]:
        with torch.no_grad():
            embeds = stage.encode(captions[rows], warn=False)
        _, resident, mapped, *_ = map(int, Path("/proc/self/statm").read_text().split())
        memory.append((resident - mapped) * os.sysconf("SC_PAGE_SIZE"))
        return {"tokens": embeds.tokens.numpy(), "mask": embeds.mask.numpy()}

    with tempfile.TemporaryDirectory(dir=".") as home:
        start = time.perf_counter()
        cache.encode(Path(home), {"benchmark": folder}, count, encode_rows, "captions", chunk=CHUNK)
        seconds = time.perf_counter() - start
    settled = memory[len(memory) // 4]
    print(f"{count} captions in {seconds:.1f} s, {count / seconds:.0f} a second")
    print(f"memory after a quarter {settled / 2**20:.0f} MiB, at most {(max(memory) - settled) / 2**20:+.1f} MiB later")


def decode_cost(argv: Sequence[str], batch: int = 64) -> None:
    """Pictures a second that a stage's decoder makes of random latents, at the size it was trained at."""
    (folder,) = argv
    stage = load_stage(folder, "autoencoder")
    join_processes()
    tune_cpu(1)
    autoencoder = stage.parts["autoencoder"].to(memory_format=torch.channels_last)
    latents = torch.randn(batch, *stage.contract["latent_shape"])
    decode = torch.inference_mode()(lambda: autoencoder.decode(latents))
    rate = {f"pictures/s in batches of {batch}": lambda seconds: batch / seconds}
    Case("decode", {"decode": decode}, rounds=15, warm_up_rounds=3, figures=rate).run()
