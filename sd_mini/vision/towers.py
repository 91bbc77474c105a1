"""Frozen vision towers by name or folder, of transformers, timm or open_clip: pictures => a grid of patch features."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from sd_mini.errors import UserError
from sd_mini.text_encoder.loading import load_open_clip
from sd_mini.text_encoder.matcher import Matcher
from sd_mini.weights import check_found, load_complete, quiet, reason

_HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class VisionTower:
    """`module` is what is moved, hashed and called; `read(module, x)`: x (B, 3, side, side) => (B, K, rows, columns).

    `side`: px that pictures are resized to, none: as they are. `mean`, `std`: of [0, 1] colours, a channel each.
    """

    module: nn.Module
    read: Callable[[Any, Tensor], Tensor]
    side: int | None = None
    mean: Sequence[float] = _HALF
    std: Sequence[float] = _HALF

    @torch.no_grad()
    def grid(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, R, R) in [-1, 1] => features of patches (B, K, rows, columns)."""
        mean, std = (
            torch.tensor(v, device=pixels.device, dtype=pixels.dtype)[:, None, None] for v in (self.mean, self.std)
        )
        x = ((pixels + 1) / 2 - mean) / std
        if self.side is not None and pixels.shape[-1] != self.side:
            x = interpolate(x, (self.side, self.side), mode="bicubic", antialias=True)
        return self.read(self.module, x)


def load_tower(name: str) -> VisionTower:
    """transformers:FOLDER (or a hub name), timm:MODEL[=FILE] or open_clip:ARCHITECTURE=FILE => the tower, frozen.

    timm:local-dir:FOLDER, open_clip:local-dir:FOLDER and open_clip:hf-hub:NAME as those libraries have them. Raises
    ValueError, one line, for what is unknown, cannot be loaded, or has no patches.
    """
    kind, _, rest = name.partition(":")
    place, _, weights = rest.partition("=")
    if kind not in _KINDS or not place:
        raise UserError(
            f"vision tower {name!r}: expected transformers:FOLDER, timm:MODEL[=FILE] or open_clip:ARCHITECTURE=FILE"
        )
    tower = _KINDS[kind](place, weights or None)
    tower.module.requires_grad_(False).eval()
    return tower


def open_timm(model: str, weights: str | None) -> nn.Module:
    """A timm model without its head, with `weights`, a file, or its own download.

    Raises ValueError, one line; for a file that lacks a tensor of the model, too.
    """
    try:
        import timm
    except ImportError:
        raise UserError(f"timm:{model}: timm models need the package timm; pip install 'sd-mini[train]'") from None
    if weights is not None and not Path(weights).is_file():
        raise UserError(f"timm:{model}: no weights file {weights}; give its path")
    what, folder = f"timm model {model!r}", Path(model.removeprefix("local-dir:"))
    try:
        if model.startswith("local-dir:"):
            found = [file for file in ("model.safetensors", "pytorch_model.bin") if (folder / file).is_file()]
            weights = weights or (str(folder / found[0]) if found else None)
        if weights is None:
            return timm.create_model(model, pretrained=True, num_classes=0)
        tensors = timm.models.load_state_dict(weights, weights_only=True)
        network, missing = _filled(model, tensors)
    except Exception as error:  # whatever its parsers, torch's and the hub's raise
        raise UserError(cannot_load(what, error)) from error
    check_found(f"{what} from {weights}", missing)
    return network


def _filled(model: str, tensors: dict[str, Tensor]) -> tuple[nn.Module, list[str]]:
    """The timm model with `tensors`, and the names of its own that were not among them.

    timm renames and reshapes what a file holds, and loads what fits: so the same names are loaded once with NaN alone,
    and what is finite then was not there.
    """
    import timm

    def filled(state: dict[str, Any]) -> nn.Module:
        # as a source of timm's own, whose converter is the model's
        source = {"state_dict": state, "source": "timm", "custom_load": False}
        with quiet():
            network = timm.create_model(model, pretrained=True, num_classes=0, pretrained_cfg_overlay=source)
        for name in ("pretrained_cfg", "default_cfg"):  # the whole file would stay in memory
            getattr(network, name).pop("state_dict", None)
        return network

    floats = {name: t for name, t in tensors.items() if isinstance(t, Tensor) and t.is_floating_point()}
    probe = filled({**tensors, **{name: torch.full_like(t, torch.nan) for name, t in floats.items()}})
    missing = [name for name, t in probe.state_dict().items() if t.is_floating_point() and not t.isnan().all()]
    return (probe if missing else filled(dict(tensors))), missing


def open_transformers(folder: str) -> nn.Module:
    """What AutoModel makes of a folder or hub name, in float32, from safetensors. Raises ValueError, one line.

    A pooler that is not among its weights is left out.
    """
    from transformers import AutoModel

    what, drawn = f"transformers model {folder!r}", []

    def is_pooler(key: str) -> bool:
        if "pooler" in key.split("."):
            drawn.append(key)
        return bool(drawn) and drawn[-1] == key

    try:
        network = load_complete(AutoModel, folder, what, is_pooler, trust_remote_code=False, dtype=torch.float32)
    except UserError:
        raise
    except Exception as error:  # whatever its parsers and the hub's client raise
        raise UserError(cannot_load(what, error)) from error
    for key in drawn:
        parent, _, _ = key.partition("pooler")
        network.get_submodule(parent.rstrip(".")).pooler = None
    return network


