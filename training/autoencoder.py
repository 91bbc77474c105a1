"""Stage 2: the autoencoder. Pictures only: the decoder needs no captions.

accelerate launch -m training.autoencoder --config training/configs/shapes/autoencoder.yaml --run runs/shapes
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor

from sd_mini import images, stages
from sd_mini.autoencoder import Autoencoder
from sd_mini.config import Config, command
from sd_mini.data import DataConfig, check_alike, load
from sd_mini.load_autoencoder import load_autoencoder
from sd_mini.perceptual import load_lpips
from training import launch
from training.adversarial import AdversaryConfig, Discriminator, DiscriminatorObjective
from training.augment import AugmentConfig, augment
from training.autoencoder_losses import OF_ERROR, LossConfig, Objective, drawn_change
from training.batches import Batch, generator
from training.players import Player
from training.task import TrainConfig


class ModelConfig(Config):
    kind: Literal["dc", "kl", "vq", "tiny", "small_picture"] | None = None
    """dc: AutoencoderDC (the fewest FLOPs), which is what none means too; kl: AutoencoderKL; vq: VQModel; tiny:
    AutoencoderTiny; small_picture: the latent is a small picture, the decoder makes it large"""
    patch_size: int = Field(1, ge=1)
    """pixels a side that are folded into channels before the network (space-to-depth) and unfolded behind it"""
    network: dict[str, Any] = Field(default_factory=dict)
    """fields of that diffusers class"""
    start: str | None = None
    """an autoencoder to go on from, instead of the fields above: an exported stage, a diffusers folder or a hub name"""
    train: Literal["all", "decoder"] = "all"
    """decoder: the encoder stays as it is, and with it the latents, their caches and the noise predictors over them"""
    teacher: str | None = None
    """an exported autoencoder whose latents are to be learned, so that one can stand in for the other"""

    @model_validator(mode="after")
    def _possible_together(self) -> ModelConfig:
        if self.start is not None and (self.kind is not None or self.network or self.patch_size > 1):
            raise ValueError("start brings its own network; leave kind, network and patch_size out")
        if self.train == "decoder" and self.start is None:
            raise ValueError("train: decoder keeps an encoder that has learned; give its folder as start")
        if self.train == "decoder" and self.teacher is not None:
            raise ValueError("teacher is for an encoder that learns; leave out teacher, or train: decoder")
        return self


class AutoencoderConfig(Config):
    data: DataConfig = DataConfig()
    """pictures to train on"""
    valid: DataConfig = DataConfig(split="test", count=256)
    """pictures to measure on"""
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    adversary: AdversaryConfig = AdversaryConfig()
    train: TrainConfig = TrainConfig()
    statistics_count: int = Field(4096, ge=1)
    """training pictures over which the latents' mean and std are measured"""

    @model_validator(mode="after")
    def _possible_together(self) -> AutoencoderConfig:
        if self.loss.adversarial.weight and self.adversary.adaptive and self.train.accumulation > 1:
            raise ValueError(
                f"adversary.adaptive weighs by the gradients of the whole batch, and with train.accumulation "
                f"{self.train.accumulation} a pass sees a part of it; expected accumulation 1, or adaptive false"
            )
        if not any(name in self.loss.begun(0) for name in (*OF_ERROR, "ssim", "focal_frequency", "lpips")):
            raise ValueError("loss: expected a term of the picture (l1, l2, ...) that starts at update 0")
        if self.loss.equivariance.weight and not any(name in self.loss.begun(0) for name in OF_ERROR):
            raise ValueError(f"loss.equivariance repeats the terms {', '.join(OF_ERROR)}; expected one from update 0")
        if self.loss.ssim.weight and self.data.resolution < 11:
            raise ValueError(f"loss.ssim looks at 11 x 11 pixels; data.resolution is {self.data.resolution}")
        return self


