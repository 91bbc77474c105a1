"""Stage 3: the latent noise predictor. It sees nothing but what stages 1 and 2 made of the data, encoded once.

accelerate launch -m training.noise_predictor --config training/configs/shapes/noise_predictor.yaml --run runs/shapes
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from sd_mini import diffusion, images, noise_predictor, stages
from sd_mini.config import Config, command
from sd_mini.data import CaptionedPictures, DataConfig, load_captioned, unique_captions
from sd_mini.pipeline import Pipeline
from sd_mini.stages import Stage
from sd_mini.text_encoder import TextStage
from training import cache, launch
from training.batches import Batch, generator
from training.players import Player
from training.task import TrainConfig
from training.text_data import CHUNK, report_cuts

STD = (0.97, 1.03)  # of latents that are standardised by their own statistics
VALID_TIMESTEPS = [(level + 0.5) / 10 for level in range(10)]  # where the held-out loss is measured


class NetworkConfig(Config):
    kind: Literal["prx", "pixart", "unet"] = "prx"
    """which diffusers network: PRXTransformer2DModel, PixArtTransformer2DModel, UNet2DConditionModel"""
    network: dict[str, Any] = Field(default_factory=dict)
    """fields of that class; those that the other stages decide are left out"""


class ObjectiveConfig(Config):
    caption_dropout: float = Field(0.1, ge=0, le=1)
    """share of samples trained on the null condition"""
    uniform_share: float = Field(0.1, ge=0, le=1)
    """share of timesteps drawn uniformly, the others logit-normal"""
    shift: float = Field(1.0, gt=0)
    """above 1 trains more on the noisy end"""


class SamplingConfig(Config):
    """The pipeline's defaults, used by the previews too."""

    steps: int = Field(20, ge=1)
    guidance: float = Field(3.0, ge=0)
    interval: tuple[float, float] = (0.0, 1.0)
    """noise levels between which steps are guided; 0 is the picture, 1 the noise"""


class PredictorConfig(Config):
    data: DataConfig = DataConfig()
    """captioned pictures to train on"""
    valid: DataConfig = DataConfig(split="test", count=256)
    """captioned pictures for the held-out loss and the previews"""
    captions_per_picture: int = Field(2, ge=1)
    """at most so many of a picture's captions are encoded and drawn from"""
    cache_dtype: Literal["float16", "float32"] = "float16"
    """how latents and prompt embeddings lie on disk; float32 takes twice the room, and holds what float16 cannot"""
    network: NetworkConfig = NetworkConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    sampling: SamplingConfig = SamplingConfig()
    train: TrainConfig = TrainConfig()
    text_encoder: str | None = None
    """folder of the exported text stage; none: RUN/text_encoder/final"""
    autoencoder: str | None = None
    """folder of the exported autoencoder; none: RUN/autoencoder/final"""


