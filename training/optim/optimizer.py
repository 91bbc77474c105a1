"""The optimizer of a config: AdamW, and with `muon_lr` Muon for the matrices of the repeated blocks."""

from __future__ import annotations

from typing import Any, Literal

import torch
from diffusers.optimization import get_scheduler
from pydantic import Field
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from sd_mini.config import Config
from sd_mini.errors import UserError
from training.optim.update import MuonAdamW


class OptimizerConfig(Config):
    """The optimizer of a player."""

    lr: float = Field(1e-3, gt=0)
    """peak learning rate"""
    muon_lr: float | None = Field(None, gt=0)
    """peak learning rate of Muon, which then trains the matrices of the blocks; null: AdamW trains everything"""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """decay of the learning rate to 0 after the warm-up; "constant": none"""
    warmup_steps: int = Field(50, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    """gradients are scaled down to this L2 norm"""


def build(module: nn.Module, config: OptimizerConfig, half: bool = False) -> MuonAdamW:
    """The optimizer of what `module` trains; with `muon_lr` the matrices of its blocks go by Muon at that rate, `half`:
    in bfloat16.

    Raises ValueError for a `muon_lr` without any such matrix.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    muon_lr = config.muon_lr
    by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
    for parameter in block_matrices(module) if muon_lr is not None else []:
        by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
    if muon_lr is not None and not by_shape:
        raise UserError(
            f"train.muon_lr {muon_lr:g}: expected a network with linear layers or convolutions in its blocks, and here "
            "are none to train by Muon; leave it out"
        )
    by_muon = {id(p) for group in by_shape.values() for p in group}
    groups: list[dict[str, Any]] = [{"params": [p for p in trained if id(p) not in by_muon], "lr": config.lr}]
    groups += [{"params": group, "lr": muon_lr, "muon": True} for group in by_shape.values()]
    return MuonAdamW([group for group in groups if group["params"]], config.betas, config.weight_decay, half)


def build_schedule(optimizer: torch.optim.Optimizer, config: OptimizerConfig, steps: int) -> LambdaLR:
    """diffusers' schedule over `steps` updates. Not prepared by Accelerate, which would step it once a process."""
    name = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    return get_scheduler(name, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=steps)


def block_matrices(module: nn.Module) -> list[nn.Parameter]:
    """The weights for Muon: of linear layers and convolutions inside repeated blocks (`nn.ModuleList`). A kernel is one
    matrix, its rows the outputs (Jordan et al. 2024).

    Left to AdamW: modulation layers, embeddings, norms, and the layers before and after the blocks.
    """
    lists = [name for name, part in module.named_modules() if isinstance(part, nn.ModuleList)]
    matrices: dict[int, nn.Parameter] = {}
    for name, layer in module.named_modules():
        around = [blocks for blocks in lists if name.startswith(f"{blocks}.")]
        if not around or not isinstance(layer, nn.Linear | nn.Conv2d) or not layer.weight.requires_grad:
            continue
        within = name.removeprefix(min(around, key=len))  # its name from the outermost list on
        if not any(word in within for word in ("modulation", "emb", "norm")):
            matrices[id(layer.weight)] = layer.weight
    return list(matrices.values())