def cannot_load(what: str, error: Exception) -> str:
    return f"{what} cannot be loaded ({reason(error)}); where there is no hub, give a file or a folder"


def matcher_tower(matcher: Matcher) -> VisionTower:
    """The picture tower that stage 1 has trained from nothing; its last layer's features, before they are pooled.

    Raises ValueError where stage 1 was trained on another tower's features.
    """
    if matcher.config.feature_dim is not None:
        raise UserError("repa.teacher text_encoder: that stage 1 has no picture tower of its own; name another teacher")
    return VisionTower(matcher.requires_grad_(False).eval(), lambda module, x: module.tower.map(x))


def _timm(model: str, weights: str | None) -> VisionTower:
    module: Any = open_timm(model, weights)
    config = module.pretrained_cfg

    def read(module: Any, x: Tensor) -> Tensor:
        found = module.forward_features(x)
        return found if found.ndim == 4 else as_grid(found[:, module.num_prefix_tokens :])

    side = getattr(getattr(module, "patch_embed", None), "img_size", None) or config["input_size"][1:]
    return VisionTower(module, read, side[0], config["mean"], config["std"])


def _open_clip(architecture: str, weights: str | None) -> VisionTower:
    visual = load_open_clip(architecture, weights)[0].visual
    if not hasattr(visual, "forward_intermediates"):
        kind = type(visual).__name__
        raise UserError(f"open_clip:{architecture}: its {kind} gives no patch features; name another tower")
    side = visual.image_size[0] if isinstance(visual.image_size, tuple) else visual.image_size

    def read(module: Any, x: Tensor) -> Tensor:
        return module.forward_intermediates(x, indices=1, intermediates_only=True)["image_intermediates"][-1]

    return VisionTower(visual, read, side, visual.preprocess_cfg["mean"], visual.preprocess_cfg["std"])


def _transformers(folder: str, weights: str | None) -> VisionTower:
    whole: Any = open_transformers(folder)
    module, vision = getattr(whole, "vision_model", whole), getattr(whole.config, "vision_config", whole.config)
    if weights is not None or not hasattr(vision, "patch_size") or not hasattr(vision, "image_size"):
        raise UserError(f"transformers:{folder}: a {whole.config.model_type}; expected a ViT with patches, as DINOv2")
    side, mean, std = _processing(folder)
    side = side or vision.image_size
    rows = side // vision.patch_size
    # a picture of another size than the places that the tower learnt: they are interpolated, by itself or when told
    told = side != vision.image_size and "interpolate_pos_encoding" in inspect.signature(module.forward).parameters
    more = {"interpolate_pos_encoding": True} if told else {}

    def read(module: nn.Module, x: Tensor) -> Tensor:
        states = module(pixel_values=x, **more).last_hidden_state
        return as_grid(states[:, -(rows**2) :])  # class and register tokens come first

    return VisionTower(module, read, side, mean, std)


_KINDS = {"timm": _timm, "open_clip": _open_clip, "transformers": _transformers}


def _processing(name: str) -> tuple[int | None, Sequence[float], Sequence[float]]:
    """Side in px (none: it does not say), mean and std of the pictures that a transformers model was trained on, by the
    image processor of its folder or hub name. Raises ValueError, one line, where there is none."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        said, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except Exception as error:  # whatever its parsers and the hub's client raise
        raise UserError(
            f"transformers:{name}: its image processor (preprocessor_config.json), which says how pictures are "
            f"normalised, cannot be had ({reason(error)}); put it beside the weights"
        ) from error
    if not said.get("do_normalize", True):
        return _side(said), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if "image_mean" not in said or "image_std" not in said:
        raise UserError(
            f"transformers:{name}: its preprocessor_config.json names no image_mean and image_std; add them"
        )
    return _side(said), said["image_mean"], said["image_std"]


def _side(said: Mapping[str, Any]) -> int | None:
    """The side of the square that an image processor makes: of the crop, else what it resizes to."""
    size = said.get("crop_size") if said.get("do_center_crop") else said.get("size")
    if isinstance(size, Mapping):
        size = size.get("height", size.get("shortest_edge"))
    return size if isinstance(size, int) else None


def as_grid(tokens: Tensor) -> Tensor:
    """(B, N, K) patch tokens, row by row of a square => (B, K, sqrt N, sqrt N). Raises ValueError for no square."""
    side = round(tokens.shape[1] ** 0.5)
    if side**2 != tokens.shape[1]:
        raise UserError(f"{tokens.shape[1]} patch features: expected a square number, of a square picture")
    return tokens.mT.unflatten(2, (side, side))