class Objective(nn.Module):
    """Flow matching: the network learns the velocity from picture to noise."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(
        self, latents: Tensor, noise: Tensor, timesteps: Tensor, prompt_embeds: Tensor, prompt_mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        noised = diffusion.flow_noise(latents, noise, timesteps)
        velocity = noise_predictor.predict(self.network, noised, timesteps, prompt_embeds, prompt_mask)
        return (velocity - diffusion.flow_target(latents, noise)).square().mean((1, 2, 3)), {}


class Encoded:
    """A data set as stage 3 sees it: latents and prompt embeddings, from the caches."""

    def __init__(self, pictures: CaptionedPictures, text: Stage, vae: Stage, captions: int, folder: Path, dtype: str):
        texts = [_some(several, captions, number) for number, several in enumerate(pictures.captions)]
        unique = unique_captions(texts)
        number = {text: i for i, text in enumerate(unique)}
        self.captions = [[number[t] for t in several] for several in texts]
        device = PartialState().device
        autoencoder, stage = vae.parts["autoencoder"].to(device), _text_stage(text, device)
        report_cuts(stage.encoders, texts, pictures.name, strict=False)

        def encode_pictures(rows: slice) -> dict[str, np.ndarray]:
            with torch.no_grad():
                pixels = pictures.pixels(range(rows.start, rows.stop)).to(device)
                return {"latents": autoencoder.encode(pixels).float().contiguous().cpu().numpy()}

        def encode_texts(rows: slice) -> dict[str, np.ndarray]:
            with torch.no_grad():
                encoded = stage.encode(unique[rows], warn=False)
            return {"tokens": encoded.tokens.float().cpu().numpy(), "mask": encoded.mask.cpu().numpy()}

        self.latents = cache.encode(
            folder / "latents",
            {"stage": stages.encoder_of(vae.contract), "data": pictures.fingerprint},
            len(pictures),
            encode_pictures,
            f"latents of {pictures.name}",
            dtype,
        )["latents"]
        check_scale(self.latents, pictures, vae.contract)
        words = cache.encode(
            folder / "prompts",
            {"stage": text.hash, "texts": stages.combined_hash(unique)},
            len(unique),
            encode_texts,
            f"prompts of {pictures.name}",
            dtype,
            chunk=CHUNK,
        )
        self.tokens, self.mask = words["tokens"], words["mask"]

    def __len__(self) -> int:
        return len(self.latents)

    def take(self, ids: np.ndarray, draw: Sequence[float]) -> dict[str, Tensor]:
        """Sample numbers, and U[0, 1) that picks a caption of each => latents, prompt_embeds, prompt_mask."""
        texts = np.array([self.captions[i][int(u * len(self.captions[i]))] for i, u in zip(ids, draw, strict=True)])
        return {
            "latents": torch.from_numpy(self.latents[ids]).float(),
            "prompt_embeds": torch.from_numpy(self.tokens[texts]).float(),
            "prompt_mask": torch.from_numpy(self.mask[texts]),
        }


class PredictorTask:
    def __init__(self, config: PredictorConfig, run: Path):
        self.config = config
        self.text = stages.load_stage(config.text_encoder or run / "text_encoder" / "final", "text_encoder")
        self.vae = stages.load_stage(config.autoencoder or run / "autoencoder" / "final", "autoencoder")
        resolution = config.data.resolution
        self.latent_shape = self.vae.parts["autoencoder"].latent_shape(resolution, resolution)
        torch.manual_seed(config.train.seed)
        _, dim = self.text.contract["conditioning"]
        network = noise_predictor.build(config.network.kind, config.network.network, self.latent_shape, dim)
        self.players = {"noise_predictor": Player(Objective(network), config.train)}
        pictures, valid = load_captioned(config.data, config.valid)
        self.data = {"name": pictures.name, "count": len(pictures), "fingerprint": pictures.fingerprint}
        self.valid_captions = [captions[0] for captions in valid.captions]
        self.train, self.valid = (
            Encoded(p, self.text, self.vae, config.captions_per_picture, run / "cache", config.cache_dtype)
            for p in (pictures, valid)
        )
        self.count, self.valid_count = len(self.train), len(self.valid)
        self.identity = {
            "text_encoder": self.text.hash,
            "autoencoder": stages.encoder_of(self.vae.contract),
            "data": pictures.fingerprint,
        }
        with torch.no_grad():
            null = _text_stage(self.text, "cpu").null(1)
        self.null_tokens, self.null_mask = null.tokens, null.mask

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Latents and one caption each, some replaced by the null condition, with noise and timesteps of this step."""
        own = self.train.take(batch.own_ids, batch.uniform("caption").tolist())
        dropped = batch.uniform("dropout") < self.config.objective.caption_dropout
        own["prompt_embeds"][dropped], own["prompt_mask"][dropped] = self.null_tokens, self.null_mask
        timesteps = diffusion.sample_timesteps(
            batch.normal("timesteps"),
            batch.uniform("timesteps"),
            self.config.objective.uniform_share,
            self.config.objective.shift,
        )
        return {**own, "noise": batch.normal("noise", *self.latent_shape), "timesteps": timesteps}

    def validate(self, objective: Objective, rows: slice) -> dict[str, np.ndarray]:
        """The held-out loss of each sample at fixed noise, a fixed caption and fixed timesteps: the mean and the curve.

        Two runs, two steps of one, and one before and after a resume see the same draws.
        """
        device = next(objective.parameters()).device
        fixed = generator(0, 0, "validation")
        noise = torch.randn(len(self.valid), *self.latent_shape, generator=fixed)[rows]
        ids = np.arange(rows.start, rows.stop)
        batch = {**self.valid.take(ids, [0.0] * len(ids)), "noise": noise}
        losses = []
        for part in torch.arange(len(ids)).split(256):
            own = {name: value[part].to(device) for name, value in batch.items()}
            timesteps = [torch.full((len(part),), level, device=device) for level in VALID_TIMESTEPS]
            losses.append(torch.stack([objective(**own, timesteps=t)[0] for t in timesteps]).cpu())
        curve = torch.cat(losses, dim=1).numpy()  # (levels, n)
        return {"loss": curve.mean(0)} | {f"loss_t{t:.2f}": c for t, c in zip(VALID_TIMESTEPS, curve, strict=True)}

    def preview(self, objective: Objective) -> Image.Image:
        """The first eight held-out captions, each from its own fixed seed, through the real pipeline."""
        captions = self.valid_captions[:8]
        made = self._pipeline(objective.network)(
            captions, generator=[torch.Generator().manual_seed(seed) for seed in range(len(captions))]
        )
        return images.grid(made.images, columns=4, labels=captions, scale=2)

    def _pipeline(self, network: nn.Module) -> Pipeline:
        predictor = Stage(Path(), self._contract({}), {"noise_predictor": network})
        pipeline = Pipeline.from_stages(self.text, self.vae, predictor).to(network.device)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _contract(self, record: dict[str, Any]) -> dict[str, Any]:
        return {
            "kind": "noise_predictor",
            "hash": "",
            "latent_shape": list(self.latent_shape),
            "conditioning": self.text.contract["conditioning"],
            "objective": {"kind": "flow", **self.config.objective.model_dump()},
            "sampling": {
                "resolution": self.config.data.resolution,
                "default_steps": self.config.sampling.steps,
                "default_guidance": self.config.sampling.guidance,
                "default_interval": self.config.sampling.interval,
            },
            "trained_against": {"text_encoder": self.text.hash, "autoencoder": stages.latents_of(self.vae.contract)},
            "data": self.data,
            **record,
        }

    def export(self, objective: Objective, folder: Path, record: dict[str, Any]) -> None:
        contract = {k: v for k, v in self._contract(record).items() if k not in ("kind", "hash")}
        stages.export(folder, "noise_predictor", {"noise_predictor": objective.network}, contract)


