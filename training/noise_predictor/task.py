"""Stage 3: the latent noise predictor. It sees nothing but what stages 1 and 2 made of the data, encoded once.

accelerate launch -m training.noise_predictor --config training/configs/shapes/noise_predictor.yaml --run runs/shapes
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

from sd_mini import diffusion, images, lora, stages
from sd_mini.config import Config
from sd_mini.data.captioned import DataConfig, load_captioned
from sd_mini.errors import UserError
from sd_mini.pipelines.text_to_image import Pipeline
from sd_mini.sampling import samplers
from sd_mini.sampling.guidance import Guidance
from sd_mini.stages.contract import Stage
from training.engine import launch
from training.engine.batches import Batch, generator
from training.engine.evaluation import EvaluateConfig, Evaluator
from training.engine.learner import Player
from training.engine.task import TrainConfig
from training.noise_predictor.data import Encoded, text_stage
from training.noise_predictor.losses import Objective, ObjectiveConfig, answer_and_target
from training.noise_predictor.network import NetworkConfig, description, exported, make_network, token_grid
from training.noise_predictor.representation import Alignment, features, load_teacher, weights_at
from training.storage import cache

VALID_TIMESTEPS = [(level + 0.5) / 10 for level in range(10)]  # where the held-out loss is measured


class SamplingConfig(Config):
    """The pipeline's defaults, used by the previews too."""

    steps: int = Field(20, ge=1)
    guidance: float = Field(3.0, ge=0)
    interval: tuple[float, float] = (0.0, 1.0)
    """noise levels between which steps are guided; 0 is the picture, 1 the noise"""
    sampler: str | None = None
    """euler, heun, dpm++, unipc, and on a discrete schedule ddim, ddpm; null: the one that did best for its kind"""

    @model_validator(mode="after")
    def _guided(self) -> SamplingConfig:
        Guidance(self.guidance, 0.0, *self.interval)  # which refuses what cannot be
        return self


class PredictorConfig(Config):
    data: DataConfig = DataConfig()
    """captioned pictures to train on"""
    valid: DataConfig = DataConfig(split="test", count=256)
    """captioned pictures for the held-out loss and the previews"""
    captions_per_picture: int = Field(2, ge=1)
    """at most so many of a picture's captions are encoded and drawn from"""
    cache_dtype: Literal["float16", "float32"] = "float16"
    """how latents and prompt embeddings lie on disk; float32 takes twice the room, and holds what float16 cannot"""
    resident: bool = False
    """keep all latents and prompt embeddings in the memory of the device, and draw the noise there; for a GPU"""
    network: NetworkConfig = NetworkConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    sampling: SamplingConfig = SamplingConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    train: TrainConfig = TrainConfig()
    text_encoder: str | None = None
    """folder of the exported text stage; null: RUN/text_encoder/final"""
    autoencoder: str | None = None
    """folder of the exported autoencoder; null: RUN/autoencoder/final"""

    @model_validator(mode="after")
    def _sampler_fits(self) -> PredictorConfig:
        if self.sampling.sampler is not None:
            samplers.build(self.sampling.sampler, self.objective.process)
        if self.resident and self.train.workers:
            raise UserError(
                f"train.workers {self.train.workers}: other processes cannot gather what is resident on the device; 0"
            )
        return self


