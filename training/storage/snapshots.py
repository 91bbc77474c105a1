"""Snapshots of the tracked averages over a training, and the average of any other width computed from them."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from sd_mini.files import atomic_folder
from sd_mini.processes import wait_for_everyone
from training.engine.learner import gathered
from training.optim.ema import WIDTHS, posthoc_coefficients
from training.storage import checkpoint

FOLDER = "snapshots"


def due(step: int, steps: int, count: int) -> bool:
    """Whether one of `count` snapshots, spread evenly over `steps` and ending with the last, falls on `step`."""
    return step * count // steps != (step - 1) * count // steps


def take(folder: Path, step: int, averages: Mapping[str, Mapping[str, Tensor]], accelerator: Accelerator) -> None:
    """Write `folder/snapshots/step-NNNNNNNN`: a file for each tracked width, "ema-WIDTH". A collective."""
    tensors = {file: gathered(values, accelerator) for file, values in averages.items()}
    if accelerator.is_main_process:
        checkpoint.save(folder / FOLDER, step, tensors, {"step": step})
    wait_for_everyone()


def at_width(folder: Path, step: int, width: float) -> dict[str, Tensor]:
    """The trained tensors' average of any `width` at `step`, in float32, by name.

    Raises UserError without a snapshot of `step`. Damaged ones are left out, and named on stderr.
    """
    valid, complaints = checkpoint.every(folder / FOLDER)
    for complaint in complaints:
        tqdm.write(f"left out a damaged snapshot: {complaint}", file=sys.stderr)
    earlier = [path for path in valid if _step(path) <= step]
    weights = iter(
        posthoc_coefficients([(_step(path), tracked) for path in earlier for tracked in WIDTHS], step, width)
    )
    total: dict[str, Tensor] = {}
    for path in earlier:  # one at a time, to bound the memory
        files = checkpoint.load(path)[0]
        for tracked in WIDTHS:
            weight = float(next(weights))
            for name, tensor in files[f"ema-{tracked}"].items():
                total[name] = total.get(name, 0) + weight * tensor.double()
    return {name: tensor.float() for name, tensor in total.items()}


def of_step(folder: Path, step: int) -> Path | None:
    """The valid snapshot of that step in a stage's folder; None without one."""
    return next((path for path in checkpoint.every(folder / FOLDER)[0] if _step(path) == step), None)


@torch.no_grad()
def put(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy the averaged parameters into `module`."""
    parameters = dict(module.named_parameters())
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)


def inherit(folder: Path, origin: Path, steps: int, count: int) -> None:
    """Copy the snapshots up to the checkpoint `origin`, where a training begins, from that checkpoint's stage folder.

    The number of missing ones is printed to stderr: a width computed without them is less exact.
    """
    step = _step(origin)
    inherited = [path for path in checkpoint.every(origin.parent.parent / FOLDER)[0] if _step(path) <= step]
    for path in inherited:
        with atomic_folder(folder / FOLDER / path.name) as partial:
            shutil.copytree(path, partial, dirs_exist_ok=True)
    wanted = sum(due(s, steps, count) for s in range(1, step + 1))
    if len(inherited) < wanted:
        tqdm.write(f"{wanted - len(inherited)} of {wanted} snapshots up to step {step} are missing", file=sys.stderr)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
