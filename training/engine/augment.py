"""Changes to training pictures, drawn for each sample and step: a resumed run sees the very same ones."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from sd_mini.config import Config
from training.engine.batches import Batch


class AugmentConfig(Config):
    """What may be done to a training picture. Not for captions that say left and right: leave `mirror` at 0 there."""

    mirror: float = Field(0.0, ge=0, le=1)
    """how likely a picture is mirrored, left for right"""
    shift: int = Field(0, ge=0)
    """px a picture is moved by at most, in each direction; its edge pixels fill the gap"""


def augment(pixels: Tensor, batch: Batch, config: AugmentConfig) -> Tensor:
    """pixels (b, 3, R, R) of the batch's own rows => the same shape. Whole pixels move, so nothing is interpolated."""
    if config.mirror:
        turned = batch.uniform("mirror") < config.mirror
        pixels = torch.where(turned[:, None, None, None], pixels.flip(-1), pixels)
    if config.shift:
        side, places = pixels.shape[-1], 2 * config.shift + 1
        corners = (batch.uniform("shift", 2) * places).long()  # each in 0..2 shift
        padded = nn.functional.pad(pixels, [config.shift] * 4, mode="replicate")
        rows, columns = (corner[:, None] + torch.arange(side) for corner in corners.unbind(1))
        picked = torch.arange(len(pixels))[:, None, None]
        # advanced indexing puts the indexed axes first: (b, R, R, 3) => (b, 3, R, R)
        pixels = padded[picked, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return pixels
