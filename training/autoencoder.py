"""Stage 2: the autoencoder. Pictures only: the decoder needs no captions.

accelerate launch -m training.autoencoder --config training/configs/shapes/autoencoder.yaml --run runs/shapes
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from sd_mini import images, stages
from sd_mini.autoencoder import Autoencoder
from sd_mini.config import Config, command
from sd_mini.data import DataConfig, check_alike, load
from training import launch
from training.augment import AugmentConfig, augment
from training.batches import Batch, generator
from training.players import Player
from training.task import TrainConfig


class ModelConfig(Config):
    kind: Literal["dc", "kl"] = "dc"
    """dc: AutoencoderDC (the fewest FLOPs); kl: AutoencoderKL"""
    patch_size: int = Field(1, ge=1)
    """pixels a side that are folded into channels before the network (space-to-depth) and unfolded behind it"""
    network: dict[str, Any] = Field(default_factory=dict)
    """fields of that diffusers class"""


class LossConfig(Config):
    """Weights of the terms; 0 leaves a term out."""

    l1: float = Field(1.0, ge=0)
    l2: float = Field(0.0, ge=0)
    gradient: float = Field(0.0, ge=0)
    """L1 of the differences between neighbouring pixels: edges, without a network's weights"""
    kl: float = Field(1e-4, ge=0)
    """pull of the latents towards N(0, I)"""
    latent_noise: float = Field(0.0, ge=0)
    """standard deviation of noise on the latents while training: neighbours in latent space decode alike"""


class AutoencoderConfig(Config):
    data: DataConfig = DataConfig()
    """pictures to train on"""
    valid: DataConfig = DataConfig(split="test", count=256)
    """pictures to measure on"""
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    statistics_count: int = Field(4096, ge=1)
    """training pictures over which the latents' mean and std are measured"""


class Objective(nn.Module):
    """pixels => the weighted sum of the terms, one a picture."""

    def __init__(self, autoencoder: Autoencoder, weights: LossConfig):
        super().__init__()
        self.autoencoder, self.weights = autoencoder, weights

    def forward(self, pixels: Tensor, noise: Tensor, posterior_noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        raw, log_variance = self.autoencoder.raw_latents(pixels)
        noised = raw + self.weights.latent_noise * noise
        if log_variance is not None:
            noised = noised + (0.5 * log_variance).exp() * posterior_noise
        decoded = self.autoencoder.decode_raw(noised)
        terms = reconstruction_terms(decoded, pixels) | {"kl": kl_term(raw, log_variance)}
        total = sum(getattr(self.weights, name) * term for name, term in terms.items())
        return total, {name: term.mean() for name, term in terms.items()}


def reconstruction_terms(decoded: Tensor, pixels: Tensor) -> dict[str, Tensor]:
    """decoded, pixels (B, 3, H, W) => each term as (B,)."""
    error = decoded - pixels
    across, down = error.diff(dim=-1), error.diff(dim=-2)
    return {
        "l1": error.abs().mean((1, 2, 3)),
        "l2": error.square().mean((1, 2, 3)),
        "gradient": across.abs().mean((1, 2, 3)) + down.abs().mean((1, 2, 3)),
    }


# KL(N(m, s^2) || N(0, 1)) a latent value, Kingma & Welling 2014, appendix B; with s fixed, m^2 / 2 is all that is left
def kl_term(mean: Tensor, log_variance: Tensor | None) -> Tensor:
    """(B, C, h, w) => (B,)."""
    divergence = mean.square()
    if log_variance is not None:
        divergence = divergence + log_variance.exp() - 1 - log_variance
    return 0.5 * divergence.mean((1, 2, 3))


class AutoencoderTask:
    def __init__(self, config: AutoencoderConfig):
        self.config = config
        check_alike(config.data, config.valid)
        self.train, self.valid = load(config.data), load(config.valid)
        self.identity = {"data": self.train.fingerprint}
        self.count, self.valid_count = len(self.train), len(self.valid)
        torch.manual_seed(config.train.seed)
        # channels_last: the convolutions of oneDNN and cuDNN run up to twice as fast on it
        autoencoder = Autoencoder(config.model.kind, config.model.network, config.model.patch_size)
        autoencoder.to(memory_format=torch.channels_last)
        self.latent_shape = autoencoder.latent_shape(config.data.resolution, config.data.resolution)
        self.players = {"autoencoder": Player(Objective(autoencoder, config.loss), config.train)}

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        pixels = augment(self.train.pixels(batch.own_ids), batch, self.config.augment)
        names = ("noise", "posterior_noise")
        return {"pixels": pixels, **{name: batch.normal(name, *self.latent_shape) for name in names}}

    def validate(self, objective: Objective, rows: slice) -> dict[str, np.ndarray]:
        """PSNR of each held-out picture, from its 8-bit reconstruction."""
        psnr = []
        for start in range(rows.start, rows.stop, 128):
            ids = range(start, min(start + 128, rows.stop))
            decoded = images.to_uint8(reconstruct(objective.autoencoder, self.valid.pixels(ids)))
            psnr.append(images.psnr(self.valid.pictures[ids.start : ids.stop], decoded.numpy()))
        return {"psnr": np.concatenate(psnr)}

    def preview(self, objective: Objective) -> Image.Image:
        """Held-out pictures in the upper row, their reconstructions below."""
        ids = range(min(8, len(self.valid)))
        decoded = images.to_uint8(reconstruct(objective.autoencoder, self.valid.pixels(ids)))
        return images.grid([*self.valid.pictures[: len(ids)], *decoded.numpy()], columns=len(ids), scale=2)

    def export(self, objective: Objective, folder: Path, record: dict[str, Any]) -> None:
        """Measure the latents over the training set, store the statistics in the autoencoder, write the stage."""
        autoencoder = objective.autoencoder
        autoencoder.set_statistics(*self._statistics(autoencoder))
        contract = {
            "latent_shape": list(self.latent_shape),
            "resolution": self.config.data.resolution,
            "latents_mean": autoencoder.config.latents_mean,
            "latents_std": autoencoder.config.latents_std,
            "data": {"name": self.train.name, "count": self.count, "fingerprint": self.train.fingerprint},
            **record,
        }
        stages.export(folder, "autoencoder", {"autoencoder": autoencoder}, contract)

    def _statistics(self, autoencoder: Autoencoder) -> tuple[Tensor, Tensor]:
        """Mean and std a channel, (C,) each, of the raw latents, in float64 over a fixed draw of training pictures."""
        chosen = torch.randperm(self.count, generator=generator(self.config.train.seed, 0, "statistics"))
        total = square = torch.zeros(self.latent_shape[0], dtype=torch.float64)
        values = 0
        for ids in chosen[: self.config.statistics_count].split(256):
            raw = autoencoder.raw_latents(self.train.pixels(ids).to(autoencoder.device))[0].cpu().double()
            total, square = total + raw.sum((0, 2, 3)), square + raw.square().sum((0, 2, 3))
            values += raw[:, 0].numel()
        mean = total / values
        return mean.float(), (square / values - mean**2).sqrt().float()


def reconstruct(autoencoder: Autoencoder, pixels: Tensor) -> Tensor:
    """pixels => what is left of them after encoding and decoding, on the CPU."""
    raw = autoencoder.raw_latents(pixels.to(autoencoder.device))[0]
    return autoencoder.decode_raw(raw).float().cpu()


main = launch.Program(AutoencoderConfig, "autoencoder", lambda launched: AutoencoderTask(launched.config))


if __name__ == "__main__":
    sys.exit(command(main))
