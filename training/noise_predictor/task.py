"""Stage 3: the latent noise predictor. It reads latents and prompt embeddings, encoded once by stages 2 and 1.

accelerate launch -m training.noise_predictor --config training/configs/shapes/noise_predictor.yaml --run runs/shapes
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.modeling_utils import ModelMixin
from PIL import Image
from torch import Tensor, nn

from sd_mini import diffusion, images, lora, png, stages
from sd_mini.data import arrays, cache
from sd_mini.data.batches import Batch, generator
from sd_mini.data.buckets import Size, bucket_sizes
from sd_mini.data.caption_draws import drawn_captions
from sd_mini.data.captioned import CaptionedPictures
from sd_mini.data.parts import load_captioned, resolved
from sd_mini.diffusion.objective import Process
from sd_mini.errors import UserError
from sd_mini.noise_predictor.network import check_call
from sd_mini.offload import on_device
from sd_mini.pipelines.generation import completed
from sd_mini.pipelines.text_to_image import Pipeline
from sd_mini.png import MAX_PROMPT, Settings
from sd_mini.processes import process_device
from sd_mini.stages.contract import Stage
from sd_mini.text_encoder.adapter import TextStage
from training.engine import launch
from training.engine.evaluation import Evaluator
from training.engine.learner import Player
from training.noise_predictor.config import EncodedConfig, PredictorConfig
from training.noise_predictor.data import encode
from training.noise_predictor.losses import PredictorObjective, answer_and_target
from training.noise_predictor.network import description, exported, make_network, token_grid
from training.noise_predictor.representation import Alignment, features, load_teacher, weights_at

VALID_TIMESTEPS = [(level + 0.5) / 10 for level in range(10)]  # where the held-out loss is measured


class Encoded:
    """A data set's latents and prompt embeddings, gathered by sample number."""

    def __init__(
        self,
        pictures: CaptionedPictures,
        text: Stage,
        vae: Stage,
        captions: int,
        folder: Path,
        dtype: str,
        is_held_out: bool = False,
        weights: Sequence[float] | None = None,
    ):
        rows = encode(pictures, text, vae, captions, folder, dtype, is_held_out, weights is not None)
        self.weights = weights
        self.captions, self.counts, self.latents, self.tokens, self.mask = rows
        self.resident: tuple[Any, Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.latents)

    def take(self, ids: np.ndarray, draw: Sequence[float]) -> dict[str, Tensor]:
        """Sample numbers (b,) of one shape, U[0, 1) draws that pick a caption of each => latents, prompt_embeds,
        prompt_mask."""
        draws, counts = np.asarray(draw), self.counts[ids]
        alike = (draws * counts).astype(np.int64)
        texts = self.captions[ids, alike if self.weights is None else drawn_captions(draws, counts, self.weights)]
        if self.resident is not None:
            every, tokens, mask = self.resident
            latents, ids = arrays.located(every, ids)
            at, words = (torch.from_numpy(x).to(latents.device, non_blocking=True) for x in (ids, texts))
            return {"latents": latents[at].float(), "prompt_embeds": tokens[words].float(), "prompt_mask": mask[words]}
        return {
            "latents": torch.from_numpy(self.latents[ids]).float(),
            "prompt_embeds": torch.from_numpy(self.tokens[texts]).float(),
            "prompt_mask": torch.from_numpy(self.mask[texts]),
        }

    def move(self, device: torch.device) -> None:
        """Hold all rows in that device's memory, in the cache's dtype; `take` then gathers them there."""

        def moved(rows: arrays.Alike) -> Tensor:
            return torch.from_numpy(rows[:]).to(device)

        latents = self.latents.parts if isinstance(self.latents, arrays.Buckets) else [self.latents]
        self.resident = arrays.joined([moved(part) for part in latents]), moved(self.tokens), moved(self.mask)


