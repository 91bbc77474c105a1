"""From a small picture to a large one by diffusion: the second network of a cascade."""

from __future__ import annotations

import torch
from diffusers.models import UNet2DModel
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from sd_mini.draws import Draws, alike, normals
from sd_mini.errors import UserError

_TIMES = 1000  # the network's times for the levels 0 to 1


class DiffusionEnlarger(nn.Module):
    """Small pictures (B, C, h, w) => (B, C, factor h, factor w), drawn from noise in `steps` evaluations.

    Flow matching at the large size: x_t = (1 - t) x + t n, and the network predicts n - x (Lipman et al. 2023, eq. 23,
    with the time turned round). It reads x_t, folded to the small size (space-to-depth), beside the small picture, and
    two levels: t, and how much noise was added to the small picture: noise conditioning augmentation (Ho et al. 2022,
    "Cascaded diffusion models", section 4.2; Saharia et al. 2022, Imagen, section 2.4), by which it does not trust the
    details of a small picture that another network made. `augmentation` is that level, 0 to 1, when pictures are made.
    """

    def __init__(self, channels: int, factor: int, width: int, num_blocks: int, steps: int, augmentation: float):
        super().__init__()
        if width < 8 or width % 8:
            raise UserError(f"width {width}: expected a multiple of 8")
        self.factor, self.steps, self.augmentation = factor, steps, augmentation
        folded = channels * factor**2
        self.network = UNet2DModel(
            in_channels=folded + channels,
            out_channels=folded,
            block_out_channels=(width, 2 * width),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            layers_per_block=num_blocks,
            norm_num_groups=8,
            class_embed_type="timestep",
            add_attention=False,
        )

    def forward(self, small: Tensor, draws: Draws | None = None) -> Tensor:
        """`draws`: each picture's generator; without, all begin at the same noise, that of seed 0."""
        draws = alike(len(small)) if draws is None else draws
        channels, height, width = small.shape[1:]
        x = normals((channels, self.factor * height, self.factor * width), draws).to(small)
        if self.augmentation:
            small = small + self.augmentation * normals((channels, height, width), draws).to(small)
        levels, step = small.new_full((len(small),), self.augmentation), 1 / self.steps
        for i in range(self.steps):  # from t = 1 to 0 in equal steps
            x = x - step * self.velocity(x, small.new_full((len(x),), 1 - i * step), small, levels)
        return x

    def velocity(self, noised: Tensor, times: Tensor, small: Tensor, levels: Tensor) -> Tensor:
        """x_t (B, C, H, W), t (B,), small pictures and the noise on them (B,) => n - x (B, C, H, W).

        Raises UserError for small pictures with an odd side, which cannot be halved.
        """
        if any(side % 2 for side in small.shape[2:]):
            raise UserError(f"small pictures of {tuple(small.shape[2:])}: expected even sides for this decoder")
        inputs = torch.cat([pixel_unshuffle(noised, self.factor), small], dim=1)
        predicted = self.network(inputs, _TIMES * times, class_labels=_TIMES * levels).sample
        return pixel_shuffle(predicted, self.factor)

    def denoised(self, pixels: Tensor, noise: Tensor, times: Tensor, small: Tensor, levels: Tensor) -> Tensor:
        """Pictures and noise (B, C, H, W), t (B,) => what the network takes for the pictures, x_t - t v(x_t)."""
        t = times.view(-1, 1, 1, 1)
        noised = (1 - t) * pixels + t * noise
        return noised - t * self.velocity(noised, times, small, levels)
