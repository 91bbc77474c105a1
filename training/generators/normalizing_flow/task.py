r"""The family `normalizing_flow`: an exact likelihood of the latents, given the prompt.

accelerate launch -m training.generators.normalizing_flow \
  --config training/configs/shapes/normalizing_flow.yaml --run RUN
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sd_mini.data.batches import Batch, generator
from sd_mini.data.captioned import CaptionedPictures
from sd_mini.generators.normalizing_flow import NormalizingFlow
from training.engine import launch
from training.generators.normalizing_flow.config import FlowConfig
from training.generators.normalizing_flow.losses import FlowObjective
from training.generators.task import GeneratorTask


class FlowTask(GeneratorTask):
    family = "normalizing_flow"

    def make_network(self) -> NormalizingFlow:
        fields = self.config.network.model_dump() | self.config.sampling.model_dump()
        return NormalizingFlow(self.latent_shape, self.dim, noise_std=self.config.noise_std, **fields)

    def make_objective(self, network: nn.Module, pictures: CaptionedPictures) -> FlowObjective:
        assert isinstance(network, NormalizingFlow)
        objective = FlowObjective(network, self.config.noise_std)
        one = self.one_picture()
        self.announce(objective, {**one, "noise": one["latents"]})
        return objective

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """A batch's latents and noise (b, C, h, w), prompt_embeds (b, L, D) and prompt_mask (b, L)."""
        return {**self.rows(batch), "noise": batch.normal("noise", *self.latent_shape, device=self.device)}

    def validate(self, objective: FlowObjective, rows: slice) -> dict[str, np.ndarray]:
        """Of each held-out picture given its first caption, with fixed noise on its latents: nats and bits a value."""
        losses, device = [], next(objective.parameters()).device
        for part in map(np.asarray, self.valid_pictures.runs(rows, 256)):
            inputs = self.valid.take(part, [0.0] * len(part))
            fixed = [torch.randn(self.latent_shape, generator=generator(0, int(i), "validation")) for i in part]
            inputs["noise"] = torch.stack(fixed)
            with torch.no_grad():
                losses.append(objective(**{name: value.to(device) for name, value in inputs.items()})[0].cpu())
        nats = torch.cat(losses).double().numpy()
        return {"loss": nats, "bits_per_dimension": nats / math.log(2)}

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "noise_std": self.config.noise_std}


main = launch.Program(FlowConfig, "normalizing_flow", lambda launched: FlowTask(launched.config, launched.run))