class EncodedTask(ABC):
    """A stage that trains a noise predictor, or another generator, on a data set's latents and prompt embeddings.

    A subclass brings the network, the objective, a batch's inputs, and the fields of its contract.
    """

    process: Process  # what the network predicts
    kind, part = "noise_predictor", "noise_predictor"  # of the exported stage, and of its network's folder

    def __init__(self, config: EncodedConfig, run: Path):
        self.config: Any = config
        self.text = stages.load_stage(config.text_encoder or run / "text_encoder" / "final", "text_encoder")
        self.vae = stages.load_stage(config.autoencoder or run / "autoencoder" / "final", "autoencoder")
        self.run, resolution = run, config.data.resolution
        self.autoencoder = self.vae.parts["autoencoder"]
        self.latent_shape = self.autoencoder.latent_shape(resolution, resolution)
        self.length, self.dim = self.text.contract["conditioning"]
        torch.manual_seed(config.train.seed)
        network = self.make_network()
        for size in bucket_sizes(config.data) if config.data.max_aspect > 1 else ():
            self._check_size(network, size, config.data.bucket_step)
        pictures, valid = load_captioned(config.data, config.valid, run / "cache" / "pictures")
        self.rejected = [*pictures.rejected, *valid.rejected]
        self.weights, self.valid_sources = pictures.weights, valid.sources
        self.bucket_counts, self.valid_pictures = pictures.bucket_counts, valid
        self.data = {"name": pictures.name, "count": len(pictures), "fingerprint": pictures.fingerprint}
        how = (self.text, self.vae, config.captions_per_picture, run / "cache", config.cache_dtype)
        self.train = Encoded(pictures, *how, weights=config.data.caption_weights)
        self.valid = Encoded(valid, *how, is_held_out=True)
        self.count, self.valid_count = len(self.train), len(self.valid)
        self.device = process_device() if config.resident else torch.device("cpu")
        if config.resident:
            self.train.move(self.device)
        self.identity = {
            "text_encoder": self.text.hash,
            "autoencoder": stages.encoder_of(self.vae.contract),
            **pictures.identity,
        }
        with torch.no_grad():
            null = TextStage.from_parts(self.text.parts).null(1)
        self.null_tokens, self.null_mask = null.tokens.to(self.device), null.mask.to(self.device)
        self.players = self.make_players(self.make_objective(network, pictures))
        self.evaluate_every = config.evaluate.every
        self.evaluator = Evaluator(config.evaluate, resolved(config.data, config.valid)[1].squares, run / "cache")

    @abstractmethod
    def make_network(self) -> ModelMixin:
        """The network to be trained; torch's generator has been seeded."""

    @abstractmethod
    def make_objective(self, network: ModelMixin, pictures: CaptionedPictures) -> nn.Module:
        """The network with its loss."""

    def make_players(self, objective: Any) -> dict[str, Player]:
        return {self.part: Player(objective, self.config.train)}

    @abstractmethod
    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The keyword arguments of the objective for a pass of b rows."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Of the contract: `objective` and `sampling`, and what else the stage records."""

    def exported(self, objective: Any) -> Any:
        """What the stage's folder keeps as its network: anything with `save_pretrained`."""
        return objective.network

    def parameters(self, objective: Any) -> list[nn.Parameter]:
        """Those that the contract counts: without the projection of the REPA term."""
        return list(lora.merged(objective.network).parameters())

    def _check_size(self, network: ModelMixin, size: Size, bucket_step: int) -> None:
        """Raises UserError for a bucket that the autoencoder or the network cannot take."""
        try:
            check_call(network, self.autoencoder.latent_shape(*size), self.dim)
        except (ValueError, RuntimeError, AssertionError) as error:
            raise UserError(
                f"data.bucket_step {bucket_step}: pictures of {size} do not fit: "
                f"{' '.join(str(error).split())[:160]}; give the stride times the patch size, or max_aspect 1"
            ) from None

    def prompts(self, draw: Tensor) -> dict[str, Tensor]:
        """U[0, 1) draws (b,) => rows of samples that they pick, each with its first caption."""
        return self.train.take((draw.numpy() * self.count).astype(np.int64), [0.0] * len(draw))

    def without_prompts(self, rows: dict[str, Tensor], dropped: Tensor) -> dict[str, Tensor]:
        """A batch's rows with the null condition instead of the prompt where `dropped` (b,) is true."""
        dropped = dropped.to(self.device, non_blocking=True)[:, None]
        return {
            **rows,
            "prompt_embeds": torch.where(dropped[..., None], self.null_tokens, rows["prompt_embeds"]),
            "prompt_mask": torch.where(dropped, self.null_mask, rows["prompt_mask"]),
        }

    def validate(self, objective: Any, rows: slice) -> dict[str, np.ndarray]:
        """The squared error of each held-out sample, by timestep and averaged, at fixed noise, caption and timesteps.

        The draws depend on nothing, so scores compare across steps and runs.
        """
        device, process = next(objective.parameters()).device, self.process
        fixed, valid, losses = generator(0, 0, "validation"), self.valid_pictures, []
        shapes = arrays.shapes_of(self.valid.latents)
        every_noise = arrays.joined(
            [torch.randn(count, *s, generator=fixed) for count, s in zip(valid.bucket_counts, shapes, strict=True)]
        )
        for part in map(np.asarray, valid.runs(rows, 256)):
            noise, inner = arrays.located(every_noise, part)
            batch = {**self.valid.take(part, [0.0] * len(part)), "noise": noise[inner]}
            rows_of_part = {name: value.to(device) for name, value in batch.items()}
            of_levels = []
            for level in VALID_TIMESTEPS:
                timesteps = process.times(torch.full((len(part),), level, device=device))
                answer, target = answer_and_target(objective.network, process, timesteps=timesteps, **rows_of_part)
                of_levels.append((answer - target).square().mean((1, 2, 3)))
            losses.append(torch.stack(of_levels).cpu())
        curve = torch.cat(losses, dim=1).numpy()  # (levels, n)
        return {"loss": curve.mean(0)} | {f"loss_t{t:.2f}": c for t, c in zip(VALID_TIMESTEPS, curve, strict=True)}

    def preview(self, objective: Any) -> Image.Image:
        """Pictures of eight held-out captions, each from its fixed seed and of its picture's size, by the pipeline."""
        shown = self.valid_pictures.select(self.valid_pictures.spread(8))
        captions, pictures, settings = [own[0] for own in shown.captions], [], []
        with self._pipeline(objective.network) as pipeline:
            for span, size in zip(shown.spans, shown.sizes, strict=True):
                seeds = [torch.Generator().manual_seed(row) for row in span]
                own = captions[span.start : span.stop]
                made = pipeline(own, generator=seeds, height=size.height, width=size.width).images
                asked = [
                    Settings(prompt=caption[:MAX_PROMPT], seed=row) for caption, row in zip(own, span, strict=True)
                ]
                settings += [completed(pipeline, *pair) for pair in zip(asked, made, strict=True)]
                pictures += made
        return png.attach(images.grid(pictures, columns=4, labels=captions, scale=2), *settings)

    def evaluate(self, objective: Any) -> dict[str, float]:
        with self._pipeline(objective.network) as pipeline:
            return self.evaluator.scores(pipeline)

    @contextmanager
    def _pipeline(self, network: nn.Module) -> Generator[Pipeline]:
        """The pipeline of the network as it is; the two other stages are on its device meanwhile."""
        predictor = Stage(Path(), self._contract({}), {self.part: lora.merged(network)})
        others = [*TextStage.from_parts(self.text.parts).models, self.autoencoder]
        with on_device(others, next(network.parameters()).device):
            pipeline = Pipeline.from_stages(self.text, self.vae, predictor)
            pipeline.set_progress_bar_config(disable=True)
            yield pipeline

    def _contract(self, record: dict[str, Any]) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "hash": "",
            "latent_shape": list(self.latent_shape),
            "conditioning": self.text.contract["conditioning"],
            **self.facts(),
            "trained_against": {"text_encoder": self.text.hash, "autoencoder": stages.latents_of(self.vae.contract)},
            "data": self.data,
            **record,
        }

    def export(self, objective: Any, folder: Path, record: dict[str, Any]) -> None:
        contract = {k: v for k, v in self._contract(record).items() if k not in ("kind", "hash")}
        contract["parameters"] = sum(p.numel() for p in self.parameters(objective))
        stages.export(folder, self.kind, {self.part: self.exported(objective)}, contract)


