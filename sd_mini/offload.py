"""Models that Accelerate keeps elsewhere (diffusers' CPU offloading) and brings in when they are called."""

from __future__ import annotations

import torch
from torch import nn


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes: of an offloaded one, whose weights lie elsewhere meanwhile, where they will be."""
    for module in model.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return next(model.parameters()).device
