"""Autoencoders: stage 2 against the plain loop of diffusers' train_autoencoderkl.py, and configs against each other."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from sd_mini.cli.arguments import Parser, whole_number
from sd_mini.data.batches import Batch, iterate, order_of
from sd_mini.errors import UserError
from sd_mini.timing import Case
from training.autoencoder import task as autoencoder
from training.autoencoder.losses import OF_ERROR, kl_term
from training.benchmarks.loops import Rows, decoded_pictures, logged_updates, open_loop, plain_loop, processes
from training.engine import launch

BLOCK, ROUNDS, WARM_UP = 80, 7, 20  # updates a turn, rounds of turns, updates before the first
_PLAIN = (*OF_ERROR, "kl", "latent_noise")

Point = tuple[float, int, float]
"""(seconds of training, updates, held-out PSNR in dB)"""


def training_speed(argv: Sequence[str]) -> None:
    """Pictures a second of both loops, with the same module, batch and losses, and the loss of the first batch.

    The reference is measured with all cores, and with one thread, which is all that `accelerate launch` leaves a script
    on a CPU. Raises UserError for a config with terms that the reference would need networks for.
    """
    launched = parsed(argv)
    if launched is None:
        return
    others = sorted(set(launched.config.loss.begun(10**9)) - {*_PLAIN, "commitment", "distillation"})
    if others:
        raise UserError(f"loss {', '.join(others)}: the plain loop has no such term; expected {', '.join(_PLAIN)} only")
    loops = {"this loop": our_loop, "reference": reference, "one thread": partial(reference, threads=1)}
    pictures = BLOCK * launched.config.train.batch_size
    with processes({name: partial(loop, argv) for name, loop in loops.items()}, BLOCK, WARM_UP) as (contestants, first):
        Case("autoencoder", contestants, ROUNDS, figures={"pictures/s": lambda seconds: pictures / seconds}).run()
    print("loss of the first batch: " + ", ".join(f"{name} {loss:.6f}" for name, loss in first.items()))


def parsed(argv: Sequence[str]) -> launch.Launch[autoencoder.AutoencoderConfig]:
    launched = launch.parse(autoencoder.AutoencoderConfig, "autoencoder", argv)
    if launched is None:  # --help was asked for
        raise SystemExit(0)
    return launched


def our_loop(argv: Sequence[str]) -> Iterator[float | None]:
    launched = parsed(argv)
    with open_loop(launched, autoencoder.main.make_task) as loop:
        with torch.no_grad():
            yield loop.learners[0].module(**loop.steps[0].passes[0])[0].mean().item()
        yield from logged_updates(loop)


def reference(argv: Sequence[str], threads: int | None = None) -> Iterator[float]:
    if threads is not None:
        torch.set_num_threads(threads)
    config = parsed(argv).config
    train = config.train
    accelerator = Accelerator(mixed_precision="no", cpu=True)
    task = autoencoder.AutoencoderTask(config)
    module: Any = task.players["autoencoder"].objective.autoencoder.to(memory_format=torch.contiguous_format)
    weights = {name: term.weight for name, term in config.loss.begun(0).items()}
    with torch.no_grad():
        ids = order_of(train.seed, task.bucket_counts, train.batch_size, task.weights).ids(0)
        inputs = task.inputs(Batch(train.seed, 0, ids, slice(0, train.batch_size)))
        yield _plain_loss(module, inputs["pixels"], inputs["noise"], inputs["posterior_noise"], weights).item()

    def loss_of(pixels: Tensor) -> Tensor:
        pixels = pixels.contiguous(memory_format=torch.contiguous_format).float()
        noise = (torch.randn(len(pixels), *task.latent_shape) for _ in range(2))
        return _plain_loss(module, pixels, *noise, weights)

    rows = Rows(task.count, decoded_pictures(task.train.pictures, config.data.resolution))
    yield from plain_loop(accelerator, module, rows, train, loss_of)


def _plain_loss(
    module: Any, pixels: Tensor, noise: Tensor, posterior_noise: Tensor, weights: dict[str, float]
) -> Tensor:
    mean, log_variance = module.raw_latents(pixels)
    latents = mean + weights.get("latent_noise", 0.0) * noise
    if log_variance is not None:  # a sample of the posterior
        latents = latents + (log_variance / 2).exp() * posterior_noise
    error = module.decode_raw(latents) - pixels
    reconstruction = sum(weights[name] * of(error).mean() for name, of in OF_ERROR.items() if name in weights)
    return reconstruction + weights.get("kl", 0.0) * kl_term(mean, log_variance).mean()


def curves(argv: Sequence[str]) -> None:
    """Print the held-out PSNR of each config's training by the seconds it was trained for, and draw it.

    A training ends with its own `train.steps`; its last line holds its schedule's end, where most is gained.
    """
    options, overrides = _curves_parser().parse_known_args(argv)
    words = {str(i): ["--config", config, "--run", "unused", *overrides] for i, config in enumerate(options.configs)}
    seconds = options.seconds / options.slices
    with processes({key: partial(_curve, own, seconds) for key, own in words.items()}) as (contestants, parameters):
        points: dict[str, list[Point]] = Case("curves", contestants, options.slices, figures={}).run().results
    names = [f"{c} ({n:,} parameters)" for c, n in zip(options.configs, parameters.values(), strict=True)]
    # a training that came to its end returns its last point again
    named = {f"{i}": (name, list(dict.fromkeys(points[f"{i}"]))) for i, name in enumerate(names)}
    for name, curve in named.values():
        print(name)
        for spent, step, psnr in curve:
            print(f"  {spent:6.1f} s {step:7,} updates {psnr:6.2f} dB")
    if options.out is not None:
        _draw(options.out, list(named.values()))


def _curve(argv: Sequence[str], seconds: float) -> Iterator[int | Point]:
    """The number of parameters, then a point after each further `seconds` of training, validation not counted."""
    launched = parsed(argv)
    with open_loop(launched, autoencoder.main.make_task) as loop:
        loop.watch.bar.disable = True
        task, updates = loop.task, iterate(loop.steps, 0, loop.config.steps, loop.config.workers)
        yield sum(p.numel() for p in task.players["autoencoder"].objective.parameters())
        spent = 0.0
        for turn in count(1):
            while spent < turn * seconds and loop.step < loop.config.steps:
                start = time.perf_counter()
                loop.update(next(updates))
                spent += time.perf_counter() - start
            with loop.inspection.weights(loop.step) as objective:
                psnr = float(np.mean(task.validate(objective, slice(0, task.valid_count))["psnr"]))
            yield spent, loop.step, psnr


def _draw(path: Path, named: Sequence[tuple[str, Sequence[Point]]]) -> None:
    from matplotlib.figure import Figure  # a second

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, curve in named:
        axes.plot([spent for spent, _, _ in curve], [psnr for _, _, psnr in curve], marker=".", label=name)
    axes.set(xlabel="seconds of training", ylabel="dB PSNR, held out")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _curves_parser() -> Parser:
    parser = Parser(
        prog="python -m training.benchmarks curves",
        description="Autoencoders trained side by side for the same time. --any.field value changes all of them.",
    )
    parser.add_argument("configs", metavar="CONFIG", nargs="+", help="of stage 2")
    parser.add_argument("--seconds", type=whole_number(1), default=60, help="of training, each (%(default)s)")
    parser.add_argument("--slices", type=whole_number(1), default=6, help="points on each curve (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="PNG", help="a plot of the curves")
    return parser
