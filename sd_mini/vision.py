"""Frozen vision towers by name or folder, of transformers, timm or open_clip: pictures => a grid of patch features."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from sd_mini.errors import UserError
from sd_mini.load_encoder import load_open_clip
from sd_mini.retrieval import Matcher

_HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class VisionTower:
    """`module` is what is moved, hashed and called; `read(module, x)`: x (B, 3, side, side) => (B, K, rows, columns).

    `side`: px that pictures are resized to, none: as they are. `mean`, `std`: of [0, 1] colours, a channel each.
    """

    module: nn.Module
    read: Callable[[nn.Module, Tensor], Tensor]
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
    """A timm model without its head, with `weights`, a file, or its own download. Raises ValueError, one line."""
    try:
        import timm
    except ImportError:
        raise UserError(f"timm:{model}: timm models need the package timm; pip install 'sd-mini[train]'") from None
    if weights is not None and not Path(weights).is_file():
        raise UserError(f"timm:{model}: no weights file {weights}; give its path")
    source = {"file": weights} if weights is not None else None
    try:
        return timm.create_model(model, pretrained=True, num_classes=0, pretrained_cfg_overlay=source)
    except Exception as error:  # whatever its parsers, torch's and the hub's raise
        raise UserError(cannot_load(f"timm model {model!r}", error)) from error


def open_transformers(folder: str) -> nn.Module:
    """What AutoModel makes of a folder or hub name, in float32, from safetensors. Raises ValueError, one line."""
    from transformers import AutoModel

    try:
        return AutoModel.from_pretrained(folder, trust_remote_code=False, use_safetensors=True, dtype=torch.float32)
    except Exception as error:  # whatever its parsers and the hub's client raise
        raise UserError(cannot_load(f"transformers model {folder!r}", error)) from error


def cannot_load(what: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:300]
    return f"{what} cannot be loaded ({reason}); where there is no hub, give a file or a folder"


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

    return VisionTower(visual, read, side, visual.image_mean or _HALF, visual.image_std or _HALF)


def _transformers(folder: str, weights: str | None) -> VisionTower:
    whole: Any = open_transformers(folder)
    module, vision = getattr(whole, "vision_model", whole), getattr(whole.config, "vision_config", whole.config)
    if weights is not None or not hasattr(vision, "patch_size") or not hasattr(vision, "image_size"):
        raise UserError(f"transformers:{folder}: a {whole.config.model_type}; expected a ViT with patches, as DINOv2")
    rows = vision.image_size // vision.patch_size

    def read(module: nn.Module, x: Tensor) -> Tensor:
        states = module(pixel_values=x).last_hidden_state
        return as_grid(states[:, -(rows**2) :])  # class and register tokens come first

    return VisionTower(module, read, vision.image_size, *_colours(Path(folder)))


_KINDS = {"timm": _timm, "open_clip": _open_clip, "transformers": _transformers}


def _colours(folder: Path) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and std of a transformers folder's pictures; half each where it does not say."""
    path = folder / "preprocessor_config.json"
    said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return said.get("image_mean", _HALF), said.get("image_std", _HALF)


def as_grid(tokens: Tensor) -> Tensor:
    """(B, N, K) patch tokens, row by row of a square => (B, K, sqrt N, sqrt N). Raises ValueError for no square."""
    side = round(tokens.shape[1] ** 0.5)
    if side**2 != tokens.shape[1]:
        raise UserError(f"{tokens.shape[1]} patch features: expected a square number, of a square picture")
    return tokens.mT.unflatten(2, (side, side))
