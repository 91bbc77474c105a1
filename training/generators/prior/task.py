"""DALL-E 2's way: a prior from text to the picture's embedding, and a noise predictor conditioned on it.

accelerate launch -m training.generators.prior --config training/configs/shapes/prior.yaml --run runs/shapes
"""

from __future__ import annotations

import hashlib
from typing import Any, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from sd_mini.config import Config
from sd_mini.data.arrays import Buckets
from sd_mini.data.batches import Batch, Rows, generator
from sd_mini.data.captioned import CaptionedPictures
from sd_mini.diffusion.objective import TimeConfig
from sd_mini.draws import normals
from sd_mini.errors import UserError
from sd_mini.generators.prior import PRIOR, PriorGenerator
from sd_mini.processes import process_device
from sd_mini.sampling.loop import Guidance
from sd_mini.stages.contract import model_hash
from sd_mini.text_encoder.matcher import Matcher
from training.engine import launch
from training.engine.learner import Player
from training.generators.one_pass import OnePassNetwork, on_cpu
from training.generators.prior.losses import PriorObjective
from training.generators.task import GeneratorConfig, GeneratorTask
from training.noise_predictor.data import cached_of_pictures
from training.noise_predictor.losses import answer_and_target
from training.noise_predictor.task import VALID_TIMESTEPS
from training.text_encoder.data import tower_features


class PriorNetwork(Config):
    """Of diffusers' PriorTransformer."""

    num_layers: int = Field(3, ge=1)
    num_attention_heads: int = Field(3, ge=1)
    attention_head_dim: int = Field(32, ge=2, multiple_of=2)


class DrawConfig(Config):
    """How the pipeline draws."""

    candidates: int = Field(2, ge=1)
    """embeddings drawn a picture, of which the one nearest to the text's is kept"""
    prior_steps: int = Field(10, ge=1)
    prior_guidance: float = Field(1.0, ge=0)
    """of the prior, where the call is guided; 1 is none"""
    steps: int = Field(8, ge=1)
    """of the decoder"""
    interval: tuple[float, float] = (0.0, 1.0)
    """noise levels between which the decoder's steps are guided"""

    @model_validator(mode="after")
    def _guided(self) -> Self:
        Guidance(self.prior_guidance, 0.0, *self.interval)  # raises UserError for values out of range
        return self


class ClipConfig(Config):
    """The frozen open_clip picture tower that stage 1 was trained on; of one with a tower of its own neither."""

    name: str | None = None
    """its architecture, or "local-dir:FOLDER\""""
    weights: str | None = None
    """its weights file"""


class PriorConfig(GeneratorConfig):
    guidance: float = Field(3.0, ge=0)
    """of the decoder: the pipeline's guidance scale"""
    embedding_dropout: float = Field(0.1, ge=0, le=1)
    """fraction of samples on which the decoder is not given the embedding"""
    network: OnePassNetwork = OnePassNetwork()
    """the decoder's"""
    prior: PriorNetwork = PriorNetwork()
    times: TimeConfig = TimeConfig()
    """the decoder's noise levels in training, and the weights of its errors"""
    sampling: DrawConfig = DrawConfig()
    tower: ClipConfig = ClipConfig()

    @model_validator(mode="after")
    def _flow(self) -> Self:
        if self.times.kind != "flow":
            raise UserError(f"times.kind {self.times.kind}: the decoder predicts the velocity; leave it out (flow)")
        return self