class PredictorTask(EncodedTask):
    def __init__(self, config: PredictorConfig, run: Path):
        self.config, self.process = config, config.objective.process
        super().__init__(config, run)

    def make_network(self) -> ModelMixin:
        repa = self.config.objective.repa
        network = make_network(self.config.network, self.latent_shape, self.dim, self.process)
        self.teacher = load_teacher(repa, self.text) if repa.weight else None
        return network

    def make_objective(self, network: ModelMixin, pictures: CaptionedPictures) -> PredictorObjective:
        config, alignment = self.config, None
        if self.teacher is not None:

            def grid_of(size: Size) -> tuple[int, int]:
                return token_grid(network, self.autoencoder.latent_shape(*size))

            self.features = features(pictures, self.teacher, grid_of, self.run / "cache", config.cache_dtype)
            grid = token_grid(network, self.latent_shape)
            alignment = Alignment(network, len(self.features[0]), config.objective.repa, grid)
        objective = PredictorObjective(network, config.objective, alignment)
        cache.message(description(objective, self.latent_shape, (self.length, self.dim), config.train))
        return objective

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """A batch's latents and noise (b, C, h, w), timesteps (b,), prompt_embeds (b, L, D), prompt_mask (b, L)."""
        config = self.config.objective
        rows = self.train.take(batch.own_ids, batch.uniform("caption").tolist())
        # Replace some prompts by the null condition, for classifier-free guidance (Ho & Salimans 2022, algorithm 1).
        rows = self.without_prompts(rows, batch.uniform("dropout") < config.caption_dropout)

        # Draw timesteps, stratified over the global batch, and noise; of several draws the nearest to the latents.
        timesteps = config.draw(batch.stratified("timesteps"))
        draws = [config.noise_draws] if config.noise_draws > 1 else []
        noise = batch.normal("noise", *draws, *rows["latents"].shape[1:], device=self.device)
        if draws:
            noise = diffusion.nearest_noise(rows["latents"], noise)

        # What the hidden states are aligned with (REPA).
        if config.repa.weight:
            rows["features"] = torch.from_numpy(self.features[batch.own_ids]).float()
            rows["feature_weights"] = weights_at(batch.step, self.config.train.steps, len(timesteps), config.repa)
        return {**rows, "noise": noise, "timesteps": timesteps}

    def facts(self) -> dict[str, Any]:
        return {
            "objective": self.config.objective.model_dump(),
            "sampling": {
                "resolution": self.config.data.resolution,
                "default_steps": self.config.sampling.steps,
                "default_guidance": self.config.sampling.guidance,
                "default_interval": self.config.sampling.interval,
                "sampler": self.config.sampling.sampler,
            },
        }

    def exported(self, objective: PredictorObjective) -> Any:
        return exported(objective.network, self.config.network, self.process)


main = launch.Program(PredictorConfig, "noise_predictor", lambda launched: PredictorTask(launched.config, launched.run))