def _some(captions: list[str], at_most: int, number: int) -> list[str]:
    """`at_most` of a picture's captions, neighbours taking different ones, so that every phrasing is seen."""
    start = number % len(captions)
    return (captions[start:] + captions[:start])[:at_most]


def check_scale(latents: cache.Rows, pictures: CaptionedPictures, contract: dict[str, Any]) -> None:
    """Measure the std a channel of up to 4,096 latents, which noise of unit variance is only right for if it is 1.

    Outside STD, a warning where the autoencoder's statistics are of other pictures than these, or of another's latents.
    Raises ValueError where they are said to be of the same ones.
    """
    rows = np.unique(np.linspace(0, len(latents) - 1, 4096).astype(int))
    std = latents[rows].astype(np.float64).std((0, 2, 3))
    if STD[0] <= std.min() and std.max() <= STD[1]:
        return
    said = (
        f"latents of {pictures.name}: std a channel from {std.min():.3f} to {std.max():.3f}, expected {STD[0]} to "
        f"{STD[1]}"
    )
    if contract.get("data", {}).get("fingerprint") == pictures.fingerprint and "latents_of" not in contract:
        raise ValueError(f"{said}; train the autoencoder again, with a larger statistics_count if that was small")
    cache.say(f"{said}: the autoencoder was measured on other pictures; train it on these if much is missing")


def _text_stage(text: Stage, device: torch.device | str) -> TextStage:
    stage = TextStage.from_parts(text.parts)
    for part in (stage.adapter, *(encoder.model for encoder in stage.encoders)):
        part.to(device)
    return stage


main = launch.Program(PredictorConfig, "noise_predictor", lambda launched: PredictorTask(launched.config, launched.run))


if __name__ == "__main__":
    sys.exit(command(main))
