"""Stage 1: the text encoder's adapter, trained on captions and pictures against a picture tower that is thrown away.

accelerate launch -m training.text_encoder --config training/configs/shapes/text_encoder.yaml --run runs/shapes
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from sd_mini import images, shapes, stages
from sd_mini.config import Config, command
from sd_mini.data import CaptionedPictures, DataConfig, load_captioned, unique_captions
from sd_mini.text_encoder import TextAdapter, TextStage, clip_tokenizer, load_encoder, small_clip
from training import launch
from training.augment import AugmentConfig, augment
from training.batches import Batch, generator
from training.players import Player
from training.task import TrainConfig


class EncoderConfig(Config):
    """The text encoder under the adapter."""

    name: str | None = None
    """hub name or folder of a pretrained one, kept frozen; none: a small CLIP text model trained from scratch"""
    vocab_size: int = Field(4096, ge=600)
    """about how many BPE tokens to learn from the captions (from scratch only)"""
    dim: int = Field(128, ge=8)
    layers: int = Field(2, ge=1)
    heads: int = Field(4, ge=1)


class AdapterConfig(Config):
    dim: int = Field(128, ge=8)
    """width of the prompt embeddings"""
    depth: int = Field(2, ge=0)
    """refiner blocks; 0 is a plain projection"""
    heads: int = Field(4, ge=1)
    max_length: int = Field(24, ge=4)
    """tokens a prompt, with the start and end marks"""
    residual_scale: float = Field(0.3, ge=0)
    """how much of the refined states is added to each word's own identity and place"""


class TowerConfig(Config):
    """The picture side: a small convolutional tower, not kept."""

    width: int = Field(64, ge=8)
    patch: int = Field(4, ge=1)
    """pixels a side that the first layer folds into channels"""


class LossConfig(Config):
    """Weights of the terms; 0 leaves a term out."""

    siglip: float = Field(1.0, ge=0)
    """which caption goes with which picture, from the pooled vectors"""
    layout: float = Field(20.0, ge=0)
    """the picture in 8 x 8 pixels, from the token vectors: what makes them say which word belongs where"""


class TextConfig(Config):
    data: DataConfig = DataConfig()
    """captioned pictures to train on"""
    valid: DataConfig = DataConfig(split="test", count=500)
    """captioned pictures to measure retrieval and binding on"""
    augment: AugmentConfig = AugmentConfig()
    encoder: EncoderConfig = EncoderConfig()
    adapter: AdapterConfig = AdapterConfig()
    tower: TowerConfig = TowerConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()


