"""Atomic checkpoints: safetensors and JSON in a folder, with a manifest of SHA-256 written last.

Nothing here can execute code when it is loaded.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd_mini.errors import UserError
from sd_mini.files import atomic_folder, combined_hash, file_hash, file_hashes, sync

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-\d{8}")


def save(
    root: Path,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    keep_last: int | None = None,
    keep_every: int | None = None,
) -> Path:
    """Write `root/step-NNNNNNNN`: a safetensors file for each entry of `tensors`, and `state` as JSON.

    Only when it is complete on disk are older ones pruned, but for the newest `keep_last` (None: all are kept) and
    multiples of `keep_every`. Raises UserError, with nothing changed, for a tensor that is not finite and for an error
    of the disk.
    """
    folder = root / f"step-{step:08d}"
    _check_finite(tensors, step)
    try:
        for partial in root.glob(".step-*.partial"):  # of interrupted saves
            shutil.rmtree(partial)
        with atomic_folder(folder) as partial:
            files = _write(partial, tensors, state)
            manifest = {"step": step, "torch": torch.__version__, "sd_mini": version("sd-mini"), "files": files}
            manifest["hash"] = combined_hash(manifest)
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder}: the checkpoint cannot be written ({_reason(error)}); the older ones are as they were: make "
            "room, or mend the folder's permissions, and run the same command again"
        ) from error
    if keep_last is not None:
        older = [f for f in _folders(root) if f.name <= folder.name][:-keep_last]
        for old in older:
            if keep_every is None or int(old.name[-8:]) % keep_every:
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


def find(path: Path, stage: str) -> Path:
    """A checkpoint's folder, or one that holds `checkpoints/` of a stage or of a run => the newest valid one there.

    Raises UserError if there is none, or only a snapshot.
    """
    roots = (path, path / "checkpoints", path / stage / "checkpoints")
    if _NAME.fullmatch(path.name):
        complaint = damage(path) if path.is_dir() else "no such folder"
        folder, complaints = (path, []) if complaint is None else (None, [complaint])
    else:
        folder, complaints = next((result for result in map(newest, roots) if any(result)), (None, []))
    if folder is None and complaints:
        raise UserError(f"{path}: expected a whole checkpoint, but {complaints[0]}; give another one")
    if folder is None:
        raise UserError(f"{path}: expected a checkpoint (step-NNNNNNNN), or a folder of them; there is none")
    if "config" not in load_state(folder):
        raise UserError(f"{folder}: expected a training's checkpoint, this is a snapshot; give one of checkpoints/")
    return folder


def named(folder: Path, step: int) -> Path:
    """Where a stage's checkpoint of that step lies, if it is still there."""
    return folder / "checkpoints" / f"step-{step:08d}"


def every(root: Path) -> tuple[list[Path], list[str]]:
    """(all valid ones, oldest first; what is wrong with each of the others)."""
    complaints = {folder: damage(folder) for folder in _folders(root)}
    valid = [folder for folder, complaint in complaints.items() if complaint is None]
    return valid, [f"{folder}: {complaint}" for folder, complaint in complaints.items() if complaint is not None]


def set_aside(root: Path) -> None:
    """Rename the damaged ones in `root`: they are kept, and no longer count as checkpoints."""
    for folder in _folders(root):
        if damage(folder) is not None:
            aside = folder.with_name(f"{folder.name}.damaged")
            if aside.exists():
                shutil.rmtree(aside)
            os.rename(folder, aside)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None: every file, and the manifest, is compared with its SHA-256."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files, step, expected = manifest["files"], manifest["step"], manifest.pop("hash")
        sealed = combined_hash(manifest) == expected and folder.name == f"step-{step:08d}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is missing or not readable"
    if not sealed:
        return f"{MANIFEST} is damaged, or of another checkpoint"
    try:
        hashes = file_hashes(folder, MANIFEST)
    except OSError as error:  # of the disk: an older checkpoint may be readable
        return f"{Path(error.filename or folder).name} is not readable ({error.strerror})"
    wrong = [name for name in files if hashes.get(name) != files[name]]
    return f"{wrong[0]} is {'damaged' if wrong[0] in hashes else 'missing'}" if wrong else None


