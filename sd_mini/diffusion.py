"""The forward process, its targets and time sampling: pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor


# x_t = (1 - t) x_0 + t eps: the linear path of rectified flow. Liu et al. 2023, eq. 1; Lipman et al. 2023, eq. 22
def flow_noise(latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """latents, noise (B, C, h, w), timesteps (B,) in [0, 1] => noised latents; t 0 is the picture, 1 the noise."""
    t = _per_sample(timesteps, latents)
    return (1 - t) * latents + t * noise


# d x_t / d t = eps - x_0
def flow_target(latents: Tensor, noise: Tensor) -> Tensor:
    """The velocity that the network learns, (B, C, h, w)."""
    return noise - latents


# immiscible diffusion in its cheap form, the nearest of k draws for each sample: Li et al. 2024
def nearest_noise(latents: Tensor, draws: Tensor) -> Tensor:
    """latents (B, C, h, w), draws (B, k, C, h, w) => of each sample's k draws the one nearest to it, (B, C, h, w).

    Pictures and noise are then less mixed up, so the velocity at a point is less of an average. Of d dimensions the
    noise is still close to N(0, I): for k 4 its variance is 1 - 0.84 / sqrt(d).
    """
    distance = (draws - latents[:, None]).square().flatten(2).sum(2)
    return draws[torch.arange(len(draws)), distance.argmin(1)]


# 1 - cos of the angle between two velocities: Yao et al. 2024 ("FasterDiT"), eq. 7
def direction_losses(velocity: Tensor, target: Tensor) -> Tensor:
    """(B, C, h, w) each => (B,), from 0 (the same direction) to 2."""
    return 1 - torch.nn.functional.cosine_similarity(velocity.flatten(1), target.flatten(1))


# logit-normal time sampling, Esser et al. 2024, eq. 19, mixed with a share of uniform so that no t is left untrained
def sample_timesteps(normal: Tensor, uniform: Tensor, uniform_share: float, shift: float = 1.0) -> Tensor:
    """`normal`, `uniform` (B,): independent draws N(0, 1) and U(0, 1) => timesteps (B,) in (0, 1).

    The uniform draw decides both whether a sample is uniform and, rescaled, its value. `shift` > 1 moves weight towards
    the noisy end for larger latents: t' = s t / (1 + (s - 1) t), Esser et al. 2024, eq. 23.
    """
    if uniform_share >= 1:
        timesteps = uniform
    else:
        is_uniform = uniform < uniform_share
        timesteps = torch.where(is_uniform, uniform / max(uniform_share, 1e-12), torch.sigmoid(normal))
    return shift * timesteps / (1 + (shift - 1) * timesteps)


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))
