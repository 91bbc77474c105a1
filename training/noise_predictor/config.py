"""What the user decides about stage 3."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from sd_mini.config import Config
from sd_mini.data.captioned import DataConfig, ValidConfig
from sd_mini.errors import UserError
from sd_mini.sampling import samplers
from sd_mini.sampling.loop import Guidance
from training.engine.evaluation import EvaluateConfig
from training.engine.task import TrainConfig
from training.noise_predictor.losses import ObjectiveConfig
from training.noise_predictor.network import NetworkConfig


class SamplingConfig(Config):
    """The pipeline's defaults, used by the previews too."""

    steps: int = Field(20, ge=1)
    guidance: float = Field(3.0, ge=0)
    interval: tuple[float, float] = (0.0, 1.0)
    """noise levels between which steps are guided; 0 is the picture, 1 the noise"""
    sampler: str | None = None
    """euler, heun, dpm++, unipc, and on a discrete schedule ddim, ddpm; null: the best one measured for its kind"""

    @model_validator(mode="after")
    def _guided(self) -> Self:
        Guidance(self.guidance, 0.0, *self.interval)  # raises UserError for values out of range
        return self


class EncodedConfig(Config):
    """Of each stage that trains a noise predictor: its data, encoded by stages 1 and 2, and the training."""

    data: DataConfig = DataConfig()
    """captioned pictures to train on"""
    valid: ValidConfig = ValidConfig(count=256)
    """captioned pictures for the held-out loss and the previews"""
    captions_per_picture: int = Field(2, ge=1)
    """captions a picture at most that are encoded and drawn from"""
    cache_dtype: Literal["float16", "float32"] = "float16"
    """format of latents and prompt embeddings on disk; float32 takes twice the space and has no overflow"""
    resident: bool = False
    """hold all latents and prompt embeddings in the device's memory, and draw the noise there; for a GPU"""
    evaluate: EvaluateConfig = EvaluateConfig()
    train: TrainConfig = TrainConfig()
    text_encoder: str | None = None
    """folder of the exported text stage; null: RUN/text_encoder/final"""
    autoencoder: str | None = None
    """folder of the exported autoencoder; null: RUN/autoencoder/final"""

    @model_validator(mode="after")
    def _rows_fit(self) -> Self:
        if self.resident and self.train.workers:
            raise UserError(
                f"train.workers {self.train.workers}: other processes cannot gather what is resident on the device; 0"
            )
        if any((self.data.caption_weights or ())[self.captions_per_picture :]):
            raise UserError(
                f"data.caption_weights {list(self.data.caption_weights or ())}: captions beyond captions_per_picture, "
                f"{self.captions_per_picture}, are not encoded; raise that, or give them weight 0"
            )
        return self


class PredictorConfig(EncodedConfig):
    network: NetworkConfig = NetworkConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    sampling: SamplingConfig = SamplingConfig()

    @model_validator(mode="after")
    def _sampler_fits(self) -> Self:
        if self.sampling.sampler is not None:
            samplers.build(self.sampling.sampler, self.objective.process)
        return self


class TunedConfig(EncodedConfig):
    """Of each stage that trains an exported noise predictor further."""

    noise_predictor: str | None = None
    """folder of the exported noise predictor to begin with; null: RUN/noise_predictor/final"""
