"""What the user decides about the few-step stage."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from sd_mini.config import Config
from sd_mini.errors import UserError
from sd_mini.sampling.loop import Guidance
from training.generators.adversary import AdversaryConfig
from training.noise_predictor.config import TunedConfig


class BakedGuidance(Config):
    """The guidance that the few-step network learns; it is run without."""

    scale: float | None = Field(None, ge=0)
    """guidance scale; null: that of the noise predictor's own sampling"""
    interval: tuple[float, float] | None = None
    """noise levels between which the velocity is guided; null: those of the noise predictor's own sampling"""

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        Guidance(1.0 if self.scale is None else self.scale, 0.0, *(self.interval or (0.0, 1.0)))
        return self


class MeanFlowConfig(Config):
    end_blocks: int | None = Field(None, ge=1)
    """how many of the last blocks read the time where a step ends; null: a third of them, rounded up"""
    target: Literal["identity", "solver"] = "identity"
    """of the average velocity: the MeanFlow identity, or the average over the teacher's own steps on that way"""
    flow_share: float = Field(0.5, ge=0, lt=1)
    """fraction of samples trained on the velocity itself (r = t)"""
    grid_share: float = Field(0.75, ge=0, le=1)
    """fraction of the other samples that end where a step of the sampler ends; the rest are two logit-normal draws"""
    epsilon: float = Field(0.005, gt=0, le=0.1)
    """half the distance in time of the central difference"""
    flow_mean: float = 0.0
    """of the logit-normal times of the velocity's samples"""
    start_mean: float = 0.4
    """of the first logit-normal draw; the later of the two draws is where a step starts"""
    end_mean: float = -1.2
    """of the second one"""
    loss: Literal["log", "squared"] = "log"
    """of a sample's squared error: its logarithm, so that noise levels weigh alike, or itself"""


class FewStepsConfig(TunedConfig):
    method: Literal["meanflow", "reflow"] = "meanflow"
    """meanflow: the average velocity between two times (Decoupled MeanFlow); reflow: straight paths between noise and
    the pictures that the guided noise predictor makes of it"""
    evaluations: tuple[int, ...] = Field((1, 2, 4, 8), min_length=1)
    """how many evaluations of the network a picture may take: the numbers that the stage is made for"""
    default_evaluations: int = Field(4, ge=1)
    """the pipeline's number, one of `evaluations`"""
    guidance: BakedGuidance = BakedGuidance()
    teacher_steps: int | None = Field(None, ge=1)
    """steps of the noise predictor's sampler where its pictures are drawn; null: its own number"""
    meanflow: MeanFlowConfig = MeanFlowConfig()
    adversary: AdversaryConfig = AdversaryConfig()

    @model_validator(mode="after")
    def _numbers_fit(self) -> Self:
        if self.adversary.weight and (self.method != "meanflow" or self.data.max_aspect > 1):
            raise UserError(
                f"adversary.weight {self.adversary.weight:g}: goes with method meanflow and pictures of one shape; 0"
            )
        if any(number < 1 for number in self.evaluations) or len(set(self.evaluations)) < len(self.evaluations):
            raise UserError(f"evaluations {list(self.evaluations)}: expected different whole numbers of at least 1")
        if self.default_evaluations not in self.evaluations:
            raise UserError(
                f"default_evaluations {self.default_evaluations}: expected one of evaluations, {list(self.evaluations)}"
            )
        return self
