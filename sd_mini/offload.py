"""Models that are on the device only while they compute: by Accelerate, by diffusers' group offloading, or by us."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes: of an offloaded one, whose weights lie elsewhere meanwhile, where they will be."""
    for module in model.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        group = _group_hook(module)
        if group is not None:
            return torch.device(group.config.onload_device)
    return next(model.parameters()).device


@contextmanager
def on_device(models: Iterable[nn.Module], device: torch.device) -> Generator[None]:
    """In which models compute on `device`; afterwards they are on the CPU, and the device has its memory back."""
    models = list(models)
    try:
        for model in models:
            model.to(device)
        yield
    finally:
        if device.type != "cpu":
            for model in models:
                model.to("cpu")
            torch.cuda.empty_cache()


@contextmanager
def onloaded(model: nn.Module) -> Generator[None]:
    """In which the tensors that `model` has beside its offloaded blocks or layers are where it computes."""
    hook = _group_hook(model)
    if hook is None:
        yield
        return
    hook.pre_forward(model)
    try:
        yield
    finally:
        hook.post_forward(model, None)


def brings_in(method: Callable[..., Any]) -> Callable[..., Any]:
    """A module's method that works as its forward does while the module is offloaded: hooks see `forward` alone."""
    accelerated = apply_forward_hook(method)

    @functools.wraps(method)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with onloaded(self):
            return accelerated(self, *args, **kwargs)

    return wrapper


def is_offloaded_by_layers(model: nn.Module) -> bool:
    """Whether its layers are brought in one after the other, from memory, disk or groups (not the model as a whole)."""
    return _group_hook(model) is not None or any(parameter.device.type == "meta" for parameter in model.parameters())


def _group_hook(module: nn.Module) -> Any:
    registry = getattr(module, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook("group_offloading")
