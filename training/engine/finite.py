"""Stopping at a loss, a gradient or a weight that is no number, without making the device wait."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from sd_mini.errors import UserError


class FiniteWatch:
    """Notes each step's gradient norm, and looks at it when the next step begins or anything is about to be written.

    A non-finite batch, gradient or weight makes the norm non-finite. Reading it at once would make the host wait for a
    GPU at every step; one step later it has long been there. What is not finite is never saved.
    """

    def __init__(self) -> None:
        self._noted: list[tuple[int, np.ndarray, Tensor, list[tuple[np.ndarray, Tensor]], torch.cuda.Event | None]] = []

    def note(self, step: int, ids: np.ndarray, norm: Tensor, losses: list[tuple[np.ndarray, Tensor]]) -> None:
        """`step` as it is logged, from 1; `ids` of the global batch; `losses` (b,) of this process's passes."""
        event = None
        if norm.device.type == "cuda":
            host = torch.empty((), dtype=norm.dtype, pin_memory=True).copy_(norm.detach(), non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            host = norm.detach().cpu()
        self._noted.append((step, ids, host, losses, event))

    def check(self) -> None:
        """Raises ValueError, with the samples, when a noted norm is not finite."""
        for step, ids, norm, losses, event in self._noted:
            if event is not None:
                event.synchronize()
            if not math.isfinite(norm.numpy()):
                suspects = [int(i) for own, values in losses for i in own[~torch.isfinite(values).cpu().numpy()]]
                culprits = f", and the loss of {suspects} is not" if suspects else ""
                raise UserError(
                    f"step {step}: the gradient is not finite{culprits}; the batch was {ids.tolist()}: look at those "
                    "samples, or start another --run with a lower train.lr"
                )
        self._noted.clear()