def load(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(tensors by file, state) of a checkpoint that `damage` finds nothing wrong with.

    Raises ValueError for a file that is not safetensors or JSON, whatever its hash.
    """
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    paths = [folder / name for name in manifest["files"] if name.endswith(".safetensors")]
    try:
        return {path.name.removesuffix(".safetensors"): load_file(path) for path in paths}, load_state(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: expected safetensors, not readable as such ({_reason(error)})") from error


def load_state(folder: Path) -> dict[str, Any]:
    """The `state` that was saved. Raises ValueError where it is no JSON."""
    try:
        return json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}/state.json: expected JSON, not readable as such ({_reason(error)})") from error


def check_keys(where: str, saved: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raises UserError that names the first tensor that is missing, unknown, or of another shape."""
    for name, tensor in expected.items():
        if name not in saved:
            extra = sorted(saved.keys() - expected.keys())
            hint = f"; it holds {extra[0]!r}, which has no place here" if extra else ""
            raise UserError(f"{where}: {name!r} is missing{hint}; expected a checkpoint of this very network")
        if saved[name].shape != tensor.shape:
            shapes = f"{tuple(saved[name].shape)}, expected {tuple(tensor.shape)}"
            raise UserError(f"{where}: {name!r} has shape {shapes}: give the checkpoint of this very network")
    if extra := sorted(saved.keys() - expected.keys()):
        raise UserError(f"{where}: {extra[0]!r} has no place here; expected a checkpoint of this very network")


def check_identity(folder: Path, state: dict[str, Any], now: dict[str, str]) -> None:
    """Raises UserError if the data or the other stages are not those the checkpoint was trained on."""
    for name, digest in now.items():
        then = str(state["identity"].get(name))
        if then != digest:
            raise UserError(
                f"{folder} was trained on {name} {then[:12]}, which is now {digest[:12]}; put the old one back, or "
                "delete the stage's folder to start again"
            )


def _check_finite(tensors: dict[str, dict[str, Tensor]], step: int) -> None:
    for file, values in tensors.items():
        for name, tensor in values.items():
            # the sum reads the memory once; it is not finite if a value is not, or if it overflows
            if tensor.is_floating_point() and not tensor.sum().isfinite() and not tensor.isfinite().all():
                raise UserError(
                    f"step {step}: {name!r} of {file} is not finite, so no checkpoint is written; older ones are "
                    "as they were: look at the samples since then, or start another --run with a lower train.lr"
                )


def _write(folder: Path, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> dict[str, str]:
    """Write and sync every file of a checkpoint but its manifest; returns SHA-256 by file name.

    While one file is written the one before is hashed and synced: both release the GIL.
    """
    hashes, synced = {}, []
    with ThreadPoolExecutor(4) as pool:
        for name, values in tensors.items():
            save_file(_ready(values), path := folder / f"{name}.safetensors")
            hashes[path.name] = pool.submit(file_hash, path)
            synced.append(pool.submit(sync, path))
        (path := folder / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        hashes[path.name] = pool.submit(file_hash, path)
        synced.append(pool.submit(sync, path))
    for done in synced:
        done.result()  # raises an error of the disk
    return {name: digest.result() for name, digest in hashes.items()}


def _ready(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """As safetensors requires: on the CPU, contiguous, without shared memory (tied weights have it)."""
    ready: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in values.items():
        tensor = value.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        ready[name] = tensor
    return ready


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split())


def _folders(root: Path) -> list[Path]:
    return sorted(f for f in root.glob("step-*") if _NAME.fullmatch(f.name)) if root.is_dir() else []
