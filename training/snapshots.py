"""Snapshots of the tracked averages over a training, and the average of any other width made of them afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from training import checkpoint
from training.ema import WIDTHS, posthoc_coefficients
from training.sharding import whole

FOLDER = "snapshots"


def due(step: int, steps: int, count: int) -> bool:
    """Whether one of `count` snapshots, spread evenly over `steps` and ending with the last, falls on `step`."""
    return step * count // steps != (step - 1) * count // steps


def take(folder: Path, step: int, averages: Mapping[str, Mapping[str, Tensor]], accelerator: Accelerator) -> None:
    """Write `folder/snapshots/step-NNNNNNNN`: a file for each tracked width, "ema-WIDTH". All processes have to ask."""
    tensors = {file: {name: whole(t) for name, t in values.items()} for file, values in averages.items()}
    if accelerator.is_main_process:
        checkpoint.save(folder / FOLDER, step, tensors, {"step": step})
    accelerator.wait_for_everyone()


def at_width(folder: Path, step: int, width: float) -> dict[str, Tensor]:
    """The trained tensors' average of any `width` at `step`, in float32, by name.

    Raises ValueError where no snapshot was taken at `step`, or one is damaged.
    """
    taken = [path for path in checkpoint.every(folder / FOLDER) if _step(path) <= step]
    weights = iter(posthoc_coefficients([(_step(path), tracked) for path in taken for tracked in WIDTHS], step, width))
    total: dict[str, Tensor] = {}
    for path in taken:  # one at a time: there may be many, and large
        files = checkpoint.load(path)[0]
        for tracked in WIDTHS:
            weight = float(next(weights))
            for name, tensor in files[f"ema-{tracked}"].items():
                total[name] = total.get(name, 0) + weight * tensor.double()
    return {name: tensor.float() for name, tensor in total.items()}


@torch.no_grad()
def put(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give `module` those of its parameters that were averaged."""
    parameters = dict(module.named_parameters())
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
