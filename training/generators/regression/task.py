"""A regression: text => latents in one pass, without a draw. What it learns is the mean of all right answers.

accelerate launch -m training.generators.regression --config training/configs/shapes/regression.yaml --run runs/shapes
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sd_mini.data.captioned import CaptionedPictures
from training.engine import launch
from training.generators.one_pass import OnePassConfig, OnePassObjective, OnePassTask


class RegressionObjective(OnePassObjective):
    def forward(
        self,
        latents: Tensor,
        draw: Tensor,
        prompt_embeds: Tensor,
        prompt_mask: Tensor,
        weight: Tensor | None = None,
        **more: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents (b, C, h, w), prompts => squared errors (b,), with the adversarial term where there is one. The
        network takes zeros for the draw."""
        prompt = prompt_embeds, prompt_mask
        drawn = self.network(draw, *prompt)
        errors = (drawn - latents).square().mean((1, 2, 3))
        losses, metrics = self.with_adversary(errors, latents, drawn, prompt, weight)
        return losses, metrics | ({"error": errors.mean()} if metrics else {})


class RegressionTask(OnePassTask):
    family = "regression"

    def make_objective(self, network: Any, pictures: CaptionedPictures) -> RegressionObjective:
        return RegressionObjective(network, self.adversary.discriminator)


main = launch.Program(OnePassConfig, "regression", lambda launched: RegressionTask(launched.config, launched.run))
