"""Stage 3's network: built from a preset or its fields, or pretrained and trained in full or by LoRA."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.models.modeling_utils import ModelMixin
from pydantic import Field, model_validator
from torch import nn

from sd_mini import lora, noise_predictor
from sd_mini.config import Config
from sd_mini.cpu import accelerate
from sd_mini.diffusion.objective import Process
from sd_mini.errors import UserError
from sd_mini.lora import LoraConfig
from sd_mini.noise_predictor.loading import check_process, load_network
from sd_mini.noise_predictor.presets import preset
from sd_mini.processes import process_device
from training.engine.flops import count_flops
from training.engine.task import TrainConfig
from training.noise_predictor.losses import PredictorObjective
from training.optim.optimizer import block_matrices


class NetworkConfig(Config):
    kind: str = "prx"
    """which diffusers network: prx, pixart or unet (PRXTransformer2DModel, PixArtTransformer2DModel,
    UNet2DConditionModel), or the class name of another denoiser that is called alike"""
    preset: str | None = None
    """its size: 1m, 4m, 20m, 100m, 400m or 1b parameters"""
    network: dict[str, Any] = Field(default_factory=dict)
    """fields of that class, over those of the preset; those that the other stages decide are left out"""
    pretrained: str | None = None
    """a network to start from, instead of all these: its diffusers folder, a pipeline's, or a hub name"""
    lora: LoraConfig = LoraConfig()

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        # defaults, as a run's config.yaml writes them out, do not count as given
        given = [name for name in ("kind", "preset", "network") if getattr(self, name) != _default(name)]
        if self.pretrained is not None and given:
            raise UserError(
                f"network.pretrained {self.pretrained}: brings its own class and fields; leave out network.{given[-1]}"
            )
        if not self.lora.rank and self.lora != LoraConfig():
            raise UserError("network.lora: alpha and targets are of adapters, and rank 0 adds none; set it")
        if self.lora.rank and self.pretrained is None:
            raise UserError(
                f"network.lora.rank {self.lora.rank}: adapts a network that is there already; give network.pretrained"
            )
        if self.preset is not None:
            preset(self.kind, self.preset)
        return self


def _default(field: str) -> Any:
    return NetworkConfig.model_fields[field].get_default(call_default_factory=True)


def make_network(
    config: NetworkConfig, latent_shape: tuple[int, int, int], dim: int, process: Process | None = None
) -> ModelMixin:
    """Raises UserError for a network that cannot be loaded, does not fit the two other stages, or was trained for
    another `process`."""
    if config.pretrained is not None:
        if process is not None:
            check_process(config.pretrained, process)
        network = load_network(config.pretrained, latent_shape, dim)
        if config.lora.rank:
            lora.add(network, config.lora)
    else:
        fields = preset(config.kind, config.preset) if config.preset is not None else {}
        network = noise_predictor.build(config.kind, fields | config.network, latent_shape, dim)
    if process_device().type == "cpu":
        accelerate(network)  # or not: a network without CPU kernels is trained as it is
    return network


def exported(network: nn.Module, config: NetworkConfig, process: Process) -> Any:
    """What a stage's folder keeps: the stock network, its adapters merged, and beside it the adapters alone."""
    return _Adapted(network, config, process) if lora.is_adapted(network) else network


class _Adapted:
    """Saves as one network: merged for every reader, and the adapters alone in `lora/`."""

    def __init__(self, network: nn.Module, config: NetworkConfig, process: Process):
        self.network, self.config, self.process = network, config, process

    def save_pretrained(self, folder: Path) -> None:
        merged: Any = lora.merged(self.network)
        merged.save_pretrained(folder)
        base = {"class": type(merged).__name__, "pretrained": self.config.pretrained}
        base["objective"] = self.process.model_dump()
        lora.save(self.network, folder / "lora", base)


def token_grid(network: Any, latent_shape: tuple[int, int, int]) -> tuple[int, int]:
    """(rows, columns) of the network's picture tokens: of a transformer patches, of a UNet its deepest level."""
    patch = getattr(network.config, "patch_size", None)
    if patch is None:
        patch = 2 ** (len(network.config.block_out_channels) - 1)
    return math.ceil(latent_shape[1] / patch), math.ceil(latent_shape[2] / patch)


def description(
    objective: PredictorObjective,
    latent_shape: tuple[int, int, int],
    conditioning: tuple[int, int],
    config: TrainConfig,
) -> str:
    """One line on the cost of a training before it begins: parameters, tokens, FLOPs a picture, memory.

    FLOPs are of one picture's forward and backward pass. Memory is of weights, gradients, moments (AdamW two, Muon one)
    and averages in float32, without activations.
    """
    network, (length, dim) = objective.network, conditioning
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    inputs = {
        "latents": torch.zeros(1, *latent_shape),
        "noise": torch.zeros(1, *latent_shape),
        "timesteps": objective.config.times(torch.full((1,), 0.5)),
        "prompt_embeds": torch.zeros(1, length, dim),
        "prompt_mask": torch.ones(1, length, dtype=torch.bool),
    }
    if objective.alignment is not None:
        grid, channels = objective.alignment.grid, objective.alignment.channels
        inputs |= {"features": torch.zeros(1, channels, *grid), "feature_weights": torch.ones(1)}
    flops = count_flops(objective, trained, inputs)
    counts = [p.numel() for p in objective.parameters()]
    by_muon = sum(p.numel() for p in block_matrices(objective)) if config.muon_lr is not None else 0
    learnt = sum(p.numel() for p in trained.values())
    averages = 2 if config.ema_width is not None else 0
    floats = sum(counts) + learnt * (3 + averages) - by_muon
    rows, columns = _tokens(network, latent_shape)
    trainable = "" if learnt == sum(counts) else f" ({_short(learnt)} trained)"
    return (
        f"{type(network).__name__}: {_short(sum(counts))} parameters{trainable}, {rows * columns} picture tokens and "
        f"{length} of the prompt, {_short(flops)}FLOPs a picture and update, {_short(4 * floats)}B of memory before "
        "activations"
    )


def _tokens(network: nn.Module, latent_shape: tuple[int, int, int]) -> tuple[int, int]:
    """(rows, columns) of picture tokens; of a UNet the cells of its first level, where most of its work is."""
    patch = getattr(network.config, "patch_size", 1)
    return latent_shape[1] // patch, latent_shape[2] // patch


def _short(number: float) -> str:
    """12,345,678 => "12.3 M"."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} "
