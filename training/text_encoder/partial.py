"""Training a part of a pretrained network: its last layers, or low-rank additions (LoRA, Hu et al. 2021)."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from sd_mini.errors import UserError


def thaw(model: nn.Module, last_layers: int, lora_rank: int) -> None:
    """Freeze a transformers model but for its `last_layers`, or put LoRA of that rank on the layers' linear maps.

    Raises ValueError for more layers than there are, and where there is nothing to put LoRA on.
    """
    model.requires_grad_(False)
    layers = _layers(model)
    if last_layers > len(layers):
        raise UserError(f"train_layers {last_layers}: {type(model).__name__} has {len(layers)}; give that or less")
    for layer in layers[len(layers) - last_layers :]:
        layer.requires_grad_(True)
    if lora_rank:
        _add_lora(model, layers, lora_rank)


def _layers(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks, in order: the outermost list of the model."""
    return next((list(module) for module in model.modules() if isinstance(module, nn.ModuleList)), [])


def _add_lora(model: nn.Module, layers: list[nn.Module], rank: int) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    inner = {id(module) for layer in layers for module in layer.modules()}
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and id(m) in inner}
    targets, transposed = list(linear), any(isinstance(module, Conv1D) for module in linear.values())
    if not targets:
        raise UserError(f"lora_rank {rank}: {type(model).__name__} has no linear layers in its blocks; leave it out")
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, fan_in_fan_out=transposed)
    inject_adapter_in_model(config, model)


def merged(model: Any) -> Any:
    """A model with LoRA => a copy without, the additions merged into the weights; any other model as it is."""
    if not any(type(module).__module__.startswith("peft.") for module in model.modules()):
        return model
    from peft.tuners.tuners_utils import BaseTunerLayer

    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            parent, _, last = name.rpartition(".")
            setattr(plain.get_submodule(parent), last, module.get_base_layer())
    plain.__dict__.pop("peft_config", None)
    return plain
