"""Checkpoints that are whole or not there: safetensors and JSON in a folder, a manifest of SHA-256 written last.

Nothing here can execute code when it is loaded.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd_mini.stages import atomic_folder, combined_hash, file_hashes

MANIFEST = "manifest.json"


def save(root: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], keep_last: int) -> Path:
    """Write `root/step-NNNNNNNN`; only when it is complete on disk are checkpoints older than `keep_last` pruned."""
    folder = root / f"step-{step:08d}"
    with atomic_folder(folder) as partial:
        for name, values in tensors.items():
            save_file({k: v.detach().cpu().contiguous() for k, v in values.items()}, partial / f"{name}.safetensors")
        (partial / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        files = file_hashes(partial, MANIFEST)
        manifest = {"step": step, "torch": torch.__version__, "hash": combined_hash(files), "files": files}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for old in [f for f in _folders(root) if f.name <= folder.name][:-keep_last]:
        shutil.rmtree(old)
    return folder


def newest(root: Path) -> tuple[Path | None, list[str]]:
    """(the newest valid checkpoint or None, what is wrong with each newer one)."""
    complaints = []
    for folder in reversed(_folders(root)):
        complaint = damage(folder)
        if complaint is None:
            return folder, complaints
        complaints.append(f"{folder}: {complaint}")
    return None, complaints


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None: every file has to have the SHA-256 of the manifest."""
    try:
        expected = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return f"{MANIFEST} is missing or not readable"
    found = file_hashes(folder, MANIFEST)
    wrong = [name for name in expected if found.get(name) != expected[name]]
    return f"{wrong[0]} is {'damaged' if wrong[0] in found else 'missing'}" if wrong else None


def load(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(tensors by file, state) of a checkpoint that `newest` has found valid."""
    tensors = {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    return tensors, json.loads((folder / "state.json").read_text(encoding="utf-8"))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as one flat dict, "PARAMETER_NUMBER.NAME" => tensor."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": torch.as_tensor(value) for i, inner in state.items() for name, value in inner.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, flat: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`. The hyperparameters stay as the config made them.

    A moment gets its parameter's strides back: fused AdamW walks both by memory, so a channels_last parameter beside
    a contiguous moment would be updated with other weights' moments.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in flat.items():
        number, name = key.split(".", 1)
        parameter = parameters[int(number)]
        if value.shape == parameter.shape:
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _folders(root: Path) -> list[Path]:
    return sorted(root.glob("step-*")) if root.is_dir() else []
