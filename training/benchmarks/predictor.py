"""Stage 3 against the loop of diffusers' train_text_to_image.py, plain and with caches; its MFU; where a step goes."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset

from sd_mini import images
from sd_mini.cpu import stock_copy
from sd_mini.cpu.threads import one_thread
from sd_mini.data.captioned import load_captioned
from sd_mini.errors import UserError
from training.benchmarks.interleaved import Spread, measure, ratios
from training.distributed.processes import chosen_precision, join_processes
from training.engine import launch
from training.engine.batches import iterate, shifted_grid
from training.engine.flops import count_flops, measured_peak
from training.engine.launch import Launch
from training.engine.loop import Loop
from training.engine.task import Origin
from training.noise_predictor import task as noise_predictor
from training.noise_predictor.data import text_stage
from training.noise_predictor.losses import PredictorObjective
from training.noise_predictor.task import Encoded

BLOCK, ROUNDS, WARM_UP = 10, 9, 5  # updates, blocks of each loop, updates before the first


def parsed(argv: Sequence[str]) -> Launch:
    launched = launch.parse(noise_predictor.PredictorConfig, "noise_predictor", argv)
    if launched is None:
        raise UserError("expected --config FILE --run RUN, a run whose stages 1 and 2 are trained")
    return launched


def training_speed(argv: Sequence[str]) -> dict[str, Any]:
    """Samples a second of this loop, of the reference as it is, and of the reference over caches; block by block.

    All three train the same network from the same start, on the same batch size, in the same dtype, with all cores.
    """
    loops = {"this loop": this_loop, "reference": reference, "reference with caches": cached_reference}
    _, seconds = measure(loops, argv, BLOCK, ROUNDS, WARM_UP)
    count = BLOCK * parsed(argv).config.train.batch_size
    rates = {name: Spread.of([count / s for s in values]) for name, values in seconds.items()}
    against = {name: ratios(seconds[name], seconds["this loop"]) for name in loops}
    for name in loops:
        print(f"{name:>22}: {rates[name]} samples/s; this loop is {against[name]} times as fast")
    return {
        "samples_per_second": rates["this loop"].record(),
        "ratio_to_reference": against["reference"].record(),
        "ratio_to_cached": against["reference with caches"].record(),
    }


def utilisation(argv: Sequence[str], rounds: int = 30) -> dict[str, Any]:
    """MFU of forward and backward alone, and of whole updates, their batch included: the counted FLOPs over the peak
    that is measured beside each, in the dtype of the products. In bfloat16 on a CPU also over float32's."""
    parts: dict[str, list[float]] = {"forward_backward": [], "step": []}
    with prepared(argv) as loop:
        (learner,) = loop.learners
        tensors = loop.on_device(loop.steps[0].passes[0])
        flops = count_flops(learner.shown, learner.trained, tensors)
        dtype = torch.bfloat16 if loop.accelerator.mixed_precision == "bf16" else torch.float32
        beyond = dtype == torch.bfloat16 and loop.accelerator.device.type == "cpu"
        if beyond:
            parts |= {f"{name}_over_float32": [] for name in list(parts)}
        steps = iterate(loop.steps, 0, rounds + WARM_UP, loop.config.workers)
        for number in range(rounds + WARM_UP):
            measured_peak.cache_clear()  # as the machine's pace swings
            peaks = {"": measured_peak(loop.accelerator.device, dtype)}
            if beyond:
                peaks["_over_float32"] = measured_peak(loop.accelerator.device, torch.float32)
            start = _now(loop)
            with loop.accelerator.autocast():
                losses, _ = learner.objective(**tensors)
                loop.accelerator.backward(losses.mean())
            middle = _now(loop)
            learner.raw_optimizer.zero_grad()
            before = _now(loop)
            loop.update(next(steps))
            after = _now(loop)
            for over, peak in peaks.items() if number >= WARM_UP else ():
                parts[f"forward_backward{over}"].append(flops / (middle - start) / peak)
                parts[f"step{over}"].append(flops / (after - before) / peak)
    found = {name: Spread.of(values) for name, values in parts.items()}
    print(f"{flops / 1e9:.3g} GFLOP an update; peak {peaks[''] / 1e9:.0f} GFLOP/s")
    for name, spread in found.items():
        print(f"{name:>29}: MFU {100 * spread.median:.1f} % [{100 * spread.low:.1f}, {100 * spread.high:.1f}]")
    return {name: spread.record() for name, spread in found.items()}


def profiled(argv: Sequence[str], updates: int = 10) -> list[dict[str, Any]]:
    """Where the time of an update goes, by operation: ms an update, share, calls. The work that is shared out over
    threads is seen where there is one: torch.profiler does not look into others."""
    with prepared(argv) as loop, one_thread():
        steps = iterate(loop.steps, 0, WARM_UP + updates, loop.config.workers)
        for _ in range(WARM_UP):
            loop.update(next(steps))
        on_gpu = loop.accelerator.device.type == "cuda"
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
        with profile(activities=activities) as seen:
            for _ in range(updates):
                loop.update(next(steps))
    attribute = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(seen.key_averages(), key=lambda event: -getattr(event, attribute))
    total = sum(getattr(event, attribute) for event in events) or 1
    rows = [
        {
            "operation": event.key,
            "ms": round(getattr(event, attribute) / updates / 1000, 3),
            "share": round(getattr(event, attribute) / total, 4),
            "calls": event.count / updates,
        }
        for event in events[:20]
    ]
    print(f"{'operation':<48} {'ms':>8} {'share':>7} {'calls':>6}")
    for row in rows:
        print(f"{row['operation'][:48]:<48} {row['ms']:8.2f} {100 * row['share']:6.1f} % {row['calls']:6.1f}")
    return rows


