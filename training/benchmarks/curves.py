"""How far autoencoders get in the same time, trained slice by slice in turn, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from sd_mini.cli.main import Parser, whole_number
from training.autoencoder import task as autoencoder
from training.benchmarks.interleaved import received
from training.distributed.processes import join_processes
from training.engine import launch
from training.engine.batches import iterate
from training.engine.loop import Loop
from training.engine.task import Origin


def curves(argv: Sequence[str]) -> None:
    """Print the held-out PSNR of each config's training by the seconds it was trained for, and draw it.

    A training ends with its own `train.steps`; its last line holds its schedule's end, where most is gained.
    """
    options, overrides = _parser().parse_known_args(argv)
    context = multiprocessing.get_context("spawn")
    pipes, children = [], []
    for config in options.configs:
        own = ["--config", config, "--run", "unused", *overrides]
        launch.parse(autoencoder.AutoencoderConfig, "autoencoder", own)  # a mistake is one line, here
        pipe, other = context.Pipe()
        pipes.append(pipe)
        children.append(context.Process(target=_train, args=(own, other), daemon=True))
        children[-1].start()
    names = [f"{config} ({received(pipe):,} parameters)" for config, pipe in zip(options.configs, pipes, strict=True)]
    found: list[list[tuple[float, int, float]]] = [[] for _ in pipes]
    for _ in tqdm(range(options.slices), desc="slices"):
        for pipe, points in zip(pipes, found, strict=True):
            pipe.send(options.seconds / options.slices)
            point = pipe.recv()
            if not points or point[1] > points[-1][1]:  # else it had come to its end before
                points.append(point)
    for pipe in pipes:
        pipe.send(0)
    for name, points in zip(names, found, strict=True):
        print(name)
        for seconds, step, psnr in points:
            print(f"  {seconds:6.1f} s {step:7,} updates {psnr:6.2f} dB")
    if options.out is not None:
        _draw(options.out, names, found)


def _train(argv: Sequence[str], pipe: Connection) -> None:
    """Send the number of parameters; given so many seconds, train for them and send (seconds, updates, dB); 0 ends."""
    launched = launch.parse(autoencoder.AutoencoderConfig, "autoencoder", argv)
    join_processes()
    try:
        task = autoencoder.AutoencoderTask(launched.config)
    except ValueError as error:
        pipe.send(error)
        return
    with tempfile.TemporaryDirectory() as folder:
        config = launched.config.train.model_copy(update={"ema_snapshots": 0})
        loop = Loop(task, config, Path(folder) / "autoencoder", Origin(time.perf_counter(), {}), [])
        loop.folder.mkdir()
        loop.watch.start({}, 0)
        loop.watch.bar.disable = True
        updates = iterate(loop.steps, 0, config.steps, config.workers)
        pipe.send(sum(p.numel() for p in task.players["autoencoder"].objective.parameters()))
        spent, owed = 0.0, 0.0
        while given := pipe.recv():
            owed += given
            while spent < owed and loop.step < config.steps:
                start = time.perf_counter()
                loop.update(next(updates))
                spent += time.perf_counter() - start
            with loop.inspection.weights(loop.step) as shown:
                psnr = float(np.mean(task.validate(shown, slice(0, task.valid_count))["psnr"]))
            pipe.send((spent, loop.step, psnr))


def _draw(path: Path, names: Sequence[str], found: Sequence[Sequence[tuple[float, int, float]]]) -> None:
    from matplotlib.figure import Figure  # a second

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, points in zip(names, found, strict=True):
        axes.plot([seconds for seconds, _, _ in points], [psnr for _, _, psnr in points], marker=".", label=name)
    axes.set(xlabel="seconds of training", ylabel="dB PSNR, held out")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m training.benchmarks curves",
        description="Autoencoders trained side by side for the same time. --any.field value changes all of them.",
    )
    parser.add_argument("configs", metavar="CONFIG", nargs="+", help="of stage 2")
    parser.add_argument("--seconds", type=whole_number(1), default=60, help="of training, each (%(default)s)")
    parser.add_argument("--slices", type=whole_number(1), default=6, help="points on each curve (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="PNG", help="a plot of the curves")
    return parser
