"""Tensors that FSDP2 has split over the processes, beside plain ones: the few things the loop does to both."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def own_part(tensor: Tensor) -> Tensor:
    """The part this process holds; writing to it writes to `tensor`. A plain tensor is its own part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, on every process: all of them have to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(full: Tensor, like: Tensor) -> Tensor:
    """The part of a full tensor that this process would hold were it split as `like` is."""
    if not isinstance(like, DTensor):
        return full
    # every process has the same full tensor, so nothing needs to be sent
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None).to_local()


def joined(part: Tensor, like: Tensor) -> Tensor:
    """The full tensor whose part on each process is `part`, split as `like` is: all of them have to ask."""
    if not isinstance(like, DTensor):
        return part
    shape, stride = like.shape, like.stride()
    return DTensor.from_local(part, like.device_mesh, like.placements, shape=shape, stride=stride).full_tensor()
