"""Stage 2: the autoencoder. Pictures only: the decoder needs no captions.

accelerate launch -m training.autoencoder --config training/configs/shapes/autoencoder.yaml --run runs/shapes
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor, nn

from sd_mini import images, stages
from sd_mini.autoencoder.model import Autoencoder, code_frequencies, perplexity
from sd_mini.config import Config
from sd_mini.data.batches import Batch, generator
from sd_mini.data.buckets import Size, bucket_sizes
from sd_mini.data.captioned import DataConfig, ValidConfig
from sd_mini.data.parts import check_alike, load_pictures, resolved
from sd_mini.errors import UserError
from sd_mini.remarks import remark
from sd_mini.stages.start import load_autoencoder
from sd_mini.vision.lpips import load_lpips
from training.autoencoder.adversarial import AdversaryConfig, Discriminator, DiscriminatorObjective
from training.autoencoder.losses import OF_ERROR, AutoencoderLossConfig, AutoencoderObjective, drawn_change
from training.engine import launch
from training.engine.augment import AugmentConfig, augment
from training.engine.learner import Player
from training.engine.task import TrainConfig

COARSE = 4  # cells a side at which latents lose most of a picture's details


class ModelConfig(Config):
    kind: Literal["dc", "kl", "vq", "tiny", "small_picture"] | None = None
    """dc: AutoencoderDC (the fewest FLOPs), which is what null means too; kl: AutoencoderKL; vq: VQModel; tiny:
    AutoencoderTiny; small_picture: the latent is a small picture, which the decoder upsamples"""
    patch_size: int = Field(1, ge=1)
    """pixels a side folded into channels before the network (space-to-depth) and unfolded after it"""
    network: dict[str, Any] = Field(default_factory=dict)
    """fields of that diffusers class"""
    unit_codes: bool = False
    """of kind vq: l2-normalise latents and codes, and compare them by the cosine"""
    start: str | None = None
    """an autoencoder to start from, instead of the fields above: an exported stage, a diffusers folder or a hub name"""
    train: Literal["all", "decoder"] = "all"
    """decoder: the encoder is frozen, so latents, their caches and noise predictors on them stay valid"""
    teacher: str | None = None
    """an exported autoencoder whose latents are learned, so that this one can replace it"""

    @model_validator(mode="after")
    def _possible_together(self) -> ModelConfig:
        own = self.kind is not None or self.network or self.patch_size > 1 or self.unit_codes
        if self.start is not None and own:
            raise UserError("start brings its own network; leave kind, network, patch_size and unit_codes out")
        if self.train == "decoder" and self.start is None:
            raise UserError("train: decoder needs a trained encoder; give its folder as start")
        if self.train == "decoder" and self.teacher is not None:
            raise UserError("teacher is for a trained encoder; leave out teacher, or train: decoder")
        return self


class AutoencoderConfig(Config):
    data: DataConfig = DataConfig()
    """pictures to train on"""
    valid: ValidConfig = ValidConfig(count=256)
    """pictures to measure on"""
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig()
    loss: AutoencoderLossConfig = AutoencoderLossConfig()
    adversary: AdversaryConfig = AdversaryConfig()
    train: TrainConfig = TrainConfig()
    statistics_count: int = Field(4096, ge=1)
    """training pictures over which the latents' mean and std are measured"""

    @model_validator(mode="after")
    def _possible_together(self) -> AutoencoderConfig:
        if self.loss.adversarial.weight and self.adversary.adaptive and self.train.accumulation > 1:
            raise UserError(
                f"adversary.adaptive weights by the gradients of the whole batch, and with train.accumulation "
                f"{self.train.accumulation} a pass sees a part of it; expected accumulation 1, or adaptive false"
            )
        for name, term in self.loss.begun(10**18).items():
            if term.start >= self.train.steps:
                raise UserError(
                    f"loss.{name} starts at update {term.start} of {self.train.steps}, so never; start it earlier, or "
                    "leave it out"
                )
        if self.model.teacher is not None and "distillation" not in self.loss.begun(0):
            raise UserError("model.teacher: its latents are learned by loss.distillation; expected it from update 0")
        if not any(name in self.loss.begun(0) for name in (*OF_ERROR, "ssim", "focal_frequency", "lpips")):
            raise UserError("loss: expected a term of the picture (l1, l2, ...) that starts at update 0")
        if self.loss.equivariance.weight and not any(name in self.loss.begun(0) for name in OF_ERROR):
            raise UserError(f"loss.equivariance repeats the terms {', '.join(OF_ERROR)}; expected one from update 0")
        if self.loss.ssim.weight and min(map(min, bucket_sizes(self.data))) < images.SSIM_WINDOW:
            smallest = min(bucket_sizes(self.data), key=min)
            what = f"data.resolution is {smallest.height}" if self.data.max_aspect == 1 else f"a bucket is {smallest}"
            raise UserError(f"loss.ssim needs {images.SSIM_WINDOW} x {images.SSIM_WINDOW} pixels; {what}")
        if self.loss.equivariance.weight and self.data.max_aspect > 1:
            raise UserError(
                f"loss.equivariance turns squares; with data.max_aspect {self.data.max_aspect:g} leave it out"
            )
        return self


