"""A GAN in latent space: text and a draw => latents in one pass, against a discriminator that reads both.

accelerate launch -m training.generators.gan --config training/configs/shapes/gan.yaml --run runs/shapes
"""

from __future__ import annotations

from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sd_mini.data.captioned import CaptionedPictures
from sd_mini.errors import UserError
from sd_mini.generators.one_pass import OnePassGenerator
from training.engine import launch
from training.generators.adversary import AdversaryConfig
from training.generators.one_pass import OnePassConfig, OnePassObjective, OnePassTask, energy_scores

# in cells, of the squares that the energy score compares, where they divide a picture; None: all of it
SIDES = 2, 4, None


class GanAdversaryConfig(AdversaryConfig):
    weight: float = Field(1.0, gt=0)
    """of the adversarial term"""


class GanConfig(OnePassConfig):
    adversary: GanAdversaryConfig = GanAdversaryConfig()
    energy: float = Field(0.0, ge=0)
    """weight of the energy score of two draws, the mean over squares of 2 and 4 cells and the whole: by it a generator
    learns what stands where from the first update on"""

    @model_validator(mode="after")
    def _always_a_loss(self) -> Self:
        if not self.energy and self.adversary.start:
            raise UserError(
                f"adversary.start {self.adversary.start}: until then there is no loss; give energy above 0, or start 0"
            )
        return self


class GanObjective(OnePassObjective):
    """Adversarial losses, and by `energy` above 0 the energy score beside them (as of Bellemare et al. 2017, the Cramer
    GAN, whose distance is taken in latent space here)."""

    def __init__(self, energy: float, *parts: Any):
        super().__init__(*parts)
        self.energy = energy

    def forward(
        self,
        latents: Tensor,
        draw: Tensor,
        prompt_embeds: Tensor,
        prompt_mask: Tensor,
        second_draw: Tensor | None = None,
        weight: Tensor | None = None,
        **more: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents and draws (b, C, h, w), with `energy` two of each prompt, and prompts => losses (b,)."""
        prompt, metrics = (prompt_embeds, prompt_mask), {}
        if second_draw is None:
            drawn, losses = self.network(draw, *prompt), latents.new_zeros(len(latents))
        else:
            twice = (part.repeat(2, *[1] * (part.dim() - 1)) for part in prompt)
            drawn, second = self.network(torch.cat([draw, second_draw]), *twice).float().chunk(2)
            sides = [one for one in SIDES if one is None or not any(side % one for side in latents.shape[2:])]
            scores = torch.stack([energy_scores(latents, drawn, second, side) for side in sides]).mean(0)
            losses, metrics = self.energy * scores, {"energy": scores.mean()}
        losses, adversarial = self.with_adversary(losses, latents, drawn, prompt, weight)
        return losses, metrics | adversarial


class GanTask(OnePassTask):
    family = "gan"

    def make_objective(self, network: Any, pictures: CaptionedPictures) -> GanObjective:
        assert isinstance(network, OnePassGenerator)
        return GanObjective(self.config.energy, network, self.adversary.discriminator)

    @property
    def draw_names(self) -> tuple[str, ...]:
        return ("draw", "second_draw") if self.config.energy else ("draw",)


main = launch.Program(GanConfig, "gan", lambda launched: GanTask(launched.config, launched.run))
