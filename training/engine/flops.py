"""How much of the machine a training uses: FLOPs of a step over what the machine can do (MFU, Chowdhery et al. 2022).

The peak is measured, not read from a data sheet: a large matrix product in this process, on this device.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Container
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from training.engine.learner import Others

_TOKEN_INPUTS = ("prompt_embeds", "prompt_mask", "other_embeds", "other_mask")  # with an axis of tokens


def count_flops(objective: nn.Module, trained: Container[str], inputs: dict[str, Tensor]) -> int:
    """FLOPs of one forward and backward pass of `objective(**inputs)`: products and convolutions, 2 for each
    multiply-add. `trained` names the parameters that get a gradient. Prompts count with their average length by
    `prompt_mask`: padding need not be computed."""
    mask = inputs.get("prompt_mask")
    if mask is None:
        return _of_shapes(objective, trained, inputs)
    length = float(mask.sum(1).double().mean())
    shorter, longer = max(1, math.floor(length)), max(1, math.ceil(length))
    below, above = (
        _of_shapes(
            objective,
            trained,
            {**inputs, **{name: inputs[name][:, :tokens] for name in _TOKEN_INPUTS if name in inputs}},
        )
        for tokens in (shorter, longer)
    )
    return round(below + (above - below) * max(0.0, length - shorter))


def _of_shapes(objective: nn.Module, trained: Container[str], inputs: dict[str, Tensor]) -> int:
    """By fake tensors of the same shapes: nothing is computed and no memory is allocated."""
    with FakeTensorMode(allow_non_fake_inputs=True) as fakes:
        parts = _fake_parts(objective, trained)
        others = _others(objective)
        for one in dict.fromkeys(module for some in others for module in some if module is not None):
            parts |= _fake_parts(one, ())
        device = next(objective.parameters()).device  # the inputs may still wait on the CPU
        fake_inputs = {name: _fake(value, device) for name, value in inputs.items()}
    # the memo maps each weight to its fake; modules that are not trained here are not copied by themselves
    for some in reversed(others):
        parts[id(some)] = Others(copy.deepcopy(module, parts) for module in some)
    module = copy.deepcopy(objective, parts)
    with fakes, FlopCounterMode(display=False) as counter:
        losses, _ = module(**fake_inputs)
        losses.sum().backward()
    return counter.get_total_flops()


def _fake_parts(module: nn.Module, trained: Container[str]) -> dict[int, Any]:
    """In a FakeTensorMode: by id, a fake of each parameter and buffer."""
    parts: dict[int, Any] = {
        id(p): nn.Parameter(_fake(p), requires_grad=name in trained) for name, p in module.named_parameters()
    }
    return parts | {id(buffer): _fake(buffer) for buffer in module.buffers()}


def _others(module: nn.Module) -> list[Others]:
    """What the module calls and does not train, and what that calls in turn."""
    own = [value for part in module.modules() for value in vars(part).values() if isinstance(value, Others)]
    return own + [inner for some in own for one in some if one is not None for inner in _others(one)]


def _fake(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """In a FakeTensorMode: a tensor of that shape, memory order and dtype, on `device` or the tensor's device."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device or tensor.device)


@lru_cache
def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a matrix product in this process: 2048^3 on a CPU, 8192^3 on a GPU; the best of five.

    A CPU that only emulates `dtype` (bfloat16 without AVX512-BF16 or AMX) would take minutes for 2048^3; there it is
    256^3.
    """
    if device.type == "cuda":
        return _product_rate(8192, device, dtype)
    small = _product_rate(256, device, dtype)
    return _product_rate(2048, device, dtype) if 2 * 2048**3 / small < 2.0 else small


def _product_rate(side: int, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of five products of two (side, side) matrices."""
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