class AutoencoderTask:
    def __init__(self, config: AutoencoderConfig):
        self.config, loss = config, config.loss
        check_alike(config.data, config.valid)
        torch.manual_seed(config.train.seed)
        autoencoder, self.started_from = _built(config.model)
        self.latent_shape = autoencoder.latent_shape(config.data.resolution, config.data.resolution)
        _check_sizes(autoencoder, config.data.resolution)
        if autoencoder.config.kind == "vq" and loss.begun(0).get("commitment") is None:
            raise ValueError(
                "loss.commitment: kind vq needs it above 0 from update 0; its codebook learns by nothing else"
            )
        teacher, self.taught_by = _teacher(config.model, self.latent_shape)
        self.perceptual = load_lpips(loss.lpips_network, loss.lpips_weights) if loss.lpips.weight else None
        self.train, self.valid = load(config.data), load(config.valid)
        self.count, self.valid_count = len(self.train), len(self.valid)
        self.identity = {"data": self.train.fingerprint}
        for name, contract in (("start", self.started_from), ("teacher", self.taught_by)):
            self.identity |= {name: contract["hash"]} if contract is not None else {}
        # channels_last: the convolutions of oneDNN and cuDNN run up to twice as fast on it
        autoencoder.to(memory_format=torch.channels_last)
        if config.model.train == "decoder":
            for part in autoencoder.encoder_parts:
                part.requires_grad_(False)
        elif autoencoder.config.kind == "vq" and config.model.start is None:
            draw = generator(config.train.seed, 0, "codebook")
            with torch.no_grad():
                autoencoder.start_codebook(
                    autoencoder.raw_latents(self.train.pixels(range(min(64, self.count))))[0], draw
                )
        self.players = self._players(autoencoder, teacher)

    def _players(self, autoencoder: Autoencoder, teacher: Autoencoder | None) -> dict[str, Player]:
        config, device, discriminator = self.config, PartialState().device, None
        if config.loss.adversarial.weight:
            discriminator = Discriminator(config.adversary.width, config.adversary.layers)
            discriminator.to(memory_format=torch.channels_last)
        others = [part.to(device) if part is not None else None for part in (self.perceptual, teacher, discriminator)]
        objective = Objective(autoencoder, *others, adaptive=config.adversary.adaptive)
        players = {"autoencoder": Player(objective, config.train)}
        if discriminator is not None:
            judge = DiscriminatorObjective(discriminator, autoencoder, config.adversary.r1)
            players["discriminator"] = Player(judge, config.adversary, config.loss.adversarial.start)
        return players

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        pixels = augment(self.train.pixels(batch.own_ids), batch, self.config.augment)
        begun = self.config.loss.begun(batch.step)
        found = {"pixels": pixels, **{f"weight_{name}": torch.tensor(term.weight) for name, term in begun.items()}}
        if "equivariance" in begun:
            change = drawn_change(self.latent_shape[1], *(float(u) for u in batch.uniform_all("change", 2)[0]))
            stride = pixels.shape[-1] // self.latent_shape[1]
            found |= {"turned": change.of_pixels(pixels, stride), "places": change.places()}
        return found | {name: batch.normal(name, *self.latent_shape) for name in ("noise", "posterior_noise")}

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
        """Measure the latents over the training set, store the statistics in the autoencoder, write the stage.

        Latents that were another stage's before keep its statistics, and the contract says whose they are.
        """
        autoencoder, same_encoder = objective.autoencoder, self.config.model.train == "decoder"
        whose = self.started_from if same_encoder else self.taught_by
        if self.taught_by is not None:  # it has learned them as they are standardised
            zeros = torch.zeros(self.latent_shape[0])
            autoencoder.set_statistics(zeros, zeros + 1)
        elif whose is None:
            autoencoder.set_statistics(*self._statistics(autoencoder))
        contract = {
            "latent_shape": list(self.latent_shape),
            "resolution": self.config.data.resolution,
            "latents_mean": autoencoder.config.latents_mean,
            "latents_std": autoencoder.config.latents_std,
            "data": {"name": self.train.name, "count": self.count, "fingerprint": self.train.fingerprint},
            **({"latents_of": stages.latents_of(whose), "same_encoder": same_encoder} if whose is not None else {}),
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


def _built(model: ModelConfig) -> tuple[Autoencoder, dict[str, Any] | None]:
    """The autoencoder to train, and the contract of the stage that it goes on from, if it is one."""
    if model.start is not None:
        return load_autoencoder(model.start)
    return Autoencoder(model.kind or "dc", model.network, model.patch_size), None


def _teacher(model: ModelConfig, latent_shape: tuple[int, ...]) -> tuple[Autoencoder | None, dict[str, Any] | None]:
    if model.teacher is None:
        return None, None
    teacher, contract = load_autoencoder(model.teacher)
    if contract is None:
        raise ValueError(f"model.teacher {model.teacher}: expected an exported stage, whose latents have statistics")
    if contract["latent_shape"] != list(latent_shape):
        raise ValueError(
            f"model.teacher {model.teacher}: its latents are {tuple(contract['latent_shape'])}, and here "
            f"{latent_shape}; give the network the same stride and channels"
        )
    return teacher.requires_grad_(False), contract


def _check_sizes(autoencoder: Autoencoder, resolution: int) -> None:
    """Raises ValueError where what comes out is not as large as what goes in: the halves' levels differ."""
    with torch.no_grad():
        pixels = torch.zeros(1, 3, resolution, resolution)
        try:
            made = autoencoder.decode_raw(autoencoder.raw_latents(pixels)[0])
        except RuntimeError as error:
            raise ValueError(f"model: encoder and decoder do not fit ({' '.join(str(error).split())})") from None
    if made.shape != pixels.shape:
        raise ValueError(
            f"model: {resolution} px go in and {made.shape[-1]} px come out; give encoder and decoder as many levels"
        )


def reconstruct(autoencoder: Autoencoder, pixels: Tensor) -> Tensor:
    """pixels => what is left of them after encoding and decoding, on the CPU."""
    raw = autoencoder.raw_latents(pixels.to(autoencoder.device))[0]
    return autoencoder.decode_raw(raw).float().cpu()


main = launch.Program(AutoencoderConfig, "autoencoder", lambda launched: AutoencoderTask(launched.config))


if __name__ == "__main__":
    sys.exit(command(main))
