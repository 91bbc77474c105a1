"""Stage 3 against the loop of diffusers' train_text_to_image.py, plain and with caches; its MFU; where a step goes."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sd_mini.cpu import stock_copy
from sd_mini.cpu.threads import one_thread
from sd_mini.data.batches import iterate, shifted_grid
from sd_mini.data.parts import load_captioned
from sd_mini.errors import UserError
from sd_mini.processes import process_device
from sd_mini.text_encoder.adapter import TextStage
from sd_mini.timing import Case, Spread
from training.benchmarks.loops import Rows, decoded_pictures, logged_updates, open_loop, plain_loop, processes
from training.distributed.processes import chosen_precision, join_processes
from training.engine import launch
from training.engine.flops import count_flops, measured_peak
from training.engine.launch import Launch
from training.engine.loop import Loop
from training.noise_predictor import task as noise_predictor
from training.noise_predictor.losses import PredictorObjective

BLOCK, ROUNDS, WARM_UP = 10, 9, 5  # updates a turn, rounds of turns, updates before the first


def parsed(argv: Sequence[str]) -> Launch:
    launched = launch.parse(noise_predictor.PredictorConfig, "noise_predictor", argv)
    if launched is None:
        raise UserError("expected --config FILE --run RUN, a run whose stages 1 and 2 are trained")
    return launched


def training_speed(argv: Sequence[str]) -> dict[str, Any]:
    """Samples a second of this loop, of the reference as it is, and of the reference over caches.

    All three train the same network from the same start, on the same batch size, in the same dtype, with all cores.
    """
    loops = {"this loop": our_loop, "reference": reference, "reference with caches": cached_reference}
    samples = BLOCK * parsed(argv).config.train.batch_size
    with processes({name: partial(loop, argv) for name, loop in loops.items()}, BLOCK, WARM_UP) as (contestants, _):
        rate = {"samples/s": lambda seconds: samples / seconds}
        turns = Case("training", contestants, ROUNDS, figures=rate).run()
    return {
        "samples_per_second": turns.figure("this loop", rate["samples/s"]).record(),
        "ratio_to_reference": turns.ratio("reference", "this loop").record(),
        "ratio_to_cached": turns.ratio("reference with caches", "this loop").record(),
    }


def our_loop(argv: Sequence[str]) -> Iterator[None]:
    with single_pass_loop(argv) as loop:
        yield
        yield from logged_updates(loop)


@contextmanager
def single_pass_loop(argv: Sequence[str]) -> Generator[Loop]:
    """Our loop at its start. Raises UserError for accumulated passes."""
    launched = parsed(argv)
    if (passes := launched.config.train.accumulation) > 1:
        raise UserError(f"train.accumulation {passes}: expected 1, as an update is measured in one pass")
    with open_loop(launched, noise_predictor.main.make_task) as loop:
        yield loop


def reference(argv: Sequence[str]) -> Iterator[float]:
    """As the script has it: both encoders run at every step, on pictures and captions."""
    yield from _plain_loop(argv, _encoded_each_step)


def cached_reference(argv: Sequence[str]) -> Iterator[float]:
    """Over cached latents and embeddings, row by row."""
    yield from _plain_loop(argv, _cached)


Source = tuple[Rows, Callable[[Any], dict[str, Tensor]]]
"""(rows of the DataLoader, their batch => inputs of the network)"""


def _plain_loop(
    argv: Sequence[str], source: Callable[[noise_predictor.PredictorTask, torch.device], Source]
) -> Iterator[float]:
    launched = parsed(argv)
    config, train = launched.config, launched.config.train
    join_processes()
    accelerator = Accelerator(mixed_precision=chosen_precision(train.mixed_precision, process_device()) or "no")
    task = noise_predictor.PredictorTask(config, launched.run)
    trained: Any = task.players["noise_predictor"].objective
    network = stock_copy(trained.network)
    objective = PredictorObjective(network, config.objective)
    rows, encode = source(task, accelerator.device)

    def loss_of(batch: Any) -> Tensor:
        inputs = encode(batch)
        noise = torch.randn_like(inputs["latents"])
        timesteps = config.objective.draw(shifted_grid(len(noise), random.random())).to(noise.device)
        with accelerator.autocast():
            losses, _ = objective(**inputs, noise=noise, timesteps=timesteps)
        return losses.float().mean()

    yield 0.0
    yield from plain_loop(accelerator, network, rows, train, loss_of)


def _encoded_each_step(task: noise_predictor.PredictorTask, device: torch.device) -> Source:
    pictures, _ = load_captioned(task.config.data, task.config.valid)
    decode = decoded_pictures(pictures.pictures, task.config.data.resolution)
    autoencoder, text = task.vae.parts["autoencoder"].to(device), TextStage.from_parts(task.text.parts)
    for model in text.models:
        model.to(device)

    @torch.no_grad()
    def encode(batch: tuple[Tensor, Sequence[str]]) -> dict[str, Tensor]:
        pixels, captions = batch
        encoded = text.encode(list(captions), warn=False)
        latents = autoencoder.encode(pixels)
        return {"latents": latents, "prompt_embeds": encoded.tokens, "prompt_mask": encoded.mask}

    return Rows(len(pictures.pictures), lambda number: (decode(number), pictures.captions[number][0])), encode


def _cached(task: noise_predictor.PredictorTask, device: torch.device) -> Source:
    def row(number: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in task.train.take(torch.tensor([number]).numpy(), [0.0]).items()}

    return Rows(len(task.train), row), lambda batch: batch


def utilisation(argv: Sequence[str], rounds: int = 30) -> dict[str, Any]:
    """MFU of forward and backward alone, and of whole updates, their batch included: the counted FLOPs over the peak
    that is measured beside each, in the dtype of the products. In bfloat16 on a CPU also over float32's."""
    with single_pass_loop(argv) as loop:
        (learner,), accelerator = loop.learners, loop.accelerator
        tensors = loop.on_device(loop.steps[0].passes[0])
        flops = count_flops(learner.shown, learner.trained, tensors)
        steps = iterate(loop.steps, 0, rounds + WARM_UP, loop.config.workers)

        def forward_backward() -> None:
            with accelerator.autocast():
                losses, _ = learner.objective(**tensors)
                accelerator.backward(losses.mean())

        def peak_of(dtype: torch.dtype) -> float:
            measured_peak.cache_clear()  # as the machine's pace swings
            return measured_peak(accelerator.device, dtype)

        is_half = accelerator.mixed_precision == "bf16"
        peaks = {"": partial(peak_of, torch.bfloat16 if is_half else torch.float32)}
        if is_half and accelerator.device.type == "cpu":
            peaks["_over_float32"] = partial(peak_of, torch.float32)
        parts = {"forward_backward": forward_backward, "step": lambda: loop.update(next(steps))}
        case = Case("mfu", peaks | parts, rounds, WARM_UP, {}, prepare=learner.raw_optimizer.zero_grad)
        turns = case.run()
    found = {}
    for over in peaks:
        for part in parts:
            pairs = zip(turns.seconds[part], turns.results[over], strict=True)
            found[part + over] = Spread.of([flops / seconds / peak for seconds, peak in pairs])
    print(f"{flops / 1e9:.3g} GFLOP an update; peak {turns.results[''][-1] / 1e9:.0f} GFLOP/s")
    for name, spread in found.items():
        print(f"{name:>29}: MFU {100 * spread.median:.1f} % [{100 * spread.low:.1f}, {100 * spread.high:.1f}]")
    return {name: spread.record() for name, spread in found.items()}


