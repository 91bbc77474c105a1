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

from sd_mini.load_encoder import is_open_clip, load_open_clip
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


def load_tower(name: str, weights: str | None = None) -> VisionTower:
    """A transformers folder or hub name; a timm or open_clip architecture with `weights`, a file; "local-dir:FOLDER" of
    open_clip; "timm/NAME", with timm's own download or `weights` => the tower, frozen.

    Raises ValueError, one line, for what is unknown, cannot be loaded, or has no patches.
    """
    if name.startswith("timm/"):
        tower = _timm(name.removeprefix("timm/"), weights)
    elif is_open_clip(name, weights):
        tower = _open_clip(name, weights)
    else:
        tower = _transformers(name)
    tower.module.requires_grad_(False).eval()
    return tower


def matcher_tower(matcher: Matcher) -> VisionTower:
    """The picture tower that stage 1 has trained from nothing; its last layer's features, before they are pooled.

    Raises ValueError where stage 1 was trained on another tower's features.
    """
    if matcher.config.feature_dim is not None:
        raise ValueError(
            "repa.teacher text_encoder: that stage 1 has no picture tower of its own; name another teacher"
        )
    return VisionTower(matcher.requires_grad_(False).eval(), lambda module, x: module.tower.map(x))


def _timm(name: str, weights: str | None) -> VisionTower:
    try:
        import timm
    except ImportError:
        raise ValueError(f"timm/{name}: timm towers need the package timm; pip install it") from None
    if weights is not None and not Path(weights).is_file():
        raise ValueError(f"timm/{name}: no weights file {weights}; give its path")
    try:
        module = timm.create_model(name, pretrained=weights is None, checkpoint_path=weights or "", num_classes=0)
    except Exception as error:  # whatever its parsers, torch's and the hub's raise
        raise ValueError(f"timm/{name}: cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    config = module.pretrained_cfg

    def read(module: nn.Module, x: Tensor) -> Tensor:
        found = module.forward_features(x)
        return found if found.ndim == 4 else as_grid(found[:, module.num_prefix_tokens :])

    side = getattr(getattr(module, "patch_embed", None), "img_size", None) or config["input_size"][1:]
    return VisionTower(module, read, side[0], config["mean"], config["std"])


def _open_clip(name: str, weights: str | None) -> VisionTower:
    model, _ = load_open_clip(name, weights)
    visual = model.visual
    if not hasattr(visual, "forward_intermediates"):
        raise ValueError(f"open_clip {name!r}: its {type(visual).__name__} gives no patch features; name another tower")
    side = visual.image_size[0] if isinstance(visual.image_size, tuple) else visual.image_size

    def read(module: nn.Module, x: Tensor) -> Tensor:
        return module.forward_intermediates(x, indices=1, intermediates_only=True)["image_intermediates"][-1]

    return VisionTower(visual, read, side, visual.image_mean or _HALF, visual.image_std or _HALF)


def _transformers(name: str) -> VisionTower:
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(name)
        module: Any = AutoModel.from_pretrained(name, use_safetensors=True, dtype=torch.float32)
    except Exception as error:  # whatever its parsers and the hub's client raise
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"vision tower {name}: cannot be loaded ({reason}); give a folder that transformers saved"
        ) from error
    module, vision = getattr(module, "vision_model", module), getattr(config, "vision_config", config)
    if not hasattr(vision, "patch_size") or not hasattr(vision, "image_size"):
        raise ValueError(f"vision tower {name}: a {config.model_type}, which has no patches; give a ViT such as DINOv2")
    rows = vision.image_size // vision.patch_size

    def read(module: nn.Module, x: Tensor) -> Tensor:
        return as_grid(
            module(pixel_values=x).last_hidden_state[:, -(rows**2) :]
        )  # class and register tokens come first

    return VisionTower(module, read, vision.image_size, *_colours(Path(name)))


def _colours(folder: Path) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and std of a transformers folder's pictures; half each where it does not say."""
    path = folder / "preprocessor_config.json"
    said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return said.get("image_mean", _HALF), said.get("image_std", _HALF)


def as_grid(tokens: Tensor) -> Tensor:
    """(B, N, K) patch tokens, row by row of a square => (B, K, sqrt N, sqrt N). Raises ValueError for no square."""
    side = round(tokens.shape[1] ** 0.5)
    if side**2 != tokens.shape[1]:
        raise ValueError(f"{tokens.shape[1]} patch features: expected a square number, of a square picture")
    return tokens.mT.unflatten(2, (side, side))
