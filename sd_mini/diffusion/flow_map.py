"""A flow map: a network that predicts the average velocity between two times, without a parameter more.

Decoupled MeanFlow (Lee et al. 2025, arXiv 2510.24474): the first blocks of a velocity network read the time t that its
latents are at, the last ones the time r where the step ends. With r = t it is the velocity network that it was.
Reference implementation: github.com/kyungmnlee/dmf, models/dmft.py.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models import PRXTransformer2DModel
from torch import Tensor, nn

from sd_mini import cpu
from sd_mini.diffusion.objective import STEPS, unwrapped
from sd_mini.errors import UserError


def default_end_blocks(depth: int) -> int:
    """A third of the blocks, rounded up: the number that reads the end time."""
    return math.ceil(depth / 3)


def check_network(network: nn.Module, end_blocks: int) -> None:
    """Raises UserError for a network whose blocks cannot be given two times, and for more blocks than it has."""
    kind: Any = unwrapped(network)
    if not isinstance(kind, PRXTransformer2DModel) or kind.config.get("resolution_embeds"):
        raise UserError(
            f"meanflow: the blocks of {type(kind).__name__} cannot be given two times here; expected a "
            "PRXTransformer2DModel without resolution_embeds, or use method reflow, which takes any network"
        )
    if not 0 < end_blocks < len(kind.blocks):
        raise UserError(
            f"meanflow: {end_blocks} blocks are to read the end time, and the network has {len(kind.blocks)}; expected "
            f"1 to {len(kind.blocks) - 1}"
        )


def predict_average(
    network: nn.Module,
    latents: Tensor,
    timesteps: Tensor,
    ends: Tensor,
    prompt_embeds: Tensor,
    prompt_mask: Tensor,
    end_blocks: int,
) -> Tensor:
    """Latents (B, C, h, w) at `timesteps` t (B,), and `ends` r (B,), both from 0 to 1000 (the noise) => the average
    velocity u (B, C, h, w) on the way: x_r = x_t - (t - r) u, with times in [0, 1].

    `end_blocks`: how many of the last blocks read r; the final layer reads it too. prompt_embeds (B, L, D), prompt_mask
    (B, L) bool.
    """
    inputs = latents, timesteps / STEPS, prompt_embeds, prompt_mask
    fused = cpu.flow_map(network, *inputs, ends / STEPS, end_blocks)
    if fused is not None:
        return fused
    # diffusers' own forward pass, of a shallow copy whose last modules ignore the time they are given
    plain: Any = unwrapped(network)
    end = plain._compute_timestep_embedding(ends / STEPS, dtype=plain.dtype)
    shallow = copy.copy(plain)
    blocks = [_AtEnd(b, end) if i >= len(plain.blocks) - end_blocks else b for i, b in enumerate(plain.blocks)]
    shallow._modules = {**plain._modules, "blocks": blocks, "final_layer": _FinalAtEnd(plain.final_layer, end)}
    return type(plain).forward(shallow, *inputs[:3], attention_mask=prompt_mask, return_dict=False)[0]


class _AtEnd:
    """A block that reads the embedding of the end time, whatever it is given."""

    def __init__(self, block: Callable[..., Tensor], end: Tensor):
        self.block, self.end = block, end

    def __call__(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        return self.block(hidden_states, encoder_hidden_states, self.end, *args, **kwargs)


class _FinalAtEnd(_AtEnd):
    def __call__(self, hidden_states: Tensor, temb: Tensor) -> Tensor:  # ty: ignore[incompatible-method-override]
        return self.block(hidden_states, self.end)


def mean_flow_target(
    average: Callable[[Tensor, Tensor], Tensor],
    noised: Tensor,
    timesteps: Tensor,
    ends: Tensor,
    velocity: Tensor,
    epsilon: float = 0.005,
) -> Tensor:
    """The MeanFlow identity, Geng et al. 2025 (arXiv 2505.13447), eq. 6: u = v - (t - r) du/dt, with d/dt along the
    flow, d/dt = v dx + dt, at a fixed end r. (B, C, h, w), without a gradient.

    `average`: latents (B, C, h, w) and times (B,) => u to the fixed ends; `noised` x_t at `timesteps` t (B,) in [0, 1],
    `ends` r (B,), `velocity` v (B, C, h, w). The derivative is a central difference over t +- epsilon (TiM, Wang et al.
    2025, arXiv 2509.04394, sec. 3.3), which any attention kernel allows and which costs two forward passes; at
    t = 1, and within epsilon of the end, it is shorter on that side.
    """
    with torch.no_grad():
        later, earlier = (timesteps + epsilon).clamp(max=1), torch.maximum(timesteps - epsilon, ends)
        shape = (-1, *[1] * (noised.ndim - 1))

        def at(times: Tensor) -> Tensor:
            u = average(noised + (times - timesteps).view(shape) * velocity, times)
            return u.to(torch.promote_types(u.dtype, torch.float32))  # of two bfloat16 the difference is noise

        derivative = (at(later) - at(earlier)) / (later - earlier).view(shape)
        return velocity - (timesteps - ends).view(shape) * derivative
