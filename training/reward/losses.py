"""What a picture's reward teaches: forward-process policy optimisation (DiffusionNFT), or rejection fine-tuning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sd_mini import noise_predictor
from sd_mini.diffusion.objective import Process
from training.engine.learner import Others
from training.noise_predictor.losses import answer_and_target, log_losses
from training.reward.config import RewardConfig


# Zheng et al. 2025 (DiffusionNFT, arXiv 2509.16117), eq. 6 to 8
def nft_losses(answer: Tensor, old: Tensor, clean: Any, latents: Tensor, optimality: Tensor, beta: float) -> Tensor:
    """Predictions of the policy and of the old one (b, C, h, w), `clean`: a prediction => clean latents, the latents
    that were drawn, and how good they are, (b,) in [0, 1] => losses (b,).

    The policy is the positive one of two that lie beta to either side of the old: good pictures draw that one near,
    bad ones the other. Each squared error is divided by the mean absolute error, as in the reference implementation.
    """
    losses = []
    for sign in (1, -1):
        error = clean(old + sign * beta * (answer - old)) - latents
        scale = error.detach().abs().mean((1, 2, 3)).clamp(min=1e-5)
        losses.append(error.square().mean((1, 2, 3)) / scale)
    return optimality * losses[0] + (1 - optimality) * losses[1]


class RewardObjective(nn.Module):
    """The network with its loss. `old`: the policy that a round's pictures were drawn by, part of every checkpoint;
    `start`: the network that training began with."""

    def __init__(self, network: nn.Module, old: nn.Module, start: nn.Module, process: Process, config: RewardConfig):
        super().__init__()
        self.network, self.old = network, old.requires_grad_(False).eval()
        self.others, self.process, self.config = Others([start.requires_grad_(False).eval()]), process, config

    def forward(
        self,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        prompt_embeds: Tensor,
        prompt_mask: Tensor,
        optimality: Tensor,
        means: Tensor,
        **real: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`optimality` (b,) in [0, 1]; `means` (b, rewards), the round's, to be logged; `real`: rows of real pictures
        by the same names. => losses (b,), and means to log."""
        config, process = self.config, self.process
        condition = prompt_embeds, prompt_mask
        noised = process.noised(latents, noise, timesteps)

        def predicted(network: nn.Module) -> Tensor:
            output = noise_predictor.predict(network, noised, process.scaled(timesteps), *condition)
            return process.answer(output, noised, timesteps)

        answer = predicted(self.network)
        if config.method == "nft":
            with torch.no_grad():
                old = predicted(self.old)

            def clean(prediction: Tensor) -> Tensor:
                return process.clean(prediction, noised, timesteps)

            losses = nft_losses(answer, old, clean, latents, optimality, config.beta)
        else:
            target = process.target(latents, noise, noised, timesteps)
            losses = log_losses((answer - target).square().mean((1, 2, 3)))
        metrics = {f"reward/{name}": means[:, i].mean() for i, name in enumerate(config.rewards)}
        if config.anchor:
            with torch.no_grad():
                start = predicted(self.others[0])
            distance = (answer - start).square().mean((1, 2, 3))
            losses, metrics["anchor"] = losses + config.anchor * distance, distance.mean()
        if config.real:
            own = answer_and_target(self.network, process, **{k.removeprefix("real_"): v for k, v in real.items()})
            errors = (own[0] - own[1]).square().mean((1, 2, 3))
            losses, metrics["real"] = losses + config.real * log_losses(errors), errors.mean()
        return losses, metrics