def profiled(argv: Sequence[str], updates: int = 10) -> list[dict[str, Any]]:
    """Where the time of an update goes, by operation: ms an update, share, calls. On one thread, as torch.profiler
    does not see the work of others."""
    with single_pass_loop(argv) as loop, one_thread():
        steps = iterate(loop.steps, 0, WARM_UP + updates, loop.config.workers)
        for _ in range(WARM_UP):
            loop.update(next(steps))
        on_gpu = loop.accelerator.device.type == "cuda"
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
        with profile(activities=activities) as profiler:
            for _ in range(updates):
                loop.update(next(steps))
    attribute = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    times = [(getattr(event, attribute), event.count, event.key) for event in profiler.key_averages()]
    total = sum(time for time, _, _ in times) or 1
    rows = [
        {
            "operation": key,
            "ms": round(time / updates / 1000, 3),
            "share": round(time / total, 4),
            "calls": calls / updates,
        }
        for time, calls, key in sorted(times, reverse=True)[:20]
    ]
    print(f"{'operation':<48} {'ms':>8} {'share':>7} {'calls':>6}")
    for row in rows:
        print(f"{row['operation'][:48]:<48} {row['ms']:8.2f} {100 * row['share']:6.1f} % {row['calls']:6.1f}")
    return rows
