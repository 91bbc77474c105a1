"""Stage 3 trained further by rewards of its own pictures.

accelerate launch -m training.reward --config training/configs/shapes/reward.yaml --run runs/shapes

A round draws pictures by the policy as it is (`Rollouts`), and the updates of the round learn from what they score. The
policy that drew them is part of every checkpoint, so a round that was interrupted is drawn again, the same.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from sd_mini import lora
from sd_mini.data.batches import Batch
from sd_mini.data.captioned import CaptionedPictures
from sd_mini.diffusion.objective import TimeConfig
from sd_mini.errors import UserError
from sd_mini.processes import process_device
from training.engine import launch
from training.noise_predictor.network import NetworkConfig, exported
from training.noise_predictor.tuned import TunedTask
from training.reward.config import NOVELTY, RewardConfig
from training.reward.guards import Guards
from training.reward.losses import RewardObjective
from training.reward.rewards import open_reward
from training.reward.rollouts import Rollouts, Round


class RewardTask(TunedTask):
    def __init__(self, config: RewardConfig, run: Path):
        if os.environ.get("ACCELERATE_USE_FSDP") == "true":
            raise UserError("training.reward: draws by the whole network, which FSDP2 shards; launch it without")
        self.config = config
        self.round: Round | None = None
        self.number = -1  # of `round`
        super().__init__(config, run)
        self.time = TimeConfig.of(self.start.contract)
        self.evaluate_every = config.guards.every * config.updates

    def make_network(self) -> ModelMixin:
        network = super().make_network()
        if self.config.lora.rank:
            lora.add(network, self.config.lora)
        return network

    def make_objective(self, network: ModelMixin, pictures: CaptionedPictures) -> RewardObjective:
        config, device, is_judged = self.config, str(process_device()), pictures.scenes is not None

        def opened(name: str) -> Any:
            return open_reward(name, self.text, device, is_judged)

        rewards = {name: opened(name) for name in config.rewards if name != NOVELTY}
        self.rollouts = Rollouts(config, pictures, rewards)
        if PartialState().is_main_process:
            second = opened(config.guards.judge) if config.guards.judge is not None else None
            self.guards = Guards(config.guards, self.valid_pictures, rewards, config.rewards, second)
        start = self.start.parts["noise_predictor"].to(process_device())  # which the loop moves only what is trained to
        return RewardObjective(network, copy.deepcopy(network), start, self.process, config)

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The rows of the round that this update takes, and its noise and timesteps; of `real`, real pictures' too."""
        config = self.config
        drawn = self._round(batch.step)
        first = batch.step % config.updates * config.train.batch_size
        rows = torch.from_numpy(drawn.order[first : first + len(batch.ids)][batch.rows])
        latents = drawn.latents[rows]
        inputs = {
            "latents": latents,
            "noise": batch.normal("noise", *latents.shape[1:]),
            "timesteps": self.time.draw(batch.stratified("timesteps")),
            "prompt_embeds": drawn.prompt_embeds[rows],
            "prompt_mask": drawn.prompt_mask[rows],
            "optimality": drawn.optimality[rows],
            "means": drawn.means.expand(len(rows), -1),
        }
        if config.real:
            real = self.train.take(batch.own_ids, batch.uniform("caption").tolist())
            real["noise"] = batch.normal("real noise", *real["latents"].shape[1:])
            real["timesteps"] = self.time.draw(batch.stratified("real timesteps"))
            inputs |= {f"real_{name}": value for name, value in real.items()}
        return inputs

    def _round(self, step: int) -> Round:
        """The round of update `step`; drawn where it is not the one at hand.

        At a round's first update the old policy follows the trained one; after a resume within a round it is the one
        of the checkpoint.
        """
        number, config = step // self.config.updates, self.config
        if self.round is not None and number == self.number:
            return self.round
        objective: Any = self.players["noise_predictor"].objective
        if number and step % config.updates == 0:
            decay = min(config.follow * number, config.follow_most) if config.method == "nft" else 0.0
            with torch.no_grad():
                for old, own in zip(objective.old.parameters(), objective.network.parameters(), strict=True):
                    old.lerp_(own, 1 - decay)
        with self._pipeline(objective.old) as pipeline:
            if config.rollouts.sampler is not None:
                pipeline.use_sampler(config.rollouts.sampler)
            self.round, self.number = self.rollouts.draw(number, pipeline), number
        return self.round

    def evaluate(self, objective: RewardObjective) -> dict[str, float]:
        with self._pipeline(objective.network) as pipeline:
            return self.guards.scores(pipeline)

    def facts(self) -> dict[str, Any]:
        config, facts = self.config, super().facts()
        if config.guidance is not None:
            facts["sampling"] = {**facts.get("sampling", {}), "default_guidance": config.guidance}
        return {**facts, "reward": {"method": config.method, "rewards": config.rewards}}

    def exported(self, objective: RewardObjective) -> Any:
        network = NetworkConfig(pretrained=str(self.start.folder), lora=self.config.lora)
        return exported(objective.network, network, self.process)


def _make(launched: Any) -> RewardTask:
    return RewardTask(launched.config, launched.run)


main = launch.Program(RewardConfig, "reward", _make)