class PictureTower(nn.Module):
    """pixels (B, 3, R, R) => (B, dim)."""

    def __init__(self, width: int, patch: int, dim: int):
        super().__init__()
        self.features = nn.Sequential(
            nn.PixelUnshuffle(patch),
            nn.Conv2d(3 * patch**2, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(4),  # keeps where things are, in 4 x 4 cells
            nn.Flatten(),
        )
        self.out = nn.Sequential(nn.Linear(32 * width, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.out(self.features(pixels))


class LayoutHead(nn.Module):
    """Token vectors (B, L, dim) and mask (B, L) => a guess at the picture in 8 x 8 pixels, (B, 3, 8, 8). Not kept.

    A caption does not determine its picture, so the guess is the mean of those it fits: blurred, but in place.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(16, dim))  # each answers for 2 x 2 pixels
        self.block = nn.TransformerDecoderLayer(dim, heads, 2 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
        self.out = nn.Linear(dim, 12)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        cells = self.block(self.queries.expand(len(tokens), -1, -1), tokens, memory_key_padding_mask=~mask)
        folded = self.out(cells).view(-1, 4, 4, 12).permute(0, 3, 1, 2)  # (B, 16, 12) => (B, 12, 4, 4)
        return nn.functional.pixel_shuffle(folded, 2)


# the pairwise sigmoid loss, Zhai et al. 2023 (SigLIP), algorithm 1, with any number of positives a row
def siglip_losses(logits: Tensor, positive: Tensor) -> Tensor:
    """logits (B, T), positive (B, T) bool => (B,): the sum over the texts, as the paper's loss is normalised by B."""
    return -nn.functional.logsigmoid(torch.where(positive, logits, -logits)).sum(1)


class Objective(nn.Module):
    """Captions, hard negatives and pictures => the weighted sum of the terms, one a picture."""

    def __init__(self, stage: TextStage, tower: PictureTower, layout: LayoutHead, weights: LossConfig):
        super().__init__()
        self.encoder, self.adapter, self.tower = stage.encoder, stage.adapter, tower
        self.layout, self.weights = layout, weights
        self.stage = stage
        # SigLIP's start: logits begin near the log odds of a positive pair. FSDP2 shards no scalars, so one value each
        self.log_scale, self.bias = nn.Parameter(torch.tensor([10.0]).log()), nn.Parameter(torch.tensor([-10.0]))

    def picture_features(self, pixels: Tensor) -> Tensor:
        return nn.functional.normalize(self.tower(pixels), dim=-1)

    def stage_now(self) -> TextStage:
        """The stage around this module's own parts (a copy of the module has its own)."""
        return TextStage(self.stage.tokenizer, self.encoder, self.adapter)

    def forward(
        self, pixels: Tensor, ids: Tensor, mask: Tensor, own: Tensor, positive: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """pixels (b, 3, R, R); ids, mask (T, L) of all the batch's texts; own (b,): the column of each picture's
        caption; positive (b, T) bool: which texts are true of it."""
        encoded = self.stage_now().encode_ids(ids, mask)
        null = self.adapter.null(1, ids.shape[1])
        texts = nn.functional.normalize(torch.cat([encoded.pooled, null.pooled]), dim=-1)
        logits = self.picture_features(pixels) @ texts.T * self.log_scale.exp() + self.bias
        # saying nothing is true of every picture: that is what trains the null condition
        siglip = siglip_losses(logits, torch.cat([positive, positive.new_ones(len(positive), 1)], dim=1))
        guess = self.layout(encoded.tokens[own], mask[own])
        layout = (guess - nn.functional.adaptive_avg_pool2d(pixels, 8)).square().mean((1, 2, 3))
        best = logits[:, :-1].argmax(1, keepdim=True)
        metrics = {"siglip": siglip.mean(), "layout": layout.mean()}
        metrics["in_batch_accuracy"] = positive.gather(1, best).float().mean()
        return self.weights.siglip * siglip + self.weights.layout * layout, metrics


class TextTask:
    def __init__(self, config: TextConfig):
        self.config = config
        if config.data.resolution % config.tower.patch:
            raise ValueError(
                f"tower.patch {config.tower.patch} does not divide data.resolution {config.data.resolution}"
            )
        self.train, self.valid = load_captioned(config.data, config.valid)
        self.identity = {"data": self.train.fingerprint}
        self.count, self.valid_count = len(self.train), len(self.valid)
        torch.manual_seed(config.train.seed)
        self.stage = self._new_stage()
        tower = PictureTower(config.tower.width, config.tower.patch, config.adapter.dim)
        layout = LayoutHead(config.adapter.dim, config.adapter.heads)
        self.players = {"text_encoder": Player(Objective(self.stage, tower, layout, config.loss), config.train)}
        self.texts = TokenTable(self.stage)
        self.own = [self.texts.add(captions) for captions in self.train.captions]
        self.negatives = [self.texts.add([hard_negative(self.train, i, seed=0)]) for i in range(self.count)]
        self.texts.tokenize()
        # a held-out caption that is too long is refused now, not after training
        self.stage.tokenize(unique_captions(self.valid.captions))

    def _new_stage(self) -> TextStage:
        encoder, adapter = self.config.encoder, self.config.adapter
        if encoder.name is None:
            captions = unique_captions(self.train.captions)
            tokenizer = clip_tokenizer(captions, encoder.vocab_size, adapter.max_length)
            model = small_clip(tokenizer, encoder.dim, encoder.layers, encoder.heads, adapter.max_length)
        else:
            tokenizer, model = load_encoder(encoder.name)
            model.requires_grad_(False)
        states, words = model.config.hidden_size, model.get_input_embeddings().embedding_dim
        return TextStage(tokenizer, model, TextAdapter(states, words, **adapter.model_dump()))

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Each picture with one of its captions, drawn anew; every text of the global batch, and a twist of each."""
        draw = batch.uniform_all("caption").tolist()
        chosen = [self.own[i][int(u * len(self.own[i]))] for i, u in zip(batch.ids, draw, strict=True)]
        twisted = [self.negatives[i][0] for i in batch.ids]
        texts = list(dict.fromkeys([*chosen, *twisted]))  # a caption that stands twice is one column
        positive = np.array([[text in self.own[i] for text in texts] for i in batch.own_ids])
        column = {text: i for i, text in enumerate(texts)}
        own = torch.tensor([column[text] for text in chosen[batch.rows]])
        ids, mask = self.texts.take(texts)
        pixels = augment(self.train.pixels(batch.own_ids), batch, self.config.augment)
        return {"pixels": pixels, "ids": ids, "mask": mask, "own": own, "positive": torch.from_numpy(positive)}

    def validate(self, objective: Objective, rows: slice) -> dict[str, np.ndarray]:
        """Whether each held-out picture finds its own caption first of all, and before its twisted twin; 0 or 1."""
        right = [captions[0] for captions in self.valid.captions]
        wrong = [hard_negative(self.valid, i, seed=1) for i in range(len(right))][rows]
        pictures = _features(objective, self.valid.pixels(range(rows.start, rows.stop)))
        texts = _text_vectors(objective, right)
        scores = pictures @ texts.T
        own = scores.diagonal(rows.start)  # the column of row i's own caption is i + rows.start
        same = torch.tensor([[a == b for b in right] for a in right[rows]], device=scores.device)
        beaten_by = (scores > own[:, None]).masked_fill(same, False).sum(1)
        binding = own > (pictures * _text_vectors(objective, wrong)).sum(1)
        return {"recall_at_1": (beaten_by == 0).float().cpu().numpy(), "binding": binding.float().cpu().numpy()}

    def preview(self, objective: Objective) -> Image.Image:
        """For eight held-out captions, the held-out picture that each finds."""
        count = min(256, len(self.valid))
        captions = [c[0] for c in self.valid.captions[: min(8, count)]]
        pictures = _features(objective, self.valid.pixels(range(count)))
        found = (_text_vectors(objective, captions) @ pictures.T).argmax(1).tolist()
        return images.grid([self.valid.pictures[i] for i in found], columns=4, labels=captions, scale=2)

    def export(self, objective: Objective, folder: Path, record: dict[str, Any]) -> None:
        contract = {
            "conditioning": [self.config.adapter.max_length, self.config.adapter.dim],
            "data": {"name": self.train.name, "count": self.count, "fingerprint": self.train.fingerprint},
            **record,
        }
        parts = {
            "tokenizer": self.stage.tokenizer,
            "text_encoder": objective.encoder,
            "text_adapter": objective.adapter,
        }
        stages.export(folder, "text_encoder", parts, contract)


class TokenTable:
    """Texts tokenised once: `add` gives numbers, `take` gives ids and mask for numbers."""

    def __init__(self, stage: TextStage):
        self.stage = stage
        self.numbers: dict[str, int] = {}

    def add(self, texts: Sequence[str]) -> list[int]:
        return [self.numbers.setdefault(text, len(self.numbers)) for text in texts]

    def tokenize(self) -> None:
        """Call once, when all texts are in. Raises ValueError for the first that does not fit."""
        self.tokens = self.stage.tokenize(list(self.numbers))

    def take(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(T,) numbers => ids (T, L), mask (T, L)."""
        ids, mask = self.tokens
        return ids[list(numbers)], mask[list(numbers)]


def hard_negative(pictures: CaptionedPictures, number: int, seed: int) -> str:
    """A caption that is nearly true of a picture: one typed change of its scene graph, or two of its words swapped."""
    if pictures.scenes is not None:
        phrasings = shapes.captions(shapes.swapped(pictures.scenes[number], number + seed)[0])
        return phrasings[number % len(phrasings)]
    words = pictures.captions[number][0].split()
    spots = torch.randperm(len(words), generator=generator(seed, number, "swap")).tolist()
    pairs = [(a, b) for a in spots for b in spots if a < b and words[a] != words[b]]
    if not pairs:  # one word, or all alike: another picture's caption has to do
        return pictures.captions[(number + 1) % len(pictures)][0]
    a, b = pairs[0]
    words[a], words[b] = words[b], words[a]
    return " ".join(words)


def _features(objective: Objective, pixels: Tensor) -> Tensor:
    """pixels (N, 3, R, R) => (N, dim) of length 1."""
    device = objective.log_scale.device
    return torch.cat([objective.picture_features(part.to(device)) for part in pixels.split(256)])


def _text_vectors(objective: Objective, texts: Sequence[str]) -> Tensor:
    """N texts => (N, dim) of length 1."""
    stage, starts = objective.stage_now(), range(0, len(texts), 256)
    pooled = torch.cat([stage.encode(texts[a : a + 256]).pooled for a in starts])
    return nn.functional.normalize(pooled, dim=-1)


main = launch.Program(TextConfig, "text_encoder", lambda launched: TextTask(launched.config))


if __name__ == "__main__":
    sys.exit(command(main))
