"""What the user decides about training by rewards."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from sd_mini.config import Config
from sd_mini.errors import UserError
from sd_mini.lora import LoraConfig
from sd_mini.sampling.loop import Guidance
from sd_mini.shapes import KINDS
from training.noise_predictor.config import TunedConfig

JUDGE, MATCHER, NOVELTY = "judge", "matcher", "novelty"
_WITH_A_NAME = ("clip:", "module:")


def check_reward(name: str) -> None:
    """Raises UserError for a name that is no reward's."""
    if name not in (JUDGE, MATCHER, NOVELTY) and not any(
        name.startswith(kind) and name != kind for kind in _WITH_A_NAME
    ):
        raise UserError(
            f"reward {name!r}: expected judge, matcher, novelty, clip:ARCHITECTURE=FILE or "
            "module:PACKAGE.MODULE:FUNCTION"
        )


class RolloutConfig(Config):
    """The pictures of a round, drawn by the policy as it was when the round began."""

    prompts: int = Field(48, ge=1)
    """captions of the training data a round"""
    each: int = Field(8, ge=2)
    """pictures of each caption, which are compared with each other"""
    batch: int = Field(8, ge=1)
    """captions whose pictures are drawn at a time, by one process"""
    steps: int | None = Field(None, ge=1)
    """sampling steps; null: the noise predictor's own default"""
    guidance: float = Field(1.0, ge=0)
    """guidance scale; 1, none, is cheapest, and what is learnt holds under guidance too"""
    interval: tuple[float, float] = (0.0, 1.0)
    """noise levels between which steps are guided"""
    sampler: str | None = None
    """as sampling.sampler; null: the noise predictor's own"""
    kinds: tuple[str, ...] = ()
    """of shapes: the kinds of scenes that are asked for, in equal parts; none: as they come"""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        Guidance(self.guidance, 0.0, *self.interval)  # raises UserError for values out of range
        for kind in self.kinds:
            if kind not in KINDS:
                raise UserError(f"rollouts.kinds {kind!r}: expected some of {', '.join(KINDS)}")
        if self.kinds and self.prompts % len(self.kinds):
            raise UserError(f"rollouts.prompts {self.prompts}: expected a multiple of {len(self.kinds)}, as kinds has")
        return self


class GuardConfig(Config):
    """What is looked at beside the reward, on prompts that are not trained on."""

    every: int = Field(10, ge=1)
    """rounds between two looks"""
    prompts: int = Field(32, ge=2, le=32)
    """held-out captions, 8 pictures of each"""
    judge: str | None = None
    """a second reward that is not trained for; null: none"""
    diversity: float = Field(0.85, ge=0)
    """the least diversity within a prompt, and of layouts, as a share of the data's, of weights that may be kept"""
    features: str = "mini"
    """the network that diversity and the Frechet distance are measured by"""


class RewardConfig(TunedConfig):
    method: Literal["nft", "rejection"] = "nft"
    """nft: forward-process policy optimisation (DiffusionNFT); rejection: train on what scores, no more"""
    rewards: dict[str, float] = Field(default_factory=lambda: {JUDGE: 1.0})
    """weights by name: judge (shapes), matcher, novelty, clip:ARCHITECTURE=FILE, module:PACKAGE.MODULE:FUNCTION"""
    rollouts: RolloutConfig = RolloutConfig()
    guards: GuardConfig = GuardConfig()
    passes: int = Field(2, ge=1)
    """how often each picture of a round is trained on; rounds are train.steps over the updates of one"""
    beta: float = Field(1.0, gt=0)
    """nft: how far the implicit policies lie from the old one (DiffusionNFT, eq. 7)"""
    anchor: float = Field(0.3, ge=0)
    """weight of the squared distance of the prediction from the start's: the KL divergence to where it began"""
    real: float = Field(0.0, ge=0)
    """weight of stage 3's own loss on real pictures beside it"""
    follow: float = Field(0.02, ge=0)
    """nft: the old policy's decay, of round r min(follow * r, follow_most): how slowly it follows"""
    follow_most: float = Field(0.8, ge=0, lt=1)
    guidance: float | None = Field(None, ge=0)
    """guidance scale of the exported noise predictor, and of the guards' pictures; null: the start's. Trained by
    rewards it needs less, and less leaves more diversity"""
    lora: LoraConfig = LoraConfig()
    """rank 0 trains all weights"""

    @field_validator("rewards")
    @classmethod
    def _named(cls, rewards: dict[str, float]) -> dict[str, float]:
        for name in rewards:
            check_reward(name)
        if not any(weight for name, weight in rewards.items() if name != NOVELTY):
            raise UserError("rewards: expected at least one beside novelty with a weight, such as judge: 1")
        return rewards

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        guard = self.guards.judge
        if guard is not None:
            check_reward(guard)
            if guard == NOVELTY:
                raise UserError("guards.judge novelty: compares pictures with each other; give one that scores each")
            if guard in self.rewards:
                raise UserError(f"guards.judge {guard}: is trained for, so it cannot be the guard; give another one")
        if self.pictures * self.passes % self.train.batch_size:
            raise UserError(
                f"train.batch_size {self.train.batch_size}: expected a divisor of a round's {self.pictures} pictures "
                f"times {self.passes} passes"
            )
        if self.train.workers:
            raise UserError(f"train.workers {self.train.workers}: rounds are drawn by the network in training; 0")
        if self.evaluate.every is not None:
            raise UserError(f"evaluate.every {self.evaluate.every}: here the guards look; set guards.every, in rounds")
        return self

    @property
    def pictures(self) -> int:
        """Of a round."""
        return self.rollouts.prompts * self.rollouts.each

    @property
    def updates(self) -> int:
        """Of a round."""
        return self.pictures * self.passes // self.train.batch_size
