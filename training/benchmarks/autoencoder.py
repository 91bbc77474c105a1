"""Stage 2 against the loop of diffusers' train_autoencoderkl.py written out plainly: same module, batch and losses."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.utils.data import DataLoader

from sd_mini import images
from sd_mini.errors import UserError
from training.autoencoder import task as autoencoder
from training.autoencoder.losses import OF_ERROR, kl_term
from training.benchmarks.interleaved import Spread, measure, ratios
from training.distributed.processes import join_processes
from training.engine import launch
from training.engine.batches import Batch, batch_ids, iterate
from training.engine.loop import Loop
from training.engine.task import Origin

BLOCK, ROUNDS, WARM_UP = 80, 7, 20  # updates, blocks of each loop, updates before the first
_PLAIN = (*OF_ERROR, "kl", "latent_noise")


def autoencoder_cost(argv: Sequence[str]) -> None:
    """Pictures a second of both loops, block by block in turn, each in a process of its own; their ratio.

    The reference is as the script has it: PIL pictures through torchvision's transforms and a DataLoader, AdamW, clip,
    its scheduler, its EMA at every step, two `.item()` a step. It has all cores, and once more one thread, which is all
    that `accelerate launch` leaves a script on a CPU.
    Raises ValueError for a config with terms that the reference would need networks for.
    """
    launched = launch.parse(autoencoder.AutoencoderConfig, "autoencoder", argv)
    if launched is None:
        return
    more = sorted(set(launched.config.loss.begun(10**9)) - {*_PLAIN, "commitment", "distillation"})
    if more:
        raise UserError(f"loss {', '.join(more)}: the plain loop has none of that; expected {', '.join(_PLAIN)} alone")
    loops = {"reference": _reference, "one thread": _as_launched, "this loop": _ours}
    first, seconds = measure(loops, argv, BLOCK, ROUNDS, WARM_UP)
    count = BLOCK * launched.config.train.batch_size
    for name, values in seconds.items():
        rates = Spread.of([count / s for s in values])
        print(f"{name:>10} {rates} pictures/s, ratio {ratios(values, seconds['this loop'])}")
    print("loss of the first batch: " + ", ".join(f"{name} {loss:.6f}" for name, loss in first.items()))


def _ours(argv: Sequence[str]) -> Iterator[float]:
    launched = launch.parse(autoencoder.AutoencoderConfig, "autoencoder", argv)
    join_processes()
    task = autoencoder.AutoencoderTask(launched.config)
    with tempfile.TemporaryDirectory() as folder:
        config = launched.config.train.model_copy(update={"ema_snapshots": 0})
        loop = Loop(task, config, Path(folder) / "autoencoder", Origin(time.perf_counter(), {}), [])
        loop.folder.mkdir()
        loop.watch.start({}, 0)
        with torch.no_grad():
            yield loop.learners[0].module(**loop.steps[0].passes[0])[0].mean().item()
        for inputs in iterate(loop.steps, 0, 10**6, config.workers):
            loop.update(inputs)
            if loop.step % config.log_every == 0:
                loop.log()
            yield 0.0


def _reference(argv: Sequence[str]) -> Iterator[float]:
    launched = launch.parse(autoencoder.AutoencoderConfig, "autoencoder", argv)
    from torchvision import transforms  # seconds

    config, train = launched.config, launched.config.train
    accelerator = Accelerator(mixed_precision="no", cpu=True)
    task = autoencoder.AutoencoderTask(config)
    module = task.players["autoencoder"].objective.autoencoder.to(memory_format=torch.contiguous_format)
    weights = {name: term.weight for name, term in config.loss.begun(0).items()}
    optimizer = torch.optim.AdamW(module.parameters(), lr=train.lr, betas=train.betas, weight_decay=train.weight_decay)
    schedule = get_scheduler(train.schedule, optimizer, num_warmup_steps=train.warmup_steps, num_training_steps=10**6)
    ema = EMAModel(module.parameters()) if train.ema_width is not None else None
    side = config.data.resolution
    steps = [transforms.Resize(side), transforms.CenterCrop(side), transforms.ToTensor()]
    prepare = transforms.Compose([*steps, transforms.Normalize([0.5], [0.5])])
    pictures = images.to_pil(task.train.pictures)
    with torch.no_grad():
        ids = batch_ids(train.seed, 0, task.count, train.batch_size)
        given = task.inputs(Batch(train.seed, 0, ids, slice(0, train.batch_size)))
        yield _plain_loss(module, given["pixels"], given["noise"], given["posterior_noise"], weights)[0].item()
    loader = DataLoader(_Pictures(pictures, prepare), train.batch_size, shuffle=True, drop_last=True)
    module, optimizer, loader, schedule = accelerator.prepare(module, optimizer, loader, schedule)
    while True:
        for pixels in loader:
            pixels = pixels.contiguous(memory_format=torch.contiguous_format).float()
            noise = (torch.randn(len(pixels), *task.latent_shape) for _ in range(2))
            loss, reconstruction = _plain_loss(accelerator.unwrap_model(module), pixels, *noise, weights)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(module.parameters(), train.clip_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if ema is not None:
                ema.step(module.parameters())
            logs = {"loss": loss.detach().mean().item(), "rec": reconstruction.detach().mean().item()}
            yield logs["loss"]


def _as_launched(argv: Sequence[str]) -> Iterator[float]:
    torch.set_num_threads(1)
    yield from _reference(argv)


class _Pictures(torch.utils.data.Dataset):
    def __init__(self, pictures: list, prepare: Callable):
        self.pictures, self.prepare = pictures, prepare

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, number: int) -> Tensor:
        return self.prepare(self.pictures[number].convert("RGB"))


def _plain_loss(module, pixels: Tensor, noise: Tensor, more_noise: Tensor, weights: dict[str, float]):
    raw, log_variance = module.raw_latents(pixels)
    noised = raw + weights.get("latent_noise", 0.0) * noise
    if log_variance is not None:
        noised = noised + (0.5 * log_variance).exp() * more_noise
    error = module.decode_raw(noised) - pixels
    reconstruction = sum(weights[name] * of(error).mean() for name, of in OF_ERROR.items() if name in weights)
    return reconstruction + weights.get("kl", 0.0) * kl_term(raw, log_variance).mean(), reconstruction