class PredictorTask:
    def __init__(self, config: PredictorConfig, run: Path):
        self.config = config
        self.text = stages.load_stage(config.text_encoder or run / "text_encoder" / "final", "text_encoder")
        self.vae = stages.load_stage(config.autoencoder or run / "autoencoder" / "final", "autoencoder")
        resolution = config.data.resolution
        self.latent_shape = self.vae.parts["autoencoder"].latent_shape(resolution, resolution)
        torch.manual_seed(config.train.seed)
        length, dim = self.text.contract["conditioning"]
        network = make_network(config.network, self.latent_shape, dim, config.objective.process)
        repa = config.objective.repa
        teacher = load_teacher(repa, self.text) if repa.weight else None
        pictures, valid = load_captioned(config.data, config.valid)
        self.data = {"name": pictures.name, "count": len(pictures), "fingerprint": pictures.fingerprint}
        self.valid_captions = [captions[0] for captions in valid.captions]
        how = (self.text, self.vae, config.captions_per_picture, run / "cache", config.cache_dtype)
        self.train, self.valid = Encoded(pictures, *how), Encoded(valid, *how, is_held_out=True)
        self.count, self.valid_count = len(self.train), len(self.valid)
        self.device = PartialState().device if config.resident else torch.device("cpu")
        if config.resident:
            self.train.move(self.device)
        self.identity = {
            "text_encoder": self.text.hash,
            "autoencoder": stages.encoder_of(self.vae.contract),
            "data": pictures.fingerprint,
        }
        alignment = None
        if teacher is not None:
            grid = token_grid(network, self.latent_shape)
            self.features = features(pictures, teacher, grid, run / "cache", config.cache_dtype)
            alignment = Alignment(network, self.features[np.arange(1)].shape[1], repa, grid)
        objective = Objective(network, config.objective, alignment)
        self.players = {"noise_predictor": Player(objective, config.train)}
        cache.say(description(objective, self.latent_shape, (length, dim), config.train))
        with torch.no_grad():
            null = text_stage(self.text, "cpu").null(1)
        self.null_tokens, self.null_mask = null.tokens.to(self.device), null.mask.to(self.device)
        self.measure_every = config.evaluate.every
        self.evaluator = Evaluator(config.evaluate, config.valid, run / "cache" / "features")

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Latents and one caption each, some replaced by the null condition, with noise and timesteps of this step."""
        own = self.train.take(batch.own_ids, batch.uniform("caption").tolist())
        dropped = batch.uniform("dropout") < self.config.objective.caption_dropout
        dropped = dropped.to(self.device, non_blocking=True)[:, None]
        own["prompt_embeds"] = torch.where(dropped[..., None], self.null_tokens, own["prompt_embeds"])
        own["prompt_mask"] = torch.where(dropped, self.null_mask, own["prompt_mask"])
        timesteps = self.config.objective.draw(batch.stratified("timesteps"))
        draws = self.config.objective.noise_draws
        noise = batch.normal("noise", *([draws] if draws > 1 else []), *self.latent_shape, device=self.device)
        if draws > 1:
            noise = diffusion.nearest_noise(own["latents"], noise)
        if (repa := self.config.objective.repa).weight:
            own["features"] = torch.from_numpy(self.features[batch.own_ids]).float()
            own["feature_weights"] = weights_at(batch.step, self.config.train.steps, len(timesteps), repa)
        return {**own, "noise": noise, "timesteps": timesteps}

    def validate(self, objective: Objective, rows: slice) -> dict[str, np.ndarray]:
        """The held-out squared error of each sample at fixed noise, caption and timesteps: the mean and the curve.

        Two runs, two steps of one, and one before and after a resume see the same draws.
        """
        device, process = next(objective.parameters()).device, self.config.objective.process
        fixed = generator(0, 0, "validation")
        noise = torch.randn(len(self.valid), *self.latent_shape, generator=fixed)[rows]
        ids = np.arange(rows.start, rows.stop)
        batch = {**self.valid.take(ids, [0.0] * len(ids)), "noise": noise}
        losses = []
        for part in torch.arange(len(ids)).split(256):
            own = {name: value[part].to(device) for name, value in batch.items()}
            of_levels = []
            for level in VALID_TIMESTEPS:
                timesteps = process.times(torch.full((len(part),), level, device=device))
                answer, target = answer_and_target(objective.network, process, timesteps=timesteps, **own)
                of_levels.append((answer - target).square().mean((1, 2, 3)))
            losses.append(torch.stack(of_levels).cpu())
        curve = torch.cat(losses, dim=1).numpy()  # (levels, n)
        return {"loss": curve.mean(0)} | {f"loss_t{t:.2f}": c for t, c in zip(VALID_TIMESTEPS, curve, strict=True)}

    def preview(self, objective: Objective) -> Image.Image:
        """The first eight held-out captions, each from its own fixed seed, through the real pipeline."""
        captions = self.valid_captions[:8]
        made = self._pipeline(objective.network)(
            captions, generator=[torch.Generator().manual_seed(seed) for seed in range(len(captions))]
        )
        return images.grid(made.images, columns=4, labels=captions, scale=2)

    def measure(self, objective: Objective) -> dict[str, float]:
        return self.evaluator.scores(self._pipeline(objective.network).save_pretrained)

    def _pipeline(self, network: nn.Module) -> Pipeline:
        predictor = Stage(Path(), self._contract({}), {"noise_predictor": lora.merged(network)})
        pipeline = Pipeline.from_stages(self.text, self.vae, predictor).to(network.device)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _contract(self, record: dict[str, Any]) -> dict[str, Any]:
        return {
            "kind": "noise_predictor",
            "hash": "",
            "latent_shape": list(self.latent_shape),
            "conditioning": self.text.contract["conditioning"],
            "objective": self.config.objective.model_dump(),
            "sampling": {
                "resolution": self.config.data.resolution,
                "default_steps": self.config.sampling.steps,
                "default_guidance": self.config.sampling.guidance,
                "default_interval": self.config.sampling.interval,
                "sampler": self.config.sampling.sampler,
            },
            "trained_against": {"text_encoder": self.text.hash, "autoencoder": stages.latents_of(self.vae.contract)},
            "data": self.data,
            **record,
        }

    def export(self, objective: Objective, folder: Path, record: dict[str, Any]) -> None:
        contract = {k: v for k, v in self._contract(record).items() if k not in ("kind", "hash")}
        # of what is exported, without a term's own projection
        contract["parameters"] = sum(p.numel() for p in lora.merged(objective.network).parameters())
        network = exported(objective.network, self.config.network, self.config.objective.process)
        stages.export(folder, "noise_predictor", {"noise_predictor": network}, contract)


main = launch.Program(PredictorConfig, "noise_predictor", lambda launched: PredictorTask(launched.config, launched.run))
