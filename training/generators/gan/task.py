"""A GAN in latent space: text and a draw => latents in one pass, against a discriminator that reads both.

accelerate launch -m training.generators.gan --config training/configs/shapes/gan.yaml --run runs/shapes
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor

from sd_mini.data.captioned import CaptionedPictures
from sd_mini.generators.one_pass import OnePassGenerator
from training.engine import launch
from training.generators.adversary import AdversaryConfig
from training.generators.one_pass import OnePassConfig, OnePassObjective, OnePassTask


class GanAdversaryConfig(AdversaryConfig):
    weight: float = Field(1.0, gt=0)
    """of the adversarial term; there is no other"""


class GanConfig(OnePassConfig):
    adversary: GanAdversaryConfig = GanAdversaryConfig()


class GanObjective(OnePassObjective):
    def forward(
        self, latents: Tensor, draw: Tensor, prompt_embeds: Tensor, prompt_mask: Tensor, **more: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents and draws (b, C, h, w), prompts => adversarial losses (b,)."""
        drawn = self.network(draw, prompt_embeds, prompt_mask)
        losses, _ = self.with_adversary(latents.new_zeros(len(latents)), latents, drawn, prompt_embeds, prompt_mask)
        return losses, {}


class GanTask(OnePassTask):
    family = "gan"

    def make_objective(self, network: Any, pictures: CaptionedPictures) -> GanObjective:
        assert isinstance(network, OnePassGenerator)
        return GanObjective(network, self.make_discriminator(), self.config.adversary.weight)


main = launch.Program(GanConfig, "gan", lambda launched: GanTask(launched.config, launched.run))
