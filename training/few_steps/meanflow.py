"""Decoupled MeanFlow: the exported velocity network is trained to predict average velocities, guidance included.

Lee et al. 2025 (arXiv 2510.24474); the identity is Geng et al. 2025's (arXiv 2505.13447). The velocity on the way is
the frozen, guided teacher's. Reference implementation: github.com/kyungmnlee/dmf, loss.py (there with a Jacobian-vector
product and a learnt variance).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from sd_mini import diffusion
from sd_mini.diffusion.flow_map import mean_flow_target, predict_average
from sd_mini.diffusion.objective import STEPS
from sd_mini.noise_predictor import predict
from sd_mini.sampling.loop import Guidance
from training.engine.learner import Others
from training.few_steps.config import MeanFlowConfig
from training.generators.adversary import Discriminator, with_adversary
from training.noise_predictor.losses import log_losses


class MeanFlowObjective(nn.Module):
    """The network with its loss. `teacher`: the frozen start, which is sampled in `teacher_steps`; `null`: the null
    condition (1, L, D) and (1, L); `end_blocks`: how many of the last blocks read the end time."""

    def __init__(
        self,
        network: nn.Module,
        teacher: nn.Module,
        null: tuple[Tensor, Tensor],
        guidance: Guidance,
        config: MeanFlowConfig,
        end_blocks: int,
        teacher_steps: int,
        discriminator: Discriminator | None = None,
    ):
        super().__init__()
        self.discriminator = Others([] if discriminator is None else [discriminator])
        self.teacher_steps = teacher_steps
        self.network, self.config, self.guidance, self.end_blocks = network, config, guidance, end_blocks
        self.others, self.null = Others([teacher]), null

    def forward(
        self,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        ends: Tensor,
        prompt_embeds: Tensor,
        prompt_mask: Tensor,
        weight: Tensor | None = None,
        **more: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents and noise (b, C, h, w), times t >= r (b,) in [0, 1], prompts => losses (b,), and squared errors of
        the velocity (r = t) and of the average velocity to log; with a `weight` the adversarial term of what one
        evaluation draws, too."""
        noised = diffusion.flow_noise(latents, noise, timesteps)
        is_step = ends < timesteps

        # Targets, without a gradient; the identity's in float32, as a difference of two bfloat16 outputs is noise.
        is_exact = self.config.target == "identity"
        with torch.no_grad(), torch.autocast(latents.device.type, enabled=False) if is_exact else nullcontext():
            target = self._velocity(noised, timesteps, prompt_embeds, prompt_mask)
            rows = is_step.nonzero()[:, 0]
            if len(rows):
                target[rows] = self._step_target(
                    noised[rows], timesteps[rows], ends[rows], target[rows], prompt_embeds[rows], prompt_mask[rows]
                )

        # One call for both kinds of samples: those with r = t learn the velocity itself.
        answer = self._average(noised, timesteps, ends, prompt_embeds, prompt_mask)
        errors = (answer.float() - target).square().mean((1, 2, 3))
        losses = log_losses(errors + ERROR_FLOOR) if self.config.loss == "log" else errors
        share = {"flow": ~is_step, "average": is_step}
        logged = {name: (errors * rows).sum() / rows.sum().clamp(min=1) for name, rows in share.items()}
        if weight is None or not self.discriminator:
            return losses, logged
        prompt = prompt_embeds, prompt_mask
        drawn = OneEvaluation(self.network, self.end_blocks)(noise, *prompt)
        losses, adversarial = with_adversary(self.discriminator[0], losses, latents, drawn, prompt, weight)
        return losses, logged | adversarial

    def _step_target(self, x: Tensor, t: Tensor, r: Tensor, velocity: Tensor, embeds: Tensor, mask: Tensor) -> Tensor:
        """What the average velocity from t down to r is compared with."""
        if self.config.target == "identity":
            return mean_flow_target(
                lambda x, t: self._average(x, t, r, embeds, mask), x, t, r, velocity, self.config.epsilon
            )
        return solver_target(
            lambda x, t, rows: self._velocity(x, t, embeds[rows], mask[rows]), x, t, r, velocity, self.teacher_steps
        )

    def _average(self, x: Tensor, t: Tensor, r: Tensor, embeds: Tensor, mask: Tensor) -> Tensor:
        return predict_average(self.network, x, t * STEPS, r * STEPS, embeds, mask, self.end_blocks)

    def _velocity(self, x: Tensor, t: Tensor, embeds: Tensor, mask: Tensor) -> Tensor:
        return guided_velocity(self.others[0], self.guidance, x, t, (embeds, mask), self.null)


