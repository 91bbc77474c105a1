"""Reflow: flow matching between each noise and the very picture that the guided noise predictor makes of it.

Liu et al. 2023 ("Flow Straight and Fast", arXiv 2209.03003), sec. 2.2: the paths of such pairs cross less, so that few
steps follow them. The cheap alternative, for any network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sd_mini import diffusion
from sd_mini.data import cache
from sd_mini.data.batches import Rows, generator
from sd_mini.diffusion.objective import STEPS
from sd_mini.noise_predictor import predict


class ReflowObjective(nn.Module):
    """The network with its loss, the squared error of the velocity."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(
        self, latents: Tensor, noise: Tensor, timesteps: Tensor, prompt_embeds: Tensor, prompt_mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A pair's latents and noise (b, C, h, w), times (b,) in [0, 1], prompts => losses (b,)."""
        noised = diffusion.flow_noise(latents, noise, timesteps)
        answer = predict(self.network, noised, timesteps * STEPS, prompt_embeds, prompt_mask)
        return (answer - diffusion.flow_target(latents, noise)).square().mean((1, 2, 3)), {}


def pair_noise(seed: int, ids: Sequence[int] | np.ndarray, shape: Sequence[int]) -> Tensor:
    """(b, C, h, w): each sample's own noise, a function of the seed and its number."""
    return torch.stack([torch.randn(*shape, generator=generator(seed, int(i), "reflow")) for i in ids])


def cached_pairs(
    draw: Callable[[np.ndarray], Tensor], count: int, key: Mapping[str, object], folder: Path, dtype: str, title: str
) -> Rows:
    """(count, C, h, w): what the teacher makes of each sample's noise and first caption, drawn once and cached.

    `draw`: sample numbers (b,) => latents (b, C, h, w); `key`: all that they depend on.
    """

    def encode_rows(rows: slice) -> dict[str, np.ndarray]:
        with torch.no_grad():
            return {"pairs": draw(np.arange(rows.start, rows.stop)).float().cpu().numpy()}

    return cache.encode(folder, key, count, encode_rows, title, dtype, chunk=64)["pairs"]