@contextmanager
def prepared(argv: Sequence[str]) -> Iterator[Loop]:
    """A loop at its start; nothing is written to the run but caches. Raises ValueError for accumulated passes."""
    launched = parsed(argv)
    join_processes()
    task = noise_predictor.PredictorTask(launched.config, launched.run)
    config = launched.config.train.model_copy(update={"ema_snapshots": 0, "log_every": 10**9})
    if config.accumulation > 1:
        raise UserError(f"train.accumulation {config.accumulation}: expected 1, as an update is measured in one pass")
    with tempfile.TemporaryDirectory() as home:
        loop = Loop(task, config, Path(home) / "noise_predictor", Origin(time.perf_counter(), {}), [])
        loop.folder.mkdir()
        loop.watch.start({}, 0)
        yield loop


def this_loop(argv: Sequence[str]) -> Iterator[float]:
    log_every = parsed(argv).config.train.log_every
    with prepared(argv) as loop:
        yield 0.0
        for inputs in iterate(loop.steps, 0, 10**6, loop.config.workers):
            loop.update(inputs)
            if loop.step % log_every == 0:
                loop.log()
            yield 0.0


def reference(argv: Sequence[str]) -> Iterator[float]:
    yield from _plain_loop(argv, cached=False)


def cached_reference(argv: Sequence[str]) -> Iterator[float]:
    yield from _plain_loop(argv, cached=True)


def _plain_loop(argv: Sequence[str], cached: bool) -> Iterator[float]:
    """As diffusers' examples/text_to_image/train_text_to_image.py has it: a DataLoader of pictures and captions, both
    encoded at every step, AdamW, clip, its scheduler, its EMA at every step, the gathered loss by `.item()`, twice."""
    launched = parsed(argv)
    config, train = launched.config, launched.config.train
    accelerator = Accelerator(mixed_precision=chosen_precision(train.mixed_precision, join_processes().device) or "no")
    task = noise_predictor.PredictorTask(config, launched.run)
    network = stock_copy(task.players["noise_predictor"].objective.network)
    rows: Dataset = _Cached(task) if cached else _Pictures(config)
    optimizer = torch.optim.AdamW(network.parameters(), lr=train.lr, betas=train.betas, weight_decay=train.weight_decay)
    schedule = get_scheduler(train.schedule, optimizer, num_warmup_steps=train.warmup_steps, num_training_steps=10**6)
    loader = DataLoader(rows, train.batch_size, shuffle=True, drop_last=True, collate_fn=rows.collate)
    ema = EMAModel(network.parameters(), decay=0.9999)
    network, optimizer, loader, schedule = accelerator.prepare(network, optimizer, loader, schedule)
    ema.to(accelerator.device)
    objective = PredictorObjective(network, config.objective)
    encode = (lambda batch: batch) if cached else _Encoders(task, accelerator.device)
    train_loss = 0.0
    yield 0.0
    while True:
        for batch in loader:
            given = encode(batch)
            noise = torch.randn_like(given["latents"])
            count = len(noise)
            timesteps = config.objective.draw(shifted_grid(count, random.random())).to(noise.device)
            with accelerator.autocast():
                losses, _ = objective(**given, noise=noise, timesteps=timesteps)
            loss = losses.float().mean()
            train_loss += accelerator.gather(loss.repeat(count)).mean().item()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(network.parameters(), train.clip_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            ema.step(network.parameters())
            yield loss.detach().item()


class _Pictures(Dataset):
    """PIL pictures through torchvision's transforms, and a caption of each."""

    def __init__(self, config: noise_predictor.PredictorConfig):
        from torchvision import transforms  # seconds

        pictures, _ = load_captioned(config.data, config.valid)
        side = config.data.resolution
        steps = [transforms.Resize(side), transforms.CenterCrop(side), transforms.ToTensor()]
        self.prepare = transforms.Compose([*steps, transforms.Normalize([0.5], [0.5])])
        self.pictures, self.captions = images.to_pil(pictures.pictures), pictures.captions

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, number: int) -> tuple[Tensor, str]:
        return self.prepare(self.pictures[number].convert("RGB")), self.captions[number][0]

    @staticmethod
    def collate(rows: list[tuple[Tensor, str]]) -> dict[str, Any]:
        return {"pixels": torch.stack([pixels for pixels, _ in rows]), "captions": [text for _, text in rows]}


class _Cached(Dataset):
    """Latents and embeddings as they are cached, row by row."""

    def __init__(self, task: noise_predictor.PredictorTask):
        self.rows: Encoded = task.train

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.rows.take(torch.tensor([number]).numpy(), [0.0]).items()}

    @staticmethod
    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return torch.utils.data.default_collate(rows)


class _Encoders:
    """Pixels and captions => what the network is given, encoded anew at every step."""

    def __init__(self, task: noise_predictor.PredictorTask, device: torch.device):
        self.autoencoder = task.vae.parts["autoencoder"].to(device)
        self.text = text_stage(task.text, device)

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        encoded = self.text.encode(batch["captions"], warn=False)
        latents = self.autoencoder.encode(batch["pixels"])
        return {"latents": latents, "prompt_embeds": encoded.tokens, "prompt_mask": encoded.mask}


def _now(loop: Loop) -> float:
    if loop.accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
