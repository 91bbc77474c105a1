"""A round: pictures of some captions, drawn by the policy, what each scores, and which of them teach what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from sd_mini import images
from sd_mini.data.batches import Order, generator
from sd_mini.data.captioned import CaptionedPictures
from sd_mini.errors import UserError
from sd_mini.pipelines.text_to_image import Pipeline
from sd_mini.processes import rank_and_ranks
from training.reward.config import NOVELTY, RewardConfig
from training.reward.rewards import Made, Reward, rarity, scores


@dataclass(frozen=True, eq=False)
class Round:
    """N pictures as latents (N, C, h, w) with their prompts' embeddings; `optimality` (N,) in [0, 1]; `order`: the rows
    that the round's updates take; `means` of each reward, and of rarity under novelty."""

    latents: Tensor
    prompt_embeds: Tensor
    prompt_mask: Tensor
    optimality: Tensor
    order: np.ndarray
    means: Tensor


class Rollouts:
    """Draws rounds: each a function of its number and the policy's weights, the same for any number of processes."""

    def __init__(self, config: RewardConfig, data: CaptionedPictures, rewards: Mapping[str, Reward]):
        self.config, self.data, self.rewards = config, data, rewards
        asked, kinds = config.rollouts, config.rollouts.kinds
        if kinds and data.scenes is None:
            raise UserError(f"rollouts.kinds {', '.join(kinds)}: are of shapes, which {data.name} is not; leave it out")
        rows = [np.arange(len(data))]
        if kinds and data.scenes is not None:
            of_kind = np.array([scene.kind for scene in data.scenes])
            rows = [np.flatnonzero(of_kind == kind) for kind in kinds]
        for kind, own in zip(kinds, rows, strict=False):
            if not len(own):
                raise UserError(f"rollouts.kinds {kind}: no scene of {data.name} is of that kind; leave it out")
        each = asked.prompts // len(rows)
        seed = config.train.seed
        self.orders = [(own, Order(seed, len(own), each, name=f"order of prompts {i}")) for i, own in enumerate(rows)]

    def draw(self, number: int, pipeline: Pipeline) -> Round:
        """Round `number` by the pipeline's noise predictor. Raises UserError for rewards that teach nothing."""
        config, asked, seed = self.config, self.config.rollouts, self.config.train.seed
        rows = np.concatenate([own[order.ids(number)] for own, order in self.orders])
        places = torch.rand(len(rows), generator=generator(seed, number, "rollouts/captions")).tolist()
        captions = [
            own[int(u * len(own))] for u, own in zip(places, (self.data.captions[r] for r in rows), strict=True)
        ]
        scenes = (
            None if self.data.scenes is None else [self.data.scenes[row] for row in rows for _ in range(asked.each)]
        )
        shape = pipeline.latent_shape(*[pipeline.config.resolution] * 2)
        noise = torch.randn(config.pictures, *shape, generator=generator(seed, number, "rollouts/noise"))

        # Each process draws and scores whole batches of prompts, so that every batch is the same whoever draws it.
        starts = range(0, len(rows), asked.batch)
        rank, count = rank_and_ranks()
        parts: list[Any] = []
        try:
            for start in list(starts)[rank::count]:
                own = captions[start : start + asked.batch]
                pictures = slice(start * asked.each, (start + len(own)) * asked.each)
                *tensors, drawn = self._pictures(pipeline, own, noise[pictures])
                prompts = [caption for caption in own for _ in range(asked.each)]
                made = Made(drawn, prompts, None if scenes is None else scenes[pictures])
                parts.append((start, tensors, scores(self.rewards, made)))
        except UserError as error:
            parts = [error]  # raised below by all, or the others would wait for this one
        parts = gather_object(parts)
        for failed in (part for part in parts if isinstance(part, UserError)):
            raise failed
        parts.sort(key=lambda part: part[0])
        tensors = [torch.cat(own) for own in zip(*(part[1] for part in parts), strict=True)]
        found = {name: np.concatenate([part[2][name] for part in parts]) for name in self.rewards}
        return self._round(number, tensors, found)

    def _pictures(
        self, pipeline: Pipeline, captions: list[str], noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, np.ndarray]:
        """=> latents, prompt_embeds, prompt_mask on the CPU, and pictures (n, 3, R, R) uint8."""
        asked = self.config.rollouts
        embeds, mask = pipeline.encode_prompt(captions, asked.each)
        options: dict[str, Any] = {"num_inference_steps": asked.steps} if asked.steps is not None else {}
        latents = pipeline(
            prompt_embeds=embeds,
            prompt_mask=mask,
            latents=noise,
            guidance_scale=asked.guidance,
            guidance_interval=asked.interval,
            output_type="latent",
            **options,
        ).images
        with torch.no_grad():
            pictures = images.to_uint8(pipeline.autoencoder.decode(latents).float().cpu()).numpy()
        return latents.float().cpu(), embeds.float().cpu(), mask.cpu(), pictures

    def total(self, found: Mapping[str, np.ndarray]) -> np.ndarray:
        return sum(
            (weight * found[name] for name, weight in self.config.rewards.items() if name != NOVELTY), np.zeros(1)
        )

    def _round(self, number: int, tensors: list[Tensor], found: dict[str, np.ndarray]) -> Round:
        """`tensors`: latents, prompt_embeds and prompt_mask of the round's pictures; `found`: their rewards."""
        config, total, each = self.config, self.total(found), self.config.rollouts.each
        kept = good(total, each)
        rare = rarity(tensors[0], kept, each)
        novelty = config.rewards.get(NOVELTY, 0.0)
        differs = np.ptp(total.reshape(-1, each), axis=1) > 0
        if not differs.any() and number == 0:
            told = ", ".join(f"{name} {values.mean():.4g}" for name, values in found.items())
            raise UserError(
                f"rewards: the {each} pictures of each of {len(differs)} prompts score alike ({told}), so there is "
                "nothing to learn; give another reward, or more pictures each"
            )
        optimality = optimalities(total, rare, each, novelty)
        if config.method == "rejection":
            rows = np.flatnonzero(kept)
            # each prompt alike; under novelty its rare pictures more often
            weights = np.where(kept, rare if novelty else 1.0, 0.0).reshape(-1, each)
            weights = (weights / np.maximum(weights.sum(1, keepdims=True), 1e-12)).reshape(-1)[rows]
        else:
            teaches = differs | ((rare.reshape(-1, each) > 0).any(1) & bool(novelty))
            rows = np.flatnonzero(np.repeat(teaches if teaches.any() else ~teaches, each))
            weights = np.ones(len(rows))
        means = [
            found[name].mean() if name != NOVELTY else rare[rare > 0].mean() if rare.any() else 0.0
            for name in config.rewards
        ]
        order = drawn_order(weights, config.updates * config.train.batch_size, config.train.seed, number)
        latents, embeds, mask = tensors
        return Round(
            latents, embeds, mask, torch.from_numpy(optimality).float(), rows[order], torch.tensor(means).float()
        )