class PriorTask(GeneratorTask):
    family = "prior"

    def make_network(self) -> PriorGenerator:
        config, matcher = self.config, self._matcher()
        is_own = matcher.config.feature_dim is None
        network = PriorGenerator(
            self.family,
            self.latent_shape,
            self.length,
            self.dim,
            **config.network.model_dump(),
            prior_network=config.prior.model_dump(),
            matcher={k: v for k, v in matcher.config.items() if k[0] != "_"} if is_own else None,
            tower_size=self.text.contract["resolution"],
            **config.sampling.model_dump(),
        )
        if network.tower is not None:
            network.tower.load_state_dict(matcher.state_dict())
        on_cpu(network.body)
        return network

    def _matcher(self) -> Matcher:
        """Stage 1's picture side. Raises UserError where it is not there, or another tower than the config's."""
        matcher, name = self.text.parts.get("matcher"), self.config.tower.name
        if matcher is None:
            raise UserError(f"prior: {self.text.folder} holds no matcher, which makes embeddings; train stage 1 again")
        if (matcher.config.feature_dim is None) != (name is None):
            mend = "leave tower.name out" if name is not None else "name it: tower.name, tower.weights"
            kind = "a picture tower of its own" if name is not None else "the features of a frozen tower"
            raise UserError(f"tower.name {name}: stage 1 was trained with {kind}; {mend}")
        return matcher

    def make_objective(self, network: Any, pictures: CaptionedPictures) -> PriorObjective:
        self.embeddings = self._embeddings(network, pictures)
        self.valid_embeddings = self._embeddings(network, self.valid_pictures)
        every = self.embeddings[:]
        self.identity["picture_embeddings"] = hashlib.sha256(
            every.tobytes()
        ).hexdigest()  # a frozen tower's weights are a file
        network.prior.set_statistics(torch.from_numpy(every).float())
        return PriorObjective(network, self.config.times)

    def _embeddings(self, network: PriorGenerator, pictures: CaptionedPictures) -> Rows:
        """Of every picture, (N, D), cached."""
        config, matcher, device = self.config, self._matcher(), process_device()
        if config.tower.name is not None:
            features = tower_features(config.tower.name, config.tower.weights, pictures, self.run / "cache")
            with torch.no_grad():
                return matcher(features).vector.numpy()

        def embed(pixels: Tensor) -> Tensor:
            return network.embed(pixels.to(device))

        key = {"tower": model_hash(matcher), "side": network.config.tower_size}
        where, dtype, tower = self.run / "cache" / "picture_embeddings", config.cache_dtype, network.tower
        assert tower is not None
        rows = cached_of_pictures(pictures, "picture embeddings", embed, key, where, dtype, tower)
        assert not isinstance(rows, Buckets)  # pictures are of one size
        return rows

    def make_players(self, objective: Any) -> dict[str, Player]:
        one = torch.zeros(1, *self.latent_shape), torch.zeros(1, self.dim)
        more = {"noise": one[0], "timesteps": torch.zeros(1), "embeddings": one[1]}
        more |= {"prior_noise": one[1], "prior_timesteps": torch.zeros(1, dtype=torch.long), "is_kept": torch.ones(1)}
        self.announce(objective, self.one_picture() | more)
        return super().make_players(objective)

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """As `PriorObjective` takes them."""
        rows = self.rows(batch)
        rows["embeddings"] = torch.from_numpy(self.embeddings[batch.own_ids]).float()
        rows["timesteps"] = self.config.times.draw(batch.stratified("timesteps"))
        rows["noise"] = batch.normal("noise", *self.latent_shape)
        rows["prior_timesteps"] = PRIOR.times(batch.stratified("prior timesteps"))
        rows["prior_noise"] = batch.normal("prior noise", self.dim)
        # sec. 2.1: embedding and prompt are left out independently of each other
        rows["is_kept"] = (batch.uniform("embedding dropout") >= self.config.embedding_dropout).float()
        return rows

    def parameters(self, objective: Any) -> list[nn.Parameter]:
        """Without the tower, which stage 1 has trained."""
        return [*objective.network.prior.parameters(), *objective.network.body.parameters()]

    def validate(self, objective: Any, rows: slice) -> dict[str, np.ndarray]:
        """Of the held-out samples, each with its own fixed draws: `loss`, the decoder's squared error on the pictures'
        own embeddings, `cosine`, of the embedding that the prior draws, and `text_cosine`, of the text's, to them."""
        network, scores = objective.network, []
        device = next(objective.parameters()).device
        for part in map(np.asarray, self.valid_pictures.runs(rows, 256)):
            row = {name: value.to(device) for name, value in self.valid.take(part, [0.0] * len(part)).items()}
            latents, prompt = row["latents"], (row["prompt_embeds"], row["prompt_mask"])
            embeddings = torch.from_numpy(self.valid_embeddings[part]).float().to(device)

            condition = network.condition(prompt, embeddings)
            noise = normals(self.latent_shape, [generator(0, int(i), "noise") for i in part]).to(device)
            errors = []
            for level in VALID_TIMESTEPS:
                inputs = latents, noise, torch.full((len(part),), level, device=device)
                answer, target = answer_and_target(network.body, self.config.times, *inputs, *condition)
                errors.append((answer - target).square().mean((1, 2, 3)))
            drawn = network.draw_embeddings(prompt, None, [generator(0, int(i), "embedding") for i in part])
            own, drawn = map(network.prior.standardised, (embeddings, drawn))
            text = network.prior.text_embeddings(*prompt)
            found = torch.stack(errors).mean(0), cosine_similarity(drawn, own), cosine_similarity(text, own)
            scores.append(torch.stack(found, dim=1).cpu())
        return dict(zip(("loss", "cosine", "text_cosine"), torch.cat(scores).numpy().T, strict=True))


main = launch.Program(PriorConfig, "prior", lambda launched: PriorTask(launched.config, launched.run))
