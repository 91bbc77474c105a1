"""LPIPS: how far apart two pictures look, by the features of a network that knows pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sd_mini.errors import UserError

# torchvision's ImageNet weights, on which the LPIPS heads were calibrated
_URLS = {
    "vgg": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "alex": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
}


def load_lpips(network: str = "vgg", weights: str | Path | None = None) -> nn.Module:
    """LPIPS v0.1 (Zhang et al. 2018, eq. 1), frozen: module(a, b) of pixels (B, 3, H, W) in [-1, 1] => (B, 1, 1, 1).

    Args:
        network: "vgg" (to train by) or "alex" (to measure by).
        weights: torchvision's weights file of that network (.pth or .safetensors); without it, downloaded.

    Raises ValueError, one line, where the file is missing or another network's, and offline.
    """
    import lpips  # brings torchvision: seconds

    if network not in _URLS:
        raise UserError(f"lpips network {network!r}: expected one of {', '.join(_URLS)}")
    found = _download(network) if weights is None else _read(Path(weights))
    module = lpips.LPIPS(net=network, pnet_rand=True, verbose=False)
    try:
        module.net.load_state_dict(_renamed(module.net, found))
    except (KeyError, RuntimeError) as error:
        raise UserError(
            f"{weights or _URLS[network]}: not torchvision's weights of {network} "
            f"({' '.join(str(error).split())[:160]})"
        ) from None
    return module.requires_grad_(False).eval()


def _renamed(net: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's "features.5.weight" is "slice2.5.weight" here. What is missing raises KeyError."""
    return {name: weights["features." + name.split(".", 1)[1]] for name in net.state_dict()}


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"lpips weights {path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # of a file that is cut or holds code, parsers raise whatever they do
        raise UserError(f"lpips weights {path}: not readable ({' '.join(str(error).split())[:160]})") from None


def _download(network: str) -> dict[str, Tensor]:
    url = _URLS[network]
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True, check_hash=True)
    except (OSError, RuntimeError) as error:  # no network, or a file that is not the one it should be
        raise UserError(
            f"lpips: {url} cannot be downloaded ({error}); fetch it where there is a network and give its path"
        ) from None