class AutoencoderTask:
    evaluate_every = None  # its held-out scores are what an evaluation would measure

    def __init__(self, config: AutoencoderConfig, cache: Path | None = None):
        self.config, loss = config, config.loss
        check_alike(*resolved(config.data, config.valid))
        torch.manual_seed(config.train.seed)
        autoencoder, self.started_from = _built(config.model)
        self.latent_shape = autoencoder.latent_shape(config.data.resolution, config.data.resolution)
        decoder_only, is_vq = config.model.train == "decoder", autoencoder.config.kind == "vq"
        if is_vq and not decoder_only and "commitment" not in loss.begun(0):
            raise UserError(
                "loss.commitment: kind vq needs it above 0 from update 0; its codebook learns by nothing else"
            )
        if autoencoder.config.kind == "tiny" and config.train.gradient_checkpointing:
            # diffusers' EncoderTiny then skips the scaling of its input that it applies in evaluation
            raise UserError("train.gradient_checkpointing: AutoencoderTiny learns something else with it; leave it out")
        self.draws_pixels = autoencoder.draws_pixels
        if self.draws_pixels and (given := [t for t in ("adversarial", "equivariance") if getattr(loss, t).weight]):
            raise UserError(f"loss.{given[0]}: the decoder draws its pictures by diffusion, which has no use for it; 0")
        if self.draws_pixels and (told := autoencoder.network.config.augmentation) > loss.latent_noise.weight:
            raise UserError(
                f"model.network.augmentation {told:g}: expected at most loss.latent_noise, which is "
                f"{loss.latent_noise.weight:g}: no more noise was on the small pictures in training"
            )
        teacher, self.taught_by = _teacher(config.model, autoencoder)
        perceptual = load_lpips(loss.lpips_network, loss.lpips_weights) if loss.lpips.weight else None
        discriminator = None
        if loss.adversarial.weight:
            discriminator = Discriminator(config.adversary.width, config.adversary.layers)
            discriminator.to(memory_format=torch.channels_last)
        for size in bucket_sizes(config.data):
            _check_size(autoencoder, size, perceptual, discriminator)
        self.train, self.valid = load_pictures(config.data, config.valid, cache and cache / "pictures")
        self.rejected = [*self.train.rejected, *self.valid.rejected]
        self.weights, self.valid_sources = self.train.weights, self.valid.sources
        self.bucket_counts = self.train.bucket_counts
        if (coarse := coarse_grid(autoencoder, config.data.resolution)) is not None:
            remark(coarse)
        self.count, self.valid_count = len(self.train), len(self.valid)
        self.identity = dict(self.train.identity)
        for name, contract in (("start", self.started_from), ("teacher", self.taught_by)):
            self.identity |= {name: contract["hash"]} if contract is not None else {}
        # the convolutions of oneDNN and cuDNN are up to twice as fast on channels_last
        autoencoder.to(memory_format=torch.channels_last)
        if decoder_only:
            for part in autoencoder.encoder_parts:
                part.requires_grad_(False)
        elif is_vq and config.model.start is None:
            with torch.no_grad():
                encode = (lambda pixels: autoencoder.raw_latents(pixels)[0]) if teacher is None else teacher.encode
                some = [encode(pixels) for pixels in self.train.select(self.train.spread(64)).pixel_parts()]
            # (b, C, h, w) of each size => (1, C, cells, 1)
            cells = torch.cat([latents.transpose(0, 1).flatten(1) for latents in some], dim=1)[None, :, :, None]
            autoencoder.start_codebook(cells, generator(config.train.seed, 0, "codebook"))
        self.teacher = teacher
        trio = (perceptual, teacher, discriminator)
        others: list[Any] = [part.to(PartialState().device) if part is not None else None for part in trio]
        objective = AutoencoderObjective(autoencoder, *others, adaptive=config.adversary.adaptive)
        self.players = {"autoencoder": Player(objective, config.train)}
        if discriminator is not None:
            adversary = DiscriminatorObjective(discriminator, objective, config.adversary.r1)
            self.players["discriminator"] = Player(adversary, config.adversary, loss.adversarial.start)

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        pixels = augment(self.train.pixels(batch.own_ids), batch, self.config.augment)
        stride = self.config.data.resolution // self.latent_shape[1]
        latent_shape = self.latent_shape[0], *(side // stride for side in pixels.shape[2:])
        begun = self.config.loss.begun(batch.step)
        inputs = {"pixels": pixels, **{f"weight_{name}": torch.tensor(term.weight) for name, term in begun.items()}}
        if "equivariance" in begun:
            change = drawn_change(self.latent_shape[1], *(float(u) for u in batch.uniform_all("change", 2)[0]))
            inputs |= {"turned": change.of_pixels(pixels, stride), "places": change.places()}
        if self.draws_pixels:
            inputs["pixel_noise"] = batch.normal("pixel_noise", *pixels.shape[1:])
            inputs |= {"times": batch.stratified("times"), "levels": batch.uniform("levels")}
        return inputs | {name: batch.normal(name, *latent_shape) for name in ("noise", "posterior_noise")}

    def validate(self, objective: AutoencoderObjective, rows: slice) -> dict[str, np.ndarray]:
        """PSNR of each held-out picture, from its 8-bit reconstruction; of kind vq also the perplexity of all codes."""
        psnr, autoencoder = [], objective.autoencoder
        for ids in self.valid.runs(rows, 128):
            decoded = images.to_uint8(reconstruct(autoencoder, self.valid.pixels(ids)))
            psnr.append(images.psnr(self.valid.pictures[ids.start : ids.stop], decoded.numpy()))
        scores = {"psnr": np.concatenate(psnr)}
        if autoencoder.config.kind == "vq":  # of all pictures, not only of `rows`: perplexities have no mean
            raws = (autoencoder.raw_latents(pixels.to(autoencoder.device))[0] for pixels in self.valid.pixel_parts())
            codes = torch.cat([autoencoder.codes(raw).indices.flatten() for raw in raws])
            frequencies = code_frequencies(codes, autoencoder.network.config.num_vq_embeddings)
            scores["code_perplexity"] = np.full(len(scores["psnr"]), float(perplexity(frequencies)))
        return scores

    def preview(self, objective: AutoencoderObjective) -> Image.Image:
        """Held-out pictures in the upper row, their reconstructions below."""
        shown = self.valid.select(self.valid.spread(8))
        decoded = [images.to_uint8(reconstruct(objective.autoencoder, pixels)) for pixels in shown.pixel_parts()]
        reconstructed = [picture for part in decoded for picture in part.numpy()]
        return images.grid([*shown.pictures, *reconstructed], columns=len(shown), scale=2)

    def export(self, objective: AutoencoderObjective, folder: Path, record: dict[str, Any]) -> None:
        """Measure the latents over the training set, store the statistics in the autoencoder, write the stage.

        If the latents are another stage's, its statistics are kept and the contract holds its hash: `latents_of`, the
        stage whose latents this one decodes, and `encoder_of`, the stage with the same encoder.
        """
        autoencoder, origin = objective.autoencoder, {}
        if self.taught_by is not None:  # it learned standardised latents
            zeros = torch.zeros(self.latent_shape[0])
            autoencoder.set_statistics(zeros, zeros + 1)
            origin = {
                "latents_of": stages.latents_of(self.taught_by),
                "latents_error": self._latents_error(autoencoder),
            }
        elif self.config.model.train == "all" or autoencoder.config.latents_std is None:
            autoencoder.set_statistics(*self._statistics(autoencoder))
        elif self.started_from is not None:
            origin = {
                "latents_of": stages.latents_of(self.started_from),
                "encoder_of": stages.encoder_of(self.started_from),
            }
        contract = {
            "latent_shape": list(self.latent_shape),
            "resolution": self.config.data.resolution,
            "latents_mean": autoencoder.config.latents_mean,
            "latents_std": autoencoder.config.latents_std,
            "data": {"name": self.train.name, "count": self.count, "fingerprint": self.train.fingerprint},
            **origin,
            **record,
        }
        stages.export(folder, "autoencoder", {"autoencoder": autoencoder}, contract)

    def _latents_error(self, autoencoder: Autoencoder) -> float:
        """Root mean square distance of its latents from the teacher's (of rms 1), on training pictures."""
        assert self.teacher is not None
        squares = []
        for pixels in self.train.select(self.train.spread(256)).pixel_parts():
            pixels = pixels.to(autoencoder.device)
            squares.append((autoencoder.encode(pixels) - self.teacher.encode(pixels)).square().flatten())
        return float(torch.cat(squares).mean().sqrt())

    def _statistics(self, autoencoder: Autoencoder) -> tuple[Tensor, Tensor]:
        """Mean and std a channel, (C,) each, of the raw latents, in float64 over a fixed draw of training pictures."""
        chosen = torch.randperm(self.count, generator=generator(self.config.train.seed, 0, "statistics"))
        total = square = torch.zeros(self.latent_shape[0], dtype=torch.float64)
        values = 0
        chosen = chosen[: self.config.statistics_count].numpy()
        of_sizes = (chosen[(span.start <= chosen) & (chosen < span.stop)] for span in self.train.spans)
        parts = (own[start : start + 256] for own in of_sizes for start in range(0, len(own), 256))
        for ids in parts:
            raw = autoencoder.raw_latents(self.train.pixels(ids).to(autoencoder.device))[0].cpu().double()
            total, square = total + raw.sum((0, 2, 3)), square + raw.square().sum((0, 2, 3))
            values += raw[:, 0].numel()
        mean = total / values
        return mean.float(), (square / values - mean**2).sqrt().float()


def _built(model: ModelConfig) -> tuple[Autoencoder, dict[str, Any] | None]:
    """The autoencoder to train, and the contract of the exported stage it starts from; None without one."""
    if model.start is not None:
        return load_autoencoder(model.start)
    return Autoencoder(model.kind or "dc", model.network, model.patch_size, unit_codes=model.unit_codes), None


def _teacher(model: ModelConfig, student: Autoencoder) -> tuple[Autoencoder | None, dict[str, Any] | None]:
    if model.teacher is None:
        return None, None
    teacher, contract = load_autoencoder(model.teacher)
    if contract is None:
        raise UserError(f"model.teacher {model.teacher}: expected an exported stage, whose latents have statistics")
    if not any(True for part in student.encoder_parts for _ in part.parameters()):
        raise UserError(
            f"model.teacher: the encoder of kind {student.config.kind} learns nothing, so no latents either"
        )
    theirs, ours = ((one.latent_channels, one.stride) for one in (teacher, student))
    if theirs != ours:
        raise UserError(
            f"model.teacher {model.teacher}: its latents have {theirs[0]} channels and a stride of {theirs[1]} px, and "
            f"here {ours[0]} and {ours[1]}; give the network the same"
        )
    return teacher.requires_grad_(False), contract


def coarse_grid(autoencoder: Autoencoder, resolution: int) -> str | None:
    """A remark on latents of at most COARSE cells a side, too few for a picture's details; None for finer ones."""
    _, height, width = autoencoder.latent_shape(resolution, resolution)
    if height > COARSE:
        return None
    patch = autoencoder.config.patch_size
    finer = f"a smaller model.patch_size than {patch}" if patch > 1 else "one level fewer in model.network"
    return (
        f"data.resolution {resolution}: the latents are {height} x {width} cells, each of {autoencoder.stride} px a "
        f"side, too few for much detail; give {finer}, or a larger resolution"
    )


def _check_size(
    autoencoder: Autoencoder, size: Size, perceptual: nn.Module | None, discriminator: nn.Module | None
) -> None:
    """Run every network on one picture. Raises UserError if encoder and decoder differ in their levels, or the picture
    is too small for LPIPS's network or the discriminator, or its sides do not divide."""
    what = f"{size.width} px" if size.width == size.height else str(size)
    pixels = torch.zeros(1, 3, *size)
    try:
        autoencoder.latent_shape(*size)
    except ValueError as error:
        raise UserError(f"data.bucket_step: {error}") from None
    attempts = {
        "model: encoder and decoder do not fit": lambda: autoencoder.decode_raw(autoencoder.raw_latents(pixels)[0]),
        f"loss.lpips_network is too deep for {what}": lambda: perceptual and perceptual(pixels, pixels),
        f"adversary.layers are too many for {what}": lambda: discriminator and discriminator(pixels),
    }
    results: list[Any] = []
    for complaint, attempt in attempts.items():
        try:
            with torch.no_grad():
                results.append(attempt())
        except RuntimeError as error:
            raise UserError(f"{complaint} ({' '.join(str(error).split())[:160]})") from None
    if results[0].shape != pixels.shape:
        raise UserError(f"model: {what} go in and {results[0].shape[-1]} px come out; give both halves equal levels")


def reconstruct(autoencoder: Autoencoder, pixels: Tensor) -> Tensor:
    """pixels => their reconstruction, on the CPU."""
    raw = autoencoder.raw_latents(pixels.to(autoencoder.device))[0]
    return autoencoder.decode_raw(raw).float().cpu()


main = launch.Program(
    AutoencoderConfig, "autoencoder", lambda launched: AutoencoderTask(launched.config, launched.run / "cache")
)
