"""Training a part of a pretrained text encoder: its last layers, or low-rank adapters on all of them."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from sd_mini import lora
from sd_mini.errors import UserError


def freeze_rest(model: nn.Module, last_layers: int, lora_rank: int) -> None:
    """Freeze a transformers model except its `last_layers`, or add adapters of that rank to its layers' linear maps.

    Raises UserError for more layers than there are, and where no layer has a linear map.
    """
    model.requires_grad_(False)
    # the repeated layers, in order: the outermost list of the model
    layers = next((list(module) for module in model.modules() if isinstance(module, nn.ModuleList)), [])
    if last_layers > len(layers):
        raise UserError(f"train_layers {last_layers}: {type(model).__name__} has {len(layers)}; give that or less")
    for layer in layers[len(layers) - last_layers :]:
        layer.requires_grad_(True)
    if lora_rank:
        inside = {module for layer in layers for module in layer.modules()}
        names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m in inside]
        if not names:
            raise UserError(f"lora_rank {lora_rank}: {type(model).__name__}'s layers have no linear maps; leave it out")
        lora.add_to_layers(model, names, lora_rank)
