"""Alignment of the noise predictor's hidden states with a frozen vision tower's features: REPA, and its spatial form.

Yu et al. 2025, "Representation Alignment for Generation" (REPA), eq. 8; Singh et al. 2025 (iREPA): a convolution as the
projection, and features that are normalised over the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cosine_similarity, interpolate

from sd_mini.config import Config
from sd_mini.data.arrays import Buckets
from sd_mini.data.batches import Rows
from sd_mini.data.buckets import Size
from sd_mini.data.captioned import CaptionedPictures
from sd_mini.errors import UserError
from sd_mini.stages.contract import Stage, model_hash
from sd_mini.vision.towers import VisionTower, load_tower, matcher_tower
from training.noise_predictor.data import cached_of_pictures

OWN = "text_encoder"  # the picture tower trained with stage 1


class RepaConfig(Config):
    weight: float = Field(0.0, ge=0)
    """weight of 1 - the cosine between projected hidden states and the teacher's features, by patch; 0: off"""
    teacher: str = OWN
    """transformers:FOLDER or a hub name, timm:MODEL[=FILE], open_clip:ARCHITECTURE=FILE; or text_encoder, the picture
    tower of stage 1"""
    depth: float = Field(1 / 3, gt=0, le=1)
    """depth at which hidden states are read, as a fraction of the blocks"""
    until: float = Field(1.0, gt=0, le=1)
    """fraction of the training after which the term's weight is 0"""
    spatial: bool = True
    """iREPA: a 3 x 3 convolution as projection, teacher features normalised over each picture; else REPA's three-layer
    MLP"""


def load_teacher(config: RepaConfig, text: Stage) -> VisionTower:
    """Raises UserError for a teacher that cannot be loaded."""
    if config.teacher != OWN:
        return load_tower(config.teacher)
    if "matcher" not in text.parts:
        raise UserError(f"repa.teacher {OWN}: {text.folder} holds no matcher; train stage 1 again, or name a teacher")
    return matcher_tower(text.parts["matcher"])


def features(
    pictures: CaptionedPictures,
    tower: VisionTower,
    grid_of: Callable[[Size], tuple[int, int]],
    folder: Path,
    dtype: str,
) -> Rows | Buckets:
    """The teacher's features of every picture, (n, K, rows, columns), cached. `grid_of`: the noise predictor's own
    rows and columns for pictures of a size."""
    device = PartialState().device

    def encode(pixels: Tensor) -> Tensor:
        grid_features, grid = tower.grid(pixels.to(device)), grid_of(Size(*pixels.shape[2:]))
        is_finer = grid_features.shape[-2] >= grid[0]
        if is_finer:
            return adaptive_avg_pool2d(grid_features, grid)
        return interpolate(grid_features, grid, mode="bilinear")

    grids = [list(grid_of(size)) for size in pictures.sizes]
    key = {"tower": model_hash(tower.module), "grid": grids[0] if len(grids) == 1 else grids}
    return cached_of_pictures(pictures, "teacher features", encode, key, folder / "features", dtype, tower.module)


class Alignment(nn.Module):
    """The projection from the network's hidden states to the teacher's features, trained beside the network."""

    def __init__(self, network: nn.Module, teacher_dim: int, config: RepaConfig, grid: tuple[int, int]):
        super().__init__()
        self.config, self.grid, self.channels = config, grid, teacher_dim
        self.number = layer_number(network, config.depth)
        width = hidden_width(network)
        if config.spatial:
            self.projection: nn.Module = nn.Conv2d(width, teacher_dim, 3, padding=1)
        else:
            wide = 4 * width
            layers = (nn.Conv2d(width, wide, 1), nn.SiLU(), nn.Conv2d(wide, wide, 1), nn.SiLU())
            self.projection = nn.Sequential(*layers, nn.Conv2d(wide, teacher_dim, 1))

    def forward(self, hidden: Tensor, features: Tensor) -> Tensor:
        """hidden (B, N, D) or (B, D, rows, columns), features (B, K, rows, columns) => (B,) from 0 (aligned) to 2."""
        states = hidden if hidden.ndim == 4 else hidden.mT.unflatten(2, features.shape[2:])
        projected = self.projection(states)  # (B, K, rows, columns)
        if projected.shape[2:] != features.shape[2:]:
            projected = interpolate(projected, features.shape[2:], mode="bilinear")
        if self.config.spatial:  # iREPA: features normalised over the picture
            mean, std = features.mean((2, 3), keepdim=True), features.std((2, 3), keepdim=True)
            features = (features - mean) / (std + 1e-6)
        # REPA, eq. 8: mean over patches of the cosine
        return 1 - cosine_similarity(projected, features, dim=1).mean((1, 2))


def layers_of(network: nn.Module) -> list[nn.Module]:
    """The blocks whose outputs are hidden states: a transformer's, or a UNet's middle. ValueError for neither."""
    for name in ("blocks", "transformer_blocks"):
        if isinstance(blocks := getattr(network, name, None), nn.ModuleList):
            return list(blocks)
    middle = getattr(network, "mid_block", None)
    if middle is None:
        raise UserError(f"repa: {type(network).__name__} has no blocks to read hidden states from; leave repa out")
    return [middle]


@contextmanager
def outputs_of(layer: nn.Module) -> Generator[list[Tensor]]:
    """Within, the list receives the layer's output each time it is called. An accelerated network is not accelerated
    meanwhile: its kernels call no layers."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handle = layer.register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()


def layer_number(network: nn.Module, depth: float) -> int:
    count = len(layers_of(network))
    return max(1, min(count, round(depth * count))) - 1


def hidden_width(network: Any) -> int:
    config = network.config
    if "hidden_size" in config:
        return config.hidden_size
    if "num_attention_heads" in config and "attention_head_dim" in config and "block_out_channels" not in config:
        return config.num_attention_heads * config.attention_head_dim
    return config.block_out_channels[-1]


def weights_at(step: int, steps: int, count: int, config: RepaConfig) -> Tensor:
    """(count,) the term's weight at that update."""
    return torch.full((count,), config.weight if step < config.until * steps else 0.0)
