"""The few-step stage: stage 3's noise predictor, trained on until 1 to 8 unguided evaluations make its guided pictures.

accelerate launch -m training.few_steps --config training/configs/shapes/few_steps.yaml --run runs/shapes
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from sd_mini.data.batches import Batch, generator
from sd_mini.data.captioned import CaptionedPictures
from sd_mini.diffusion.flow_map import check_network, default_end_blocks
from sd_mini.diffusion.objective import sample_timesteps
from sd_mini.errors import UserError
from sd_mini.processes import process_device
from sd_mini.sampling import samplers
from sd_mini.sampling.few_steps import SAMPLER, FewSteps
from sd_mini.sampling.loop import Condition, Guidance, SamplingRun
from training.engine import launch
from training.engine.learner import Player
from training.few_steps.config import FewStepsConfig
from training.few_steps.meanflow import MeanFlowObjective, OneEvaluation, two_times
from training.few_steps.reflow import ReflowObjective, cached_pairs, pair_noise
from training.generators.adversary import Adversary
from training.noise_predictor.tuned import TunedTask


class FewStepsTask(TunedTask):
    def __init__(self, config: FewStepsConfig, run: Path):
        self.config = config
        super().__init__(config, run)
        self.references: dict[tuple[int, int], Tensor] = {}

    def make_network(self) -> ModelMixin:
        if self.process.kind != "flow" or "few_steps" in self.start.contract:
            what = "is made for few steps already" if self.process.kind == "flow" else f"predicts {self.process.kind}"
            raise UserError(
                f"{self.start.folder}: this noise predictor {what}; expected one of objective flow from stage 3 "
                "(--objective.kind flow), or tuned by a reward"
            )
        config, sampling = self.config, self.start.contract["sampling"]
        baked = config.guidance
        scale = sampling["default_guidance"] if baked.scale is None else baked.scale
        interval = baked.interval or sampling.get("default_interval", (0.0, 1.0))
        self.guidance = Guidance(scale, 0.0, *interval)
        self.teacher_steps = config.teacher_steps or sampling["default_steps"]
        network = super().make_network()
        end_blocks = 0
        if config.method == "meanflow":
            depth = len(getattr(network, "blocks", ()))
            end_blocks = config.meanflow.end_blocks or default_end_blocks(depth)
            check_network(network, end_blocks)
        elif config.data.max_aspect > 1:
            raise UserError(f"data.max_aspect {config.data.max_aspect:g}: reflow draws its pairs at one size; 1")
        self.few_steps = FewSteps(method=config.method, steps=config.evaluations, end_blocks=end_blocks)
        self.teacher = self.start.parts["noise_predictor"].requires_grad_(False).to(process_device())
        return network

    def make_objective(self, network: ModelMixin, pictures: CaptionedPictures) -> nn.Module:
        null = self.null_tokens, self.null_mask
        if self.config.method == "meanflow":
            config, end_blocks = self.config.meanflow, self.few_steps.end_blocks
            self.adversary = Adversary(self.config.adversary, self.latent_shape, self.dim)
            how = (self.guidance, config, end_blocks, self.teacher_steps)
            return MeanFlowObjective(network, self.teacher, null, *how, self.adversary.discriminator)
        key = {
            "noise_predictor": self.start.hash,
            "data": pictures.fingerprint,
            "captions": self.config.captions_per_picture,
            "seed": self.config.train.seed,
            "guidance": str(self.guidance),
            "steps": self.teacher_steps,
        }
        title = f"pairs of noise and what the noise predictor makes of it, {pictures.name}"
        folder, dtype = self.run / "cache" / "pairs", self.config.cache_dtype
        self.pairs = cached_pairs(self._pair, self.count, key, folder, dtype, title)
        return ReflowObjective(network)

    def make_players(self, objective: Any) -> dict[str, Player]:
        players = super().make_players(objective)
        if isinstance(objective, MeanFlowObjective):
            players |= self.adversary.player(OneEvaluation(objective.network, objective.end_blocks))
        return players

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """A batch's latents and noise (b, C, h, w), prompts, and times (b,): of meanflow where each step starts and
        ends. Nothing is trained on the null condition, which is not used unguided."""
        if self.config.method == "reflow":
            rows = self.train.take(batch.own_ids, [0.0] * len(batch.own_ids))
            rows["latents"] = torch.from_numpy(self.pairs[batch.own_ids]).float()
            noise = pair_noise(self.config.train.seed, batch.own_ids, self.latent_shape)
            return {**rows, "noise": noise, "timesteps": sample_timesteps(batch.stratified("timesteps"), "uniform")}
        rows = self.train.take(batch.own_ids, batch.uniform("caption").tolist())
        noise = batch.normal("noise", *rows["latents"].shape[1:], device=self.device)
        draws = [batch.stratified(name) for name in ("kind", "first", "second")]
        timesteps, ends = two_times(*draws, self.config.meanflow, self.config.evaluations)
        adversary = self.adversary.inputs(batch, self.prompts)
        adversary |= {"draw": noise} if adversary else {}
        return {**rows, **adversary, "noise": noise, "timesteps": timesteps, "ends": ends}

    def validate(self, objective: Any, rows: slice) -> dict[str, np.ndarray]:
        """By number of evaluations, the squared error of each held-out sample's latents against those that the guided
        teacher makes of the same noise and caption, (n,) each; the default number's first."""
        valid, scores = self.valid_pictures, {}
        order = [
            self.config.default_evaluations,
            *(n for n in self.config.evaluations if n != self.config.default_evaluations),
        ]
        for number in order:
            errors = []
            for part in map(np.asarray, valid.runs(rows, 256)):
                noise, prompt = self._held_out(part)
                key = int(part[0]), int(part[-1])
                if key not in self.references:
                    self.references[key] = self._drawn(self.teacher, noise, prompt, None)
                latents = self._drawn(objective.network, noise, prompt, number)
                errors.append((latents - self.references[key]).square().mean((1, 2, 3)).cpu())
            scores[f"error_{number}"] = torch.cat(errors).numpy()
        return scores

    def facts(self) -> dict[str, Any]:
        inherited = super().facts()
        sampling = {
            **inherited["sampling"],
            "default_steps": self.config.default_evaluations,
            "default_guidance": 1.0,
            "default_interval": (0.0, 1.0),
            "sampler": SAMPLER,
        }
        baked = {"scale": self.guidance.scale, "interval": [self.guidance.low, self.guidance.high]}
        return {**inherited, "sampling": sampling, "few_steps": self.few_steps.model_dump(), "baked_guidance": baked}

    def _held_out(self, part: np.ndarray) -> tuple[Tensor, Condition]:
        """Held-out sample numbers (n,) => fixed noise (n, C, h, w), and the prompts' embeddings."""
        rows = self.valid.take(part, [0.0] * len(part))
        fixed = [torch.randn(rows["latents"].shape[1:], generator=generator(0, int(i), "validation")) for i in part]
        return torch.stack(fixed), (rows["prompt_embeds"], rows["prompt_mask"])

    def _pair(self, ids: np.ndarray) -> Tensor:
        """Sample numbers (b,) => what the guided teacher makes of their own noise and first captions."""
        rows = self.train.take(ids, [0.0] * len(ids))
        prompt = rows["prompt_embeds"], rows["prompt_mask"]
        return self._drawn(self.teacher, pair_noise(self.config.train.seed, ids, self.latent_shape), prompt, None)

    def _drawn(self, network: Any, noise: Tensor, prompt: Condition, number: int | None) -> Tensor:
        """Noise (n, C, h, w) => latents, in `number` unguided evaluations, or (None) as the teacher is sampled."""
        sampling, process, device = self.start.contract["sampling"], self.process, process_device()
        name = sampling.get("sampler") or samplers.default(process)
        if number is None:
            run = SamplingRun(
                network, samplers.build(name, process), process, self.guidance, self.teacher_steps, device
            )
        else:
            scheduler, unguided = samplers.build(SAMPLER, process), Guidance(1.0)
            run = SamplingRun(network, scheduler, process, unguided, number, device, few_steps=self.few_steps)
        nothing = (part.to(device).expand(len(noise), *part.shape[1:]) for part in (self.null_tokens, self.null_mask))
        null, prompt = (next(nothing), next(nothing)), (prompt[0].to(device), prompt[1].to(device))
        latents = run.start(noise.to(device))
        for i in range(len(run.timesteps)):
            latents = run.step(i, latents, prompt, null)
        return latents


main = launch.Program(FewStepsConfig, "few_steps", lambda launched: FewStepsTask(launched.config, launched.run))
