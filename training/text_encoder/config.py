"""What the user decides about stage 1."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from sd_mini.config import Config
from sd_mini.data.captioned import DataConfig, ValidConfig
from sd_mini.errors import UserError
from training.engine.augment import AugmentConfig
from training.engine.task import TrainConfig
from training.text_encoder.losses import TextLossConfig


class EncoderConfig(Config):
    """A text encoder under the adapter."""

    name: str | None = None
    """pretrained: a hub name, a folder, "package:PACKAGE/FOLDER", an open_clip architecture (with `weights`) or
    "local-dir:FOLDER"; kept frozen unless the fields below say otherwise. null: a small CLIP model from scratch"""
    weights: str | None = None
    """weights file of an open_clip architecture"""
    max_length: int = Field(24, ge=3)
    """tokens a prompt, with the start and end marks"""
    train_layers: int = Field(0, ge=0)
    """train so many of a pretrained encoder's last layers; without its dropout"""
    lora_rank: int = Field(0, ge=0)
    """train low-rank additions to a pretrained encoder's linear layers; they are merged into it on export"""
    vocab_size: int = Field(4096, ge=600)
    """from scratch: about how many BPE tokens to learn from the captions"""
    dim: int = Field(128, ge=8)
    """from scratch, as are the next two"""
    layers: int = Field(2, ge=1)
    heads: int = Field(4, ge=1)

    @model_validator(mode="after")
    def _one_way_to_train(self) -> EncoderConfig:
        if self.train_layers and self.lora_rank:
            raise UserError("train_layers and lora_rank: expected one of them, or neither")
        if self.name is None and (self.train_layers or self.lora_rank or self.weights):
            raise UserError("train_layers, lora_rank and weights are for a pretrained encoder; give its name too")
        return self


class AdapterConfig(Config):
    dim: int = Field(128, ge=8)
    """width of the prompt embeddings"""
    depth: int = Field(2, ge=0)
    """refiner blocks; 0 is a plain projection"""
    heads: int = Field(4, ge=1)
    mlp_ratio: float = Field(4.0, gt=0)
    """width of a refiner block's hidden layer, in widths of the tokens"""
    identity_scale: float = Field(1.0, ge=0)
    """weight of each word's own vector and place in its token; 0: the refined states alone"""
    residual_scale: float = Field(0.3, ge=0)
    """weight of the refined states"""
    plain: bool = False
    """Stable Diffusion's conditioning: the embeddings are an affine map of a CLIP text model's last states, padding is
    attended to, and the null condition is the empty prompt. With depth 0, identity_scale 0 and one encoder; what
    `sd-mini export --format stable-diffusion` needs"""


class TowerConfig(Config):
    """The picture side: a small convolutional tower from scratch, or the features of a frozen one."""

    width: int = Field(64, ge=8)
    patch: int = Field(2, ge=1)
    """pixels a side that the first layer folds into channels"""
    late_dim: int = Field(64, ge=1)
    """channels in which words are compared with cells of a picture"""
    name: str | None = None
    """a frozen open_clip model's picture half: an architecture (with `weights`) or "local-dir:FOLDER\""""
    weights: str | None = None
    """weights file of an open_clip architecture"""
    features: str | None = None
    """a folder with train.npy and valid.npy, (N, F) each: features made elsewhere, a row for each picture in order"""

    @model_validator(mode="after")
    def _one_picture_side(self) -> TowerConfig:
        if self.name is not None and self.features is not None:
            raise UserError("name and features: expected one of them, or neither")
        if self.weights is not None and self.name is None:
            raise UserError("weights are of an open_clip architecture; give its name too")
        return self


class TextConfig(Config):
    data: DataConfig = DataConfig()
    """captioned pictures to train on"""
    valid: ValidConfig = ValidConfig(count=500)
    """captioned pictures to measure retrieval and binding on"""
    augment: AugmentConfig = AugmentConfig()
    encoder: EncoderConfig = EncoderConfig()
    encoder_2: EncoderConfig | None = None
    """a second encoder, whose tokens follow the first one's; as encoder"""
    encoder_3: EncoderConfig | None = None
    adapter: AdapterConfig = AdapterConfig()
    tower: TowerConfig = TowerConfig()
    loss: TextLossConfig = TextLossConfig()
    twins: int = Field(1, ge=1)
    """hard negatives of each caption, of which a step draws one"""
    strict: bool = False
    """refuse captions that are longer than an encoder reads, instead of cutting them"""
    cache_dtype: Literal["float16", "float32"] = "float16"
    """format of a frozen encoder's states on disk"""
    train: TrainConfig = TrainConfig()

    @property
    def encoders(self) -> list[EncoderConfig]:
        return [e for e in (self.encoder, self.encoder_2, self.encoder_3) if e is not None]

    @model_validator(mode="after")
    def _possible_together(self) -> TextConfig:
        if (self.tower.name or self.tower.features) and (self.augment.mirror or self.augment.shift):
            raise UserError("augment: features are made once, of the pictures as they are; leave mirror and shift at 0")
        if self.tower.features and (self.data.max_aspect > 1 or self.data.mirror):
            raise UserError(
                "tower.features are a row for each picture in the source's order, which buckets and mirror images "
                "change; leave out data.max_aspect and data.mirror, or give tower.name"
            )
        partly = any(e.train_layers or e.lora_rank for e in self.encoders)
        if partly and self.train.gradient_checkpointing:
            raise UserError("train.gradient_checkpointing: not with a partly trained encoder; leave it out")
        if self.loss.infonce and self.train.accumulation > 1:
            raise UserError(
                f"loss.infonce compares a text with every picture of the batch, and with train.accumulation "
                f"{self.train.accumulation} a pass sees a part of them; expected accumulation 1"
            )
        return self
