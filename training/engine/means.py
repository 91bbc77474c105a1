"""Running means of what a training logs, kept on the device until a line is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor


class Means:
    """Sums by name over the updates since the last line; a name that began later counts fewer updates."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self._added: set[str] = set()  # by this update

    def add(self, shares: Mapping[str, Tensor]) -> None:
        """Parts of this update's values."""
        for name, value in shares.items():
            self.sums[name] = self.sums.get(name, 0) + value.float()
            self._added.add(name)

    def count(self) -> None:
        """An update is over."""
        self.counts = {name: self.counts.get(name, 0) + (name in self._added) for name in self.sums}
        self._added = set()

    def take(self) -> dict[str, float]:
        """The means over updates and processes; from here on anew. All processes have to ask."""
        values = self.accelerator.reduce(torch.stack(list(self.sums.values())), "mean").tolist()
        means = {name: value / self.counts[name] for name, value in zip(self.sums, values, strict=True)}
        self.sums, self.counts = {}, {}
        return means

    def save(self) -> dict[str, Tensor]:
        """The sums of all processes, (1,) each, which this process goes on adding to as a resumed one would."""
        if not self.sums:
            return {}
        sums = self.accelerator.reduce(torch.stack(list(self.sums.values())), "mean")
        self.sums = dict(zip(self.sums, sums.unbind(), strict=True))
        return {name: value.view(1) for name, value in self.sums.items()}

    def load(self, counts: Mapping[str, int], tensors: Mapping[str, Any]) -> None:
        """Take back what `save` gave and `counts` were."""
        self.counts = dict(counts)
        self.sums = {name: tensors["sums"][name][0].to(self.accelerator.device) for name in counts}