def good(total: np.ndarray, each: int) -> np.ndarray:
    """(N,) bool: what scores at least its prompt's mean; where a prompt's pictures score alike, the round's mean."""
    prompts = total.reshape(-1, each)
    line = np.where(np.ptp(prompts, axis=1) > 0, prompts.mean(1), total.mean())
    return (prompts >= line[:, None] - 1e-12).reshape(-1)


# Zheng et al. 2025 (DiffusionNFT), eq. 10: how far a reward lies above its prompt's mean, in deviations of the round
def optimalities(total: np.ndarray, rare: np.ndarray, each: int, novelty: float = 0.0) -> np.ndarray:
    """Rewards (N,) => (N,) in [0, 1], 0.5 at the prompt's mean. With `novelty` the good ones that are rarer than their
    prompt's good ones on average are raised by as much as they are, and the commoner ones lowered."""
    prompts, rarities = total.reshape(-1, each), rare.reshape(-1, each)
    advantage = np.clip((prompts - prompts.mean(1, keepdims=True)) / max(total.std(), 1e-9), -1, 1)
    if novelty:
        is_good = rarities > 0
        mean = rarities.sum(1, keepdims=True) / np.maximum(is_good.sum(1, keepdims=True), 1)
        advantage += novelty * np.where(is_good, rarities / np.maximum(mean, 1e-9) - 1, 0)
    return np.clip(0.5 + 0.5 * advantage, 0, 1).reshape(-1)


def drawn_order(weights: np.ndarray, count: int, seed: int, number: int) -> np.ndarray:
    """`count` places among the weights, each its share of them rounded up or down (systematic sampling), shuffled."""
    draws = generator(seed, number, "rollouts/order")
    levels = (np.arange(count) + float(torch.rand((), generator=draws))) / count
    places = np.searchsorted(np.cumsum(weights) / weights.sum(), levels, side="right").clip(max=len(weights) - 1)
    return places[torch.randperm(count, generator=draws).numpy()]
