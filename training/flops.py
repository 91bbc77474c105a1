"""How much of the machine a training uses: FLOPs of a step over what the machine can do (MFU, Chowdhery et al. 2022).

The peak is measured, not read from a data sheet: a large matrix product in this process, on this device.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Container
from contextlib import AbstractContextManager
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def count_flops(
    objective: nn.Module, trained: Container[str], inputs: dict[str, Tensor], autocast: AbstractContextManager
) -> int:
    """FLOPs of one forward and backward pass of `objective(**inputs)`: products and convolutions, 2 for each
    multiply-add. `trained` names the parameters that get a gradient. The pass is made on a copy that is thrown away."""
    module = copy.deepcopy(objective)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in trained)
    with FlopCounterMode(display=False) as counter:
        with autocast:
            losses, _ = module(**inputs)
        losses.sum().backward()
    return counter.get_total_flops()


@lru_cache
def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a matrix product in this process: 2048^3 on a CPU, 8192^3 on a GPU; the best of five."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        _wait(device)
        start = time.perf_counter()
        a @ b
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
