"""A stage that trains an exported noise predictor further: what `few_steps` and `reward` share."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from diffusers.models.modeling_utils import ModelMixin

from sd_mini import stages
from sd_mini.cpu import accelerate
from sd_mini.diffusion.objective import Process
from sd_mini.processes import process_device
from training.noise_predictor.config import TunedConfig
from training.noise_predictor.task import EncodedTask


class TunedTask(EncodedTask):
    """Begins with an exported noise predictor, `self.start`, which stays as it is; a copy of its network is trained.

    What is exported is a noise predictor like stage 3's: `stage.json` has the start's objective and sampling, and its
    hash as `tuned_from`.
    """

    def __init__(self, config: TunedConfig, run: Path):
        folder = config.noise_predictor or run / "noise_predictor" / "final"
        self.start = stages.load_stage(folder, "noise_predictor")
        self.process = Process.of(self.start.contract)
        super().__init__(config, run)
        self.identity["noise_predictor"] = self.start.hash

    def make_network(self) -> ModelMixin:
        against = {"text_encoder": self.text.contract, "autoencoder": self.vae.contract}
        stages.check_belonging(self.start.contract, **against)
        network = self.start.parts["noise_predictor"]
        if process_device().type == "cpu":
            accelerate(network)  # or not: a network without CPU kernels is trained as it is
        return copy.deepcopy(network).train()

    def facts(self) -> dict[str, Any]:
        inherited = {
            name: self.start.contract[name] for name in ("objective", "sampling") if name in self.start.contract
        }
        return {**inherited, "tuned_from": self.start.hash}
