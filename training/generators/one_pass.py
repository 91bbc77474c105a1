"""What the families share that draw in one pass: gan, vae and regression."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from sd_mini.config import Config
from sd_mini.cpu import accelerate
from sd_mini.data.batches import Batch, generator
from sd_mini.errors import UserError
from sd_mini.generators.one_pass import OnePassGenerator
from sd_mini.processes import process_device
from training.engine.learner import Others, Player
from training.generators.adversary import AdversaryConfig, Discriminator, DiscriminatorObjective, adversarial_losses
from training.generators.task import GeneratorConfig, GeneratorTask


class OnePassNetwork(Config):
    kind: str = "prx"
    """which diffusers network, as of stage 3; called once, with the draw in the place of noised latents"""
    network: dict[str, Any] = Field(
        default_factory=lambda: {"patch_size": 2, "hidden_size": 128, "num_heads": 4, "depth": 4, "mlp_ratio": 3.0}
    )
    """fields of that class"""


class OnePassConfig(GeneratorConfig):
    caption_dropout: float = Field(0.0, ge=0, le=1)
    """fraction of samples trained on the null condition"""
    network: OnePassNetwork = OnePassNetwork()
    adversary: AdversaryConfig = AdversaryConfig()

    @model_validator(mode="after")
    def _unguided(self) -> Self:
        if self.guidance != 1:
            raise UserError(f"guidance {self.guidance:g}: a generator of one pass draws without; leave it out (1)")
        return self


class OnePassObjective(nn.Module):
    """The generator, and the discriminator that it is trained against or none. A subclass brings the losses."""

    def __init__(self, network: OnePassGenerator, discriminator: Discriminator | None, weight: float):
        super().__init__()
        self.network, self.weight = network, weight
        self.others = Others([] if discriminator is None else [discriminator])

    @property
    def discriminator(self) -> Discriminator | None:
        return self.others[0] if self.others else None

    def with_adversary(self, losses: Tensor, latents: Tensor, drawn: Tensor, *prompt: Tensor) -> Any:
        """Losses (b,) of the other terms => with the adversarial one, and it to log, where there is a discriminator."""
        if self.discriminator is None:
            return losses, {}
        adversarial = adversarial_losses(self.discriminator, latents, drawn, *prompt)
        return losses + self.weight * adversarial, {"adversarial": adversarial.mean()}


class OnePassTask(GeneratorTask):
    """A subclass brings `family` and the objective, and further held-out scores if it has some."""

    def make_network(self) -> OnePassGenerator:
        config = self.config.network
        network = OnePassGenerator(self.family, self.latent_shape, self.dim, config.kind, config.network)
        on_cpu(network.body)
        return network

    def make_players(self, objective: Any) -> dict[str, Player]:
        draws = {name: torch.zeros(1, *self.latent_shape) for name in self.draw_names}
        self.announce(objective, self.one_picture() | draws)
        players = super().make_players(objective)
        if objective.discriminator is not None:
            config = self.config.adversary
            adversary = DiscriminatorObjective(objective.discriminator, objective.network, config)
            players["discriminator"] = Player(adversary, config)
        return players

    def make_discriminator(self) -> Discriminator | None:
        """The one that the generator is trained against, of a weight above 0."""
        config = self.config.adversary
        if not config.weight:
            return None
        discriminator = Discriminator(self.latent_shape, self.dim, config.network)
        on_cpu(discriminator.network)
        return discriminator.to(process_device())

    @property
    def draw_names(self) -> tuple[str, ...]:
        """Of the normal draws of a batch, each of the latents' shape."""
        return ("draw", "direction", "false_direction") if self.config.adversary.weight else ("draw",)

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        rows = self.rows(batch) | {name: batch.normal(name, *self.latent_shape) for name in self.draw_names}
        if self.config.adversary.weight and self.config.adversary.mismatched:
            others = (batch.uniform("other").numpy() * self.count).astype(np.int64)
            prompts = self.train.take(others, [0.0] * len(others))
            rows |= {"other_embeds": prompts["prompt_embeds"], "other_mask": prompts["prompt_mask"]}
        return rows

    def validate(self, objective: Any, rows: slice) -> dict[str, np.ndarray]:
        """Scores of the held-out samples, each with its own two draws, the same at every step: `energy`, and those that
        the objective's `held_out` adds."""
        device, found = next(objective.parameters()).device, []
        for part in map(np.asarray, self.valid_pictures.runs(rows, 256)):
            inputs = {name: value.to(device) for name, value in self.valid.take(part, [0.0] * len(part)).items()}
            latents, prompt = inputs["latents"], (inputs["prompt_embeds"], inputs["prompt_mask"])
            draws = [
                torch.stack([torch.randn(*self.latent_shape, generator=generator(0, int(i), name)) for i in part])
                for name in ("first", "second")
            ]
            first, second = (self.sampled(objective, draw.to(device), prompt) for draw in draws)
            scores = {"energy": energy_scores(latents, first, second)}
            found.append(scores | self.held_out(objective, latents, draws[0].to(device), prompt))
        return {name: torch.cat([part[name] for part in found]).cpu().numpy() for name in found[0]}

    def sampled(self, objective: Any, draw: Tensor, prompt: tuple[Tensor, Tensor]) -> Tensor:
        """Draws (b, C, h, w) => latents."""
        return objective.network(draw, *prompt)

    def held_out(self, objective: Any, latents: Tensor, draw: Tensor, prompt: Any) -> dict[str, Tensor]:
        """Further scores (b,) by name: none here."""
        return {}


# Gneiting & Raftery 2007, eq. 22: a proper score of draws against a sample, for any family; lower is better
def energy_scores(latents: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Real latents and two draws of the same prompts, (b, C, h, w) each => (b,): E|x - y| - E|y - y'| / 2, by root mean
    square distances."""

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().mean((1, 2, 3)).sqrt()

    return (distance(latents, first) + distance(latents, second) - distance(first, second)) / 2


def on_cpu(network: Any) -> None:
    if process_device().type == "cpu":
        accelerate(network)  # or not: a network without CPU kernels is trained as it is
