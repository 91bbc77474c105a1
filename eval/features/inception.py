"""Inception's 2048 features as torch-fidelity computes them, from its weights, in half the time on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sd_mini.errors import UserError

SIDE = 299  # px
_LAYERS = (
    "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2",
    "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7a",
    "Mixed_7b", "Mixed_7c", "AvgPool",
)  # fmt: skip


class Inception(nn.Module):
    """torch-fidelity's own layers, batch norm folded into the convolutions and channels last: what remains is the
    convolutions' time. TensorFlow's bilinear enlargement is two matrix products.

    (n, 3, H, W) uint8 => (n, 2048) float32.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        blocks: list[Any] = list(network.modules())
        for block in blocks:
            if hasattr(block, "bn"):
                block.conv, block.bn = fuse_conv_bn_eval(block.conv, block.bn), nn.Identity()
        layers = nn.ModuleDict({name: getattr(network, name) for name in _LAYERS})
        self.layers = layers.to(memory_format=torch.channels_last)

    def forward(self, pictures: Tensor) -> Tensor:
        down, across = (_enlargement(side).to(pictures.device) for side in pictures.shape[2:])
        x = (down @ (pictures.float() @ across.T) - 128) / 128  # (n, 3, 299, 299)
        x = x.contiguous(memory_format=torch.channels_last)
        for layer in self.layers.values():
            x = layer(x)
        return x.flatten(1)


def _enlargement(side: int) -> Tensor:
    """(299, side): TensorFlow 1's `resize_bilinear`, whose corners do not meet the picture's."""
    place = torch.arange(SIDE, dtype=torch.float32) * torch.tensor(side / SIDE, dtype=torch.float32)
    low = place.long()
    high, share, row = (low + 1).clamp_max(side - 1), place - low, torch.arange(SIDE)
    matrix = torch.zeros(SIDE, side)
    matrix[row, low] += 1 - share
    matrix[row, high] += share
    return matrix


def load_inception(weights: str | Path | None = None) -> Inception:
    """`weights`: `weights-inception-2015-12-05-6726825d.pth`; without it, downloaded. Raises ValueError, one line,
    where that fails or the file is another network's."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    path = Path(weights) if weights is not None else _download(URL_INCEPTION_V3)
    if not path.is_file():
        raise UserError(f"inception weights {path}: no such file; fetch {URL_INCEPTION_V3}")
    try:
        torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity itself would run code in a file
        network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
    except Exception as error:  # of a file that is cut or holds code, parsers raise whatever they do
        raise UserError(f"inception weights {path}: not readable ({' '.join(str(error).split())[:160]})") from None
    return Inception(network).eval()


def _download(url: str) -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix="6726825d")
    except (OSError, RuntimeError) as error:  # no network, or a file that is not the one it should be
        raise UserError(
            f"inception: {url} cannot be downloaded ({error}); fetch it where there is a network and give its path"
        ) from None
    return path
