"""Low-rank adapters (LoRA, Hu et al. 2022) by peft: added to a network, trained, saved, loaded and merged.

Two file formats: peft's folder (adapter_config.json, adapter_model.safetensors) and diffusers' single file
(pytorch_lora_weights.safetensors, what `save_lora_weights` and `save_lora_adapter` write).
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from diffusers.models import UNet2DConditionModel
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sd_mini.config import Config
from sd_mini.errors import UserError
from sd_mini.files import usual_modes

DEFAULT = "default"  # peft's name of an adapter that has none
CONFIG, WEIGHTS, DIFFUSERS_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", LORA_WEIGHT_NAME_SAFE
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "img_qkv_proj", "txt_kv_proj")  # diffusers' names, and PRX's
_PEFT_PREFIX = "base_model.model."  # before every name in peft's files
_COMPONENTS = ("transformer.", "unet.")  # before every name in diffusers' files: the pipeline's component
_UNSUPPORTED = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "bias")


class LoraConfig(Config):
    rank: int = Field(0, ge=0)
    """of the update to each matrix; 0: no adapters, every weight is trained"""
    alpha: float | None = Field(None, gt=0)
    """the update is scaled by alpha / rank; null: the rank"""
    targets: tuple[str, ...] = ATTENTION
    """ends of the names of the linear layers that get one"""


def add(network: nn.Module, config: LoraConfig) -> None:
    """Add adapters, which change nothing yet, to the layers that `config.targets` names; freeze all else; in place.

    Raises UserError where the network has no layer of these names, or peft is not installed.
    """
    layers = list(_matching(network, config.targets))
    if not layers:
        linear = sorted({n.rsplit(".", 1)[-1] for n, m in network.named_modules() if isinstance(m, nn.Linear)})
        raise UserError(
            f"network.lora.targets {', '.join(config.targets)}: {type(network).__name__} has no such linear layers; it "
            f"has {', '.join(linear[:12])}"
        )
    add_to_layers(network, layers, config.rank, config.alpha)


def add_to_layers(
    network: nn.Module, layers: Sequence[str], rank: int, alpha: float | None = None, adapter: str = DEFAULT
) -> None:
    """As `add`, to the linear layers (nn.Linear, or GPT-2's Conv1D) of these full names, as the adapter so named."""
    try:
        import peft
    except ImportError as error:
        raise UserError("LoRA needs peft, which is not installed: pip install 'sd-mini[train]'") from error
    is_transposed = any(isinstance(network.get_submodule(name), Conv1D) for name in layers)
    scale: Any = alpha or rank  # a float is right too, whatever peft's annotation
    config = peft.LoraConfig(r=rank, lora_alpha=scale, target_modules=list(layers), fan_in_fan_out=is_transposed)
    network.requires_grad_(False)
    peft.inject_adapter_in_model(config, network, adapter_name=adapter)


def save(network: nn.Module, folder: Path, base: dict[str, Any], adapter: str = DEFAULT) -> None:
    """Write an adapter of `network` into `folder` in both formats; `base` records the network that it belongs to."""
    weights = {_unnamed(name, adapter): tensor.contiguous() for name, tensor in state(network, adapter).items()}
    layers: list[Any] = [module for module in network.modules() if is_adapted_layer(module)]
    layer = next(layer for layer in layers if adapter in layer.lora_A)
    config = {
        "peft_type": "LORA",
        "r": layer.r[adapter],
        "lora_alpha": layer.lora_alpha[adapter],
        "target_modules": sorted(_layers_of(weights)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps({**config, "base_model": base}, indent=2) + "\n", encoding="utf-8")
    save_file({f"{_PEFT_PREFIX}{name}": tensor for name, tensor in weights.items()}, folder / WEIGHTS)
    component = "unet." if isinstance(network, UNet2DConditionModel) else "transformer."
    metadata = {LORA_ADAPTER_METADATA_KEY: json.dumps({f"{component}{key}": value for key, value in config.items()})}
    metadata |= {"format": "pt", "base_model": json.dumps(base)}
    named = {f"{component}{name}": tensor for name, tensor in weights.items()}
    save_file(named, folder / DIFFUSERS_WEIGHTS, metadata=metadata)
    for name in (WEIGHTS, DIFFUSERS_WEIGHTS):
        usual_modes(folder / name)


def load(network: nn.Module, path: str | Path, objective: dict[str, Any] | None = None, adapter: str = DEFAULT) -> None:
    """Add the adapter saved in `path` to `network` by that name, in place, ready to be trained or merged.

    `path`: a folder in peft's or diffusers' format, or diffusers' file. `objective`: what the network predicts, as a
    stage's contract records it, where that is known. Raises UserError, one line, with the network as it was: files that
    are missing or cut short, layers that this network does not have, or of another shape in it, and adapters whose
    record names another objective.
    """
    file = weights_file(path)
    config, weights = _read_peft(file) if file.name == WEIGHTS else _read_diffusers(file)
    _check_config(path, config)
    learned = (config.get("base_model") or {}).get("objective", objective)
    if objective is not None and learned != objective:
        raise UserError(f"LoRA {path}: learned for {learned}, but this network predicts {objective}; give one for it")
    _check_fit(network, path, config, weights)
    broken = next((name for name, tensor in weights.items() if not tensor.isfinite().all()), None)
    if broken is not None:
        raise UserError(f"LoRA {path}: {broken} holds values that are not finite; give an earlier one")
    add_to_layers(
        network, list(_matching(network, config["target_modules"])), config["r"], config["lora_alpha"], adapter
    )
    with torch.no_grad():
        for name, tensor in state(network, adapter).items():
            tensor.copy_(weights[_unnamed(name, adapter)])


def weights_file(path: str | Path) -> Path:
    """The file of adapter weights in a LoRA folder, peft's before diffusers', or `path` itself where it is a file."""
    path = Path(path)
    if path.is_file():
        return path
    file = next((path / name for name in (WEIGHTS, DIFFUSERS_WEIGHTS) if (path / name).is_file()), None)
    if file is None:
        raise UserError(
            f"LoRA {path}: neither {WEIGHTS} nor {DIFFUSERS_WEIGHTS} is there; expected a folder as training, peft or "
            "diffusers writes it"
        )
    return file


def state(network: nn.Module, adapter: str = DEFAULT) -> dict[str, Tensor]:
    """An adapter's own parameters, by name."""
    own = tuple(f".lora_{side}.{adapter}." for side in "AB")
    return {name: p.detach() for name, p in network.named_parameters() if any(part in name for part in own)}


def _unnamed(name: str, adapter: str) -> str:
    """A parameter of an adapter => its name in files: x.lora_A.NAME.weight => x.lora_A.weight."""
    for side in (".lora_A.", ".lora_B."):
        name = name.replace(f"{side}{adapter}.", side)
    return name


def merge(network: nn.Module) -> None:
    """Add each adapter's product to its layer's weight, in place; the plain network is left, trainable in all."""
    modules = dict(network.named_modules())
    for name, module in list(modules.items()):
        if is_adapted_layer(module):
            module.merge(safe_merge=True)  # which refuses NaN
            parent, _, child = name.rpartition(".")
            setattr(modules[parent], child, module.get_base_layer())
    network.__dict__.pop("peft_config", None)
    network.requires_grad_(True)


def merged(network: Any) -> Any:
    """The network itself where it has no adapters, else a copy of it with them merged."""
    if not is_adapted(network):
        return network
    network = copy.deepcopy(network)
    merge(network)
    return network


def is_adapted(network: nn.Module) -> bool:
    return any(map(is_adapted_layer, network.modules()))


def is_adapted_layer(module: nn.Module) -> bool:
    return hasattr(module, "lora_A") and hasattr(module, "get_base_layer")


def _layers_of(weights: dict[str, Tensor]) -> set[str]:
    return {name.split(".lora_")[0] for name in weights if ".lora_" in name}


def _matching(network: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers, adapted or not, whose names are one of `targets` or end with a dot and it."""
    if not targets:
        return {}
    pattern = re.compile("|".join(rf"(^|\.){re.escape(target)}$" for target in targets))
    found = {name: module for name, module in network.named_modules() if pattern.search(name)}
    plain = {name: m.get_base_layer() if is_adapted_layer(m) else m for name, m in found.items()}
    return {name: module for name, module in plain.items() if isinstance(module, nn.Linear)}


def _read_peft(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not (file.parent / CONFIG).is_file():
        raise UserError(f"LoRA {file.parent}: {CONFIG} is missing; expected a folder as training or peft writes it")
    try:
        config = json.loads((file.parent / CONFIG).read_text(encoding="utf-8"))
        weights = load_file(file)
    except (ValueError, SafetensorError) as error:
        raise UserError(f"LoRA {file.parent}: cannot be read ({error}); give a whole one") from error
    return config, {name.removeprefix(_PEFT_PREFIX): tensor for name, tensor in weights.items()}


def _base_model(text: str) -> dict[str, Any]:
    """What the metadata says of the network it belongs to, as we write it; another's may be a plain name."""
    try:
        base = json.loads(text)
    except ValueError:
        return {}
    return base if isinstance(base, dict) else {}


def _read_diffusers(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """diffusers' file => peft's config and names. Without metadata rank and alpha are the first matrix's rows, as
    diffusers takes them (`get_peft_kwargs`)."""
    try:
        with safe_open(file, "pt") as tensors:
            metadata = tensors.metadata() or {}
        weights = load_file(file)
        config = json.loads(metadata.get(LORA_ADAPTER_METADATA_KEY, "{}"))
        base = _base_model(metadata.get("base_model", "{}"))
    except (ValueError, SafetensorError) as error:
        raise UserError(f"LoRA {file}: cannot be read ({error}); give a whole one") from error
    # older files: lora.down and lora.up instead of lora_A and lora_B
    weights = convert_unet_state_dict_to_peft(weights)
    for component in _COMPONENTS:
        weights = {name.removeprefix(component): tensor for name, tensor in weights.items()}
        config = {key.removeprefix(component): value for key, value in config.items()}
    rank = next((len(tensor) for name, tensor in weights.items() if name.endswith(".lora_A.weight")), 0)
    defaults = {"r": rank, "lora_alpha": rank}
    return defaults | config | {"target_modules": sorted(_layers_of(weights)), "base_model": base}, weights


def _check_config(path: str | Path, config: Any) -> None:
    fields = config if isinstance(config, dict) else {}
    if not isinstance(fields.get("target_modules"), list) or not {"r", "lora_alpha"} <= set(fields):
        raise UserError(f"LoRA {path}: {CONFIG} names no target_modules, r and lora_alpha; give one of a LoRA")
    rank, alpha = fields["r"], fields["lora_alpha"]
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or alpha <= 0:
        raise UserError(
            f"LoRA {path}: r is {rank!r} and lora_alpha {alpha!r}; expected a whole number of at least 1, and a number "
            "above 0"
        )
    for name in _UNSUPPORTED:
        if fields.get(name) not in (None, False, {}, [], "none"):
            raise UserError(f"LoRA {path}: {name} is {fields[name]!r}; expected plain low-rank adapters without it")


def _check_fit(network: nn.Module, path: str | Path, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Raises UserError unless the file holds the adapters of this network's layers, and nothing else."""
    for target in config["target_modules"]:
        if not _matching(network, [target]):
            raise UserError(
                f"LoRA {path}: adapts {target}, which this {type(network).__name__} does not have; it was made for "
                "another network"
            )
    shapes = {}
    for name, layer in _matching(network, config["target_modules"]).items():
        shapes[f"{name}.lora_A.weight"] = (config["r"], layer.in_features)
        shapes[f"{name}.lora_B.weight"] = (layer.out_features, config["r"])
    if odd := sorted(set(shapes) ^ set(weights)):
        what = "lacks" if odd[0] in shapes else "has no place for"
        raise UserError(f"LoRA {path}: {what} {odd[0]}; expected the adapters of {type(network).__name__}")
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != shape:
            raise UserError(
                f"LoRA {path}: {name} is {tuple(weights[name].shape)}, but this network's layer takes {shape}; it was "
                "made for another network"
            )
