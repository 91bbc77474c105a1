"""A stage that trains a generator of another family than the noise predictor: what all of them share."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sd_mini.data import cache
from sd_mini.diffusion.objective import Process
from sd_mini.errors import UserError
from sd_mini.generators.base import LatentGenerator
from sd_mini.stages.contract import GENERATOR
from training.engine.flops import count_flops
from training.noise_predictor.config import EncodedConfig
from training.noise_predictor.task import EncodedTask


class GeneratorConfig(EncodedConfig):
    """Of each family: data, encoded by stages 1 and 2, and the training."""

    guidance: float = Field(1.0, ge=0)
    """the pipeline's guidance scale, used by the previews too; 1 is none"""
    caption_dropout: float = Field(0.1, ge=0, le=1)
    """fraction of samples trained on the null condition; of a family without guidance 0 serves best"""

    @model_validator(mode="after")
    def _squares(self) -> Self:
        if self.data.max_aspect > 1:
            raise UserError(
                f"data.max_aspect {self.data.max_aspect:g}: a generator of this family draws one shape of latents; "
                "expected 1"
            )
        return self


class GeneratorTask(EncodedTask):
    """A subclass brings `family`, `make_network` (a `LatentGenerator`), `make_objective`, `inputs` and `validate`."""

    family: str
    process = Process(kind="flow")  # not used: nothing is denoised
    kind, part = GENERATOR, "latent_generator"

    @abstractmethod
    def make_network(self) -> LatentGenerator: ...

    def rows(self, batch: Any) -> dict[str, Tensor]:
        """A batch's latents (b, C, h, w), prompt_embeds (b, L, D) and prompt_mask (b, L), some prompts dropped."""
        rows = self.train.take(batch.own_ids, batch.uniform("caption").tolist())
        return self.without_prompts(rows, batch.uniform("dropout") < self.config.caption_dropout)

    def facts(self) -> dict[str, Any]:
        return {
            "family": self.family,
            "sampling": {"resolution": self.config.data.resolution, "default_guidance": self.config.guidance},
        }

    def announce(self, objective: Any, inputs: dict[str, Tensor]) -> None:
        """One line on the cost before the training begins; `inputs`: the objective's, of one picture."""
        trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        count, flops = sum(p.numel() for p in trained.values()), count_flops(objective, trained, inputs)
        cache.message(f"{self.family}: {count / 1e6:.3g} M parameters, {flops / 1e6:,.0f} MFLOPs a picture and update")

    def one_picture(self) -> dict[str, Tensor]:
        """Zeros in the shapes of a picture's latents and prompt, to count with."""
        return {
            "latents": torch.zeros(1, *self.latent_shape),
            "prompt_embeds": torch.zeros(1, self.length, self.dim),
            "prompt_mask": torch.ones(1, self.length, dtype=torch.bool),
        }
