"""Augmentation of training pictures, drawn for each sample and step: a resumed run draws the same."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from sd_mini.config import Config
from sd_mini.data.batches import Batch


class AugmentConfig(Config):
    """Random changes to a training picture. Leave `mirror` at 0 where captions name left and right."""

    mirror: float = Field(0.0, ge=0, le=1)
    """probability that a picture is mirrored, left to right"""
    shift: int = Field(0, ge=0)
    """largest shift in px, in each direction; the edge pixels fill the gap"""


def augment(pixels: Tensor, batch: Batch, config: AugmentConfig) -> Tensor:
    """pixels (b, 3, H, W) of the pass's rows => the same shape. Shifts are whole pixels: nothing is interpolated."""
    if config.mirror:
        turned = batch.uniform("mirror") < config.mirror
        pixels = torch.where(turned[:, None, None, None], pixels.flip(-1), pixels)
    if config.shift:
        places = 2 * config.shift + 1
        corners = (batch.uniform("shift", 2) * places).long()  # each in 0..2 shift
        padded = nn.functional.pad(pixels, [config.shift] * 4, mode="replicate")
        corner_rows, corner_columns = corners.unbind(1)
        rows = corner_rows[:, None] + torch.arange(pixels.shape[2])
        columns = corner_columns[:, None] + torch.arange(pixels.shape[3])
        picked = torch.arange(len(pixels))[:, None, None]
        # advanced indexing puts the indexed axes first: (b, H, W, 3) => (b, 3, H, W)
        pixels = padded[picked, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return pixels
