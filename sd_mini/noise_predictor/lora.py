"""Low-rank adapters on a noise predictor, Hu et al. 2022, by peft: added, saved in peft's format, loaded, merged."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sd_mini.config import Config
from sd_mini.errors import UserError
from sd_mini.files import usual_modes

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # what peft puts before every name in its files
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "img_qkv_proj", "txt_kv_proj")  # diffusers' names, and PRX's own


class LoraConfig(Config):
    rank: int = Field(0, ge=0)
    """of the update to each matrix; 0: no adapters, every weight is trained"""
    alpha: float | None = Field(None, gt=0)
    """the update is scaled by alpha / rank; null: the rank"""
    targets: tuple[str, ...] = ATTENTION
    """ends of the names of the linear layers that get one"""


def add(network: ModelMixin, config: LoraConfig) -> None:
    """Give the layers in `config.targets` adapters that change nothing yet, and freeze everything else, in place.

    Raises ValueError where the network has no layer of these names, or peft is not installed.
    """
    peft = _peft()
    found = list(_adaptable(network, config.targets))
    if not found:
        linear = sorted({n.rsplit(".", 1)[-1] for n, m in network.named_modules() if isinstance(m, nn.Linear)})
        raise UserError(
            f"network.lora.targets {', '.join(config.targets)}: {type(network).__name__} has no such linear layers; it "
            f"has {', '.join(linear[:12])}"
        )
    given = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha or config.rank, target_modules=found)
    network.requires_grad_(False)
    peft.inject_adapter_in_model(given, network)


def save(network: ModelMixin, folder: Path, base: dict[str, Any]) -> None:
    """Write the adapters of `network` into `folder` as peft would; `base` is recorded, to say what they belong to."""
    weights = {f"{_PREFIX}{_file_name(name)}": tensor.contiguous() for name, tensor in state(network).items()}
    layers = {name.split(".lora_")[0] for name in state(network)}
    one = next(module for module in network.modules() if _is_lora(module))
    config = {
        "peft_type": "LORA",
        "r": one.r["default"],
        "lora_alpha": one.lora_alpha["default"],
        "target_modules": sorted(layers),
        "base_model": base,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / WEIGHTS)
    usual_modes(folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load(network: ModelMixin, folder: str | Path, objective: dict[str, Any] | None = None) -> None:
    """Add the adapters saved in `folder` to `network`, in place, ready to be trained on or merged. `objective`: what
    the network predicts, as a stage's contract records it, where that is known.

    Raises UserError, one line, with the network as it was: files that are missing or cut short, layers that this
    network does not have, or that have another shape in it, and adapters that say they learned another objective.
    """
    folder = Path(folder)
    config, weights = _read(folder)
    learned = (config.get("base_model") or {}).get("objective", objective)
    if objective is not None and learned != objective:
        raise UserError(f"LoRA {folder}: learned for {learned}, but this network predicts {objective}; give one for it")
    _check_fit(network, folder, config, weights)
    add(network, LoraConfig(rank=config["r"], alpha=config["lora_alpha"], targets=config["target_modules"]))
    with torch.no_grad():
        for name, tensor in state(network).items():
            tensor.copy_(weights[f"{_PREFIX}{_file_name(name)}"])


def _check_fit(network: ModelMixin, folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Raises ValueError unless the file holds the adapters of this network's layers, and nothing else."""
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    for target in config["target_modules"]:
        if not any(_matches(name, [target]) for name in linear):
            raise UserError(
                f"LoRA {folder}: adapts {target}, which this {type(network).__name__} does not have; it was made for "
                "another network"
            )
    shapes = {}
    for name, layer in _adaptable(network, config["target_modules"]).items():
        shapes[f"{_PREFIX}{name}.lora_A.weight"] = (config["r"], layer.in_features)
        shapes[f"{_PREFIX}{name}.lora_B.weight"] = (layer.out_features, config["r"])
    if odd := sorted(set(shapes) ^ set(weights)):
        what = "lacks" if odd[0] in shapes else "has no place for"
        raise UserError(f"LoRA {folder}: {what} {odd[0]}; expected the adapters of {type(network).__name__}")
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != shape:
            raise UserError(
                f"LoRA {folder}: {name} is {tuple(weights[name].shape)}, but this network's layer takes {shape}; it "
                "was made for another network"
            )


def _adaptable(network: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    modules = network.named_modules()
    return {name: m for name, m in modules if isinstance(m, nn.Linear) and _matches(name, targets)}


def state(network: nn.Module) -> dict[str, Tensor]:
    """The adapters' own parameters, by name."""
    return {name: p.detach() for name, p in network.named_parameters() if ".lora_A." in name or ".lora_B." in name}


def merge(network: ModelMixin) -> None:
    """Add each adapter's product to its layer's weight, in place; what is left is the stock network."""
    parents = dict(network.named_modules())
    for name, module in list(parents.items()):
        if _is_lora(module):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(parents[parent], child, module.get_base_layer())
    if hasattr(network, "peft_config"):
        del network.peft_config
    network.requires_grad_(True)


def merged(network: ModelMixin) -> ModelMixin:
    """The network itself where it has no adapters, else a copy of it with them merged."""
    if not is_adapted(network):
        return network
    copied = copy.deepcopy(network)
    merge(copied)
    return copied


def is_adapted(network: nn.Module) -> bool:
    return any(map(_is_lora, network.modules()))


def _is_lora(module: nn.Module) -> bool:
    return hasattr(module, "lora_A") and hasattr(module, "get_base_layer")


def _file_name(name: str) -> str:
    return name.replace(".default.", ".")


def _matches(name: str, targets: Sequence[str]) -> bool:
    return any(re.search(rf"(^|\.){re.escape(target)}$", name) for target in targets)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"LoRA {folder}: {name} is missing; expected a folder as training writes it, or peft")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS)
    except (ValueError, SafetensorError) as error:
        raise UserError(f"LoRA {folder}: cannot be read ({error}); give a whole one") from error
    said = config if isinstance(config, dict) else {}
    if not isinstance(said.get("target_modules"), list) or not {"r", "lora_alpha"} <= set(said):
        raise UserError(f"LoRA {folder}: {CONFIG} names no target_modules, r and lora_alpha; give one of a LoRA")
    is_number = isinstance(said["lora_alpha"], int | float) and said["lora_alpha"] > 0
    if not isinstance(said["r"], int) or said["r"] < 1 or not is_number:
        raise UserError(
            f"LoRA {folder}: r is {said['r']!r} and lora_alpha {said['lora_alpha']!r}; expected a whole number of at "
            "least 1, and a number above 0"
        )
    for name in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "bias"):
        if said.get(name) not in (None, False, {}, [], "none"):
            raise UserError(f"LoRA {folder}: {name} is {said[name]!r}; expected plain low-rank adapters without it")
    return config, weights


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UserError("LoRA needs peft, which is not installed: pip install 'sd-mini[train]'") from error
    return peft
