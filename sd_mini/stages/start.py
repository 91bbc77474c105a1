"""An autoencoder to start from: an exported stage, or any stock diffusers autoencoder's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from sd_mini.autoencoder.model import KINDS, Autoencoder
from sd_mini.errors import UserError
from sd_mini.files import CONTRACT, PIPELINE_MARK
from sd_mini.stages.contract import load_stage
from sd_mini.weights import load_complete, reason

_IN_PIPELINE = ("vae", "autoencoder")  # where a pipeline keeps it: a stock one, one of ours


def load_autoencoder(name: str | Path) -> tuple[Autoencoder, dict[str, Any] | None]:
    """An exported stage's folder => the autoencoder and the stage's contract; an `Autoencoder` or a stock diffusers
    autoencoder (AutoencoderKL, AutoencoderDC, VQModel, AutoencoderTiny), by its folder, the folder of a pipeline that
    it is part of, or hub name, => it and none.

    A stock folder says how its latents were once scaled; that is not taken over, as it was measured on other pictures.
    Raises ValueError, one line, where there is none, it is of another class or its weights cannot be read.
    """
    folder = Path(name)
    if (folder / CONTRACT).is_file():
        stage = load_stage(folder, "autoencoder")
        return stage.parts["autoencoder"], stage.contract
    if (folder / PIPELINE_MARK).is_file():
        folder = next((folder / part for part in _IN_PIPELINE if (folder / part / "config.json").is_file()), folder)
        name = folder
    classes = {cls.__name__: cls for cls in (Autoencoder, *KINDS.values())}
    found = _class_name(folder) if folder.is_dir() else _hub_class(str(name))
    if found not in classes:
        raise UserError(
            f"{name}: config.json names class {found!r}, which is none of {', '.join(sorted(classes))}; in a "
            "pipeline's folder the autoencoder is one below (vae/)"
        )
    try:
        loaded = load_complete(classes[found], str(name), str(name), dtype=torch.float32)
    except UserError:
        raise
    except Exception as error:  # the libraries raise whatever their parsers do, bare Exceptions among it
        raise UserError(f"{name}: cannot be loaded ({reason(error)})") from None
    return (loaded if isinstance(loaded, Autoencoder) else wrapped(loaded)), None


def wrapped(network: Any) -> Autoencoder:
    """A stock autoencoder => an `Autoencoder` around it, its statistics not yet measured."""
    kind = next(kind for kind, cls in KINDS.items() if cls is type(network))
    fields = set(type(network)._get_init_keys(type(network)))
    config = {key: value for key, value in network.config.items() if key in fields}
    if config["in_channels"] != 3:
        raise UserError(f"the autoencoder takes pictures of {config['in_channels']} channels; expected 3")
    autoencoder = Autoencoder(kind, config)
    autoencoder.network.load_state_dict(network.state_dict())
    return autoencoder


def _class_name(folder: Path) -> str | None:
    path = folder / "config.json"
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"
        raise UserError(f"{folder}: no autoencoder here (config.json is missing; there is {there})")
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("_class_name")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None


def _hub_class(name: str) -> str | None:
    try:
        config: Any = Autoencoder.load_config(name)
        return config.get("_class_name")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name}: no such folder, and not to be had as a hub name ({' '.join(str(error).split())[:200]})"
        ) from None