class OneEvaluation(nn.Module):
    """Noise (b, C, h, w) and prompts => latents, by the average velocity all the way from t = 1 to 0."""

    def __init__(self, network: nn.Module, end_blocks: int):
        super().__init__()
        self.network, self.end_blocks = network, end_blocks

    def forward(self, noise: Tensor, embeds: Tensor, mask: Tensor) -> Tensor:
        start = noise.new_full((len(noise),), STEPS)
        average = predict_average(self.network, noise, start, torch.zeros_like(start), embeds, mask, self.end_blocks)
        return noise - average.float()


ERROR_FLOOR = 1e-3  # below it, a smaller error is worth no more
WHOLE_FROM = 0.75  # the fraction of the steps of the sampler that are trained in part


def guided_velocity(
    network: nn.Module,
    guidance: Guidance,
    noised: Tensor,
    timesteps: Tensor,
    prompt: tuple[Tensor, Tensor],
    null: tuple[Tensor, Tensor],
) -> Tensor:
    """Latents (b, C, h, w) at times (b,) in [0, 1] => the velocity, guided where the time is within the interval;
    prompt (b, L, D), (b, L); null (1, L, D), (1, L)."""
    conditional = predict(network, noised, timesteps * STEPS, *prompt)
    active = torch.tensor([guidance.is_active(t) for t in timesteps.tolist()], device=noised.device)
    rows = active.nonzero()[:, 0]
    if len(rows):
        nothing = (part.to(noised.device).expand(len(rows), *part.shape[1:]) for part in null)
        unconditional = predict(network, noised[rows], timesteps[rows] * STEPS, *nothing)
        conditional = conditional.index_put((rows,), guidance.combine(conditional[rows], unconditional))
    return conditional.float()


def solver_target(
    velocity: Callable[[Tensor, Tensor, Tensor], Tensor],
    noised: Tensor,
    timesteps: Tensor,
    ends: Tensor,
    first: Tensor,
    steps: int,
) -> Tensor:
    """The average velocity (b, C, h, w) of the teacher's own Euler steps from t down to r, 1 / `steps` long at most.

    `velocity`: latents, times and row numbers => v; `first`: v at `noised` and `timesteps` t (b,). The target is exact
    from the first update on, where the identity's is so once the network is right: fewer updates, each dearer.
    """
    counts = ((timesteps - ends) * steps - 1e-4).ceil().clamp(min=1)
    length = (timesteps - ends) / counts
    x = noised - diffusion.per_sample(length, noised) * first
    for i in range(1, int(counts.max())):
        rows = (counts > i).nonzero()[:, 0]
        v = velocity(x[rows], (timesteps - i * length)[rows], rows)
        x = x.index_add(0, rows, -diffusion.per_sample(length[rows], v) * v)
    return (noised - x) / diffusion.per_sample(timesteps - ends, noised)


# logit-normal times, Esser et al. 2024, eq. 19; of two draws the later is the start: Lee et al. 2025, sec. 3.3
def two_times(kind: Tensor, first: Tensor, second: Tensor, config: MeanFlowConfig, steps: Sequence[int]) -> Tensor:
    """Three U[0, 1) draws (b,) => (2, b): where each sample's step starts and where it ends, t >= r, in [0, 1].

    `kind` chooses between the velocity (r = t), a step of the sampler with one of `steps` evaluations, or its last part
    (the identity ties each start to the next one, so starts between have to be trained), and two logit-normal draws.
    """

    def logit_normal(uniform: Tensor, mean: float) -> Tensor:
        return torch.sigmoid(torch.special.ndtri(uniform.double().clamp(1e-6, 1 - 1e-6)) + mean).float()

    # the sampler's steps: their number n by `first`, which of them by `second`, and how much of it by its remainder
    counts = torch.tensor(steps, dtype=torch.float32)[(first * len(steps)).long()]
    places = (second * counts).floor()
    part = ((second * counts - places) / WHOLE_FROM).clamp(max=1) if config.target == "identity" else 1.0
    ends = 1 - (places + 1) / counts
    on_grid = torch.stack([ends + part / counts, ends])
    draws = torch.stack([logit_normal(first, config.start_mean), logit_normal(second, config.end_mean)])
    anywhere = torch.stack([draws.amax(0), draws.amin(0)])
    flow = logit_normal(first, config.flow_mean).expand(2, -1)
    steps_share = 1 - config.flow_share
    is_flow, is_on_grid = kind < config.flow_share, kind < config.flow_share + steps_share * config.grid_share
    return torch.where(is_flow, flow, torch.where(is_on_grid, on_grid, anywhere))
