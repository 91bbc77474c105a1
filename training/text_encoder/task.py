"""Stage 1: the text adapter, trained on captions and pictures, with its encoder if that one has yet to learn.

accelerate launch -m training.text_encoder --config training/configs/shapes/text_encoder.yaml --run runs/shapes
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from transformers import CLIPTextModel

from sd_mini import images, lora, stages
from sd_mini.data.batches import Batch, row_slices
from sd_mini.data.buckets import bucket_sizes
from sd_mini.data.caption_draws import drawn_captions
from sd_mini.data.captioned import unique_captions
from sd_mini.data.parts import load_captioned
from sd_mini.errors import UserError
from sd_mini.remarks import remark
from sd_mini.text_encoder.adapter import TextAdapter, TextStage
from sd_mini.text_encoder.encoder import Encoder
from sd_mini.text_encoder.loading import clip_tokenizer, is_open_clip, load_encoder, open_clip_encoder, small_clip
from sd_mini.text_encoder.matcher import (
    Matcher,
    embed_images,
    embed_texts,
    projected_dim,
    similarity,
    text_scores,
    twins,
)
from sd_mini.texts import with_sides_swapped
from training.distributed.processes import rows_of_process
from training.engine import launch
from training.engine.augment import augment
from training.engine.learner import Player
from training.text_encoder import data as text_data
from training.text_encoder.config import TextConfig
from training.text_encoder.losses import TextObjective
from training.text_encoder.partial import freeze_rest

STATISTICS_COUNT = 4096  # captions for the tokens' mean and std


class TextTask:
    evaluate_every = None  # its held-out scores are what an evaluation would measure

    def __init__(self, config: TextConfig, cache: Path):
        self.config = config
        self.train, self.valid = load_captioned(config.data, config.valid, cache / "pictures")
        self.rejected = [*self.train.rejected, *self.valid.rejected]
        self.weights, self.valid_sources = self.train.weights, self.valid.sources
        self.bucket_counts = self.train.bucket_counts
        if config.augment.mirror and not config.data.mirror and self.train.scenes is None:
            sided = sum(any(with_sides_swapped(text) != text for text in own) for own in self.train.captions)
            if sided:
                remark(
                    f"augment.mirror {config.augment.mirror:g} turns round {sided:,} pictures whose captions name left "
                    "or right; set data.mirror instead, which exchanges the words too"
                )
        self.identity = dict(self.train.identity)
        self.count, self.valid_count = len(self.train), len(self.valid)
        torch.manual_seed(config.train.seed)
        encoders, trained = _encoders(config, unique_captions(self.train.captions))
        for part in (self.train, self.valid):
            text_data.report_cuts(encoders, part.captions, part.name, config.strict)
        widths = [encoder.widths for encoder in encoders]
        lengths = [encoder.max_length for encoder in encoders]
        adapter = TextAdapter(*map(list, zip(*widths, strict=True)), lengths, **config.adapter.model_dump())
        self.stage = TextStage(encoders, adapter)
        self.features = self._features(cache)
        self._identify(encoders)
        tower = self._tower()  # the last check of the config: caches are written from here on
        self.texts = text_data.Texts(self.stage, trained)
        self.captions = [self.texts.add(captions) for captions in self.train.captions]
        self.twins = [self._add_twins(i) for i in range(self.count)]
        self.texts.close(cache, config.cache_dtype)
        inputs: Any = adapter.inputs
        for read, words in zip(inputs, self.texts.words, strict=True):
            read.set_words(words.vectors)
        tower["late_dim"] = config.tower.late_dim if config.loss.late else 0
        matcher = Matcher(config.adapter.dim, **tower, projected_dim=projected_dim(self.stage))
        objective = TextObjective(self.stage, trained, matcher, config.loss)
        self.players = {"text_encoder": Player(objective, config.train)}

    def _add_twins(self, number: int) -> list[list[int]]:
        """The numbers of the twins of each of a picture's captions."""
        count = self.config.twins
        drawn = [twins(self.train, number, number * (count - 1) + k) for k in range(count)]
        return [self.texts.add(several) for several in zip(*drawn, strict=True)]

    def _identify(self, encoders: list[Encoder]) -> None:
        """Hashes of pretrained encoders and of features: a checkpoint with others is refused."""
        for i, (encoder, config) in enumerate(zip(encoders, self.config.encoders, strict=True)):
            if config.name is not None:
                self.identity[f"encoder_{i}"] = stages.model_hash(encoder.model)
        if self.features is not None:
            digests = [hashlib.sha256(part.numpy().tobytes()).hexdigest() for part in self.features]
            self.identity["features"] = "/".join(digests)

    def _features(self, cache: Path) -> list[Tensor] | None:
        """Features of the training and the held-out pictures, if the picture side is frozen."""
        tower, parts = self.config.tower, {"train": self.train, "valid": self.valid}
        if tower.features is not None:
            features = [text_data.read_features(Path(tower.features) / f"{name}.npy", p) for name, p in parts.items()]
            widths = [part.shape[1] for part in features]
            if len(set(widths)) > 1:
                raise UserError(
                    f"tower.features {tower.features}: train.npy and valid.npy are {widths} wide; not alike"
                )
            return features
        if tower.name is not None:
            return [text_data.tower_features(tower.name, tower.weights, p, cache) for p in parts.values()]
        return None

    def _tower(self) -> dict[str, Any]:
        tower = self.config.tower
        if self.features is not None:
            return {"feature_dim": self.features[0].shape[1]}
        for size in bucket_sizes(self.config.data):
            for side in size:
                if side % tower.patch:
                    name = "data.resolution" if size.height == size.width else f"{size}, a bucket: data.bucket_step"
                    raise UserError(f"tower.patch {tower.patch} does not divide {name} {side}")
        return {"width": tower.width, "patch": tower.patch}

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Each picture with one of its captions, drawn anew. This process encodes its part of the global batch's
        captions and twins, and the captions of its own pictures."""
        caption_draws, twin_draws = (batch.uniform_all(name).tolist() for name in ("caption", "twin"))
        which = [int(u * len(self.captions[i])) for i, u in zip(batch.ids, caption_draws, strict=True)]
        if (weights := self.config.data.caption_weights) is not None:
            counts = np.array([len(self.captions[i]) for i in batch.ids])
            which = drawn_captions(np.array(caption_draws), counts, weights).tolist()
        chosen = [self.captions[i][c] for i, c in zip(batch.ids, which, strict=True)]
        candidates = [self.twins[i][c] for i, c in zip(batch.ids, which, strict=True)]
        twins_chosen = [several[int(u * len(several))] for several, u in zip(candidates, twin_draws, strict=True)]
        # a text that occurs twice is one column; a caption and its twin are neighbours
        columns = list(dict.fromkeys(text for pair in zip(chosen, twins_chosen, strict=True) for text in pair))
        count = PartialState().num_processes
        slices = [rows_of_process(len(columns), count, rank) for rank in range(count)]
        places, sent = gather_plan(slices)
        local_texts = columns[slices[PartialState().process_index]]
        local_texts = list(dict.fromkeys([*local_texts, *chosen[batch.rows]]))
        number = {text: i for i, text in enumerate(local_texts)}
        column = {text: i for i, text in enumerate(columns)}
        pixels = augment(self.train.pixels(batch.own_ids), batch, self.config.augment)
        true_captions = [set(self.captions[i]) for i in batch.own_ids]
        return {
            "pictures": pixels if self.features is None else self.features[0][batch.own_ids],
            "thumbnails": adaptive_avg_pool2d(pixels, 8),
            "caption": torch.tensor([column[text] for text in chosen[batch.rows]]),
            "twin": torch.tensor([column[text] for text in twins_chosen[batch.rows]]),
            "local_texts": torch.tensor([number.get(text, -1) for text in columns]),
            "positive": torch.tensor([[text in captions for text in columns] for captions in true_captions]),
            "text_places": places,
            "sent_texts": sent,
            **(self._against_all_pictures(batch, chosen) if self.config.loss.infonce else {}),
            **self.texts.take(local_texts),
        }

    def _against_all_pictures(self, batch: Batch, chosen: list[int]) -> dict[str, Tensor]:
        rows = row_slices(len(batch.ids), PartialState().num_processes, 1)[0]
        places, sent = gather_plan(rows)
        true_of = [[text in self.captions[i] for i in batch.ids] for text in chosen[batch.rows]]
        return {"picture_places": places, "sent_pictures": sent, "true_of": torch.tensor(true_of)}

    def stage_of(self, objective: TextObjective) -> TextStage:
        """The stage with the weights of `objective`, which may be a copy."""
        encoders = [objective.encoder(i) or frozen for i, frozen in enumerate(self.stage.encoders)]
        for encoder in encoders:
            encoder.model.to(objective.adapter.device)
        return TextStage(encoders, objective.adapter)

    def _valid_pictures(self, rows: Sequence[int]) -> Iterator[Tensor]:
        """Held-out pictures, in parts as the matcher takes them."""
        return self.valid.select(rows).pixel_parts() if self.features is None else iter([self.features[1][list(rows)]])

    def validate(self, objective: TextObjective, rows: slice) -> dict[str, np.ndarray]:
        """Retrieval and binding of held-out samples; see `text_scores`."""
        pictures = self._valid_pictures(range(len(self.valid)))
        return text_scores(self.stage_of(objective), objective.matcher, self.valid, pictures, rows)

    def preview(self, objective: TextObjective) -> Image.Image:
        """For eight held-out captions, the held-out picture most similar to each."""
        candidates = self.valid.spread(256)
        captions = [self.valid.captions[row][0] for row in self.valid.spread(8)]
        text_embeds, _ = embed_texts(self.stage_of(objective), objective.matcher, captions)
        picture_embeds = embed_images(objective.matcher, self._valid_pictures(candidates))
        nearest = similarity(picture_embeds, text_embeds).argmax(0).tolist()
        return images.grid([self.valid.pictures[candidates[i]] for i in nearest], columns=4, labels=captions, scale=2)

    def export(self, objective: TextObjective, folder: Path, record: dict[str, Any]) -> None:
        """Standardise the tokens over training captions, then write the stage."""
        encoders = [
            Encoder(e.tokenizer, lora.merged(e.model), e.max_length, e.attends_to_padding)
            for e in self.stage_of(objective).encoders
        ]
        stage = TextStage(encoders, objective.adapter)
        stage.standardise(_spread(unique_captions(self.train.captions), STATISTICS_COUNT))
        contract = {
            "conditioning": [stage.adapter.length, self.config.adapter.dim],
            "resolution": self.config.data.resolution,
            "data": {"name": self.train.name, "count": self.count, "fingerprint": self.train.fingerprint},
            "valid": {"name": self.valid.name, "count": len(self.valid)},
            **record,
        }
        stages.export(folder, "text_encoder", {**stage.parts, "matcher": objective.matcher}, contract)


def _encoders(config: TextConfig, captions: list[str]) -> tuple[list[Encoder], list[int]]:
    """The encoders of a config, and the numbers of those that are trained."""
    encoders, trained = [], []
    for i, one in enumerate(config.encoders):
        if one.name is None:
            tokenizer = clip_tokenizer(captions, one.vocab_size, one.max_length)
            model = small_clip(tokenizer, one.dim, one.layers, one.heads, one.max_length)
        else:
            load = open_clip_encoder if is_open_clip(one.name, one.weights) else load_encoder
            tokenizer, model = load(one.name, one.weights) if load is open_clip_encoder else load(one.name)
            assert tokenizer is not None  # the encoder is loaded with its own
            freeze_rest(model, one.train_layers, one.lora_rank)
        if config.adapter.plain and not isinstance(model, CLIPTextModel):
            raise UserError(
                f"adapter.plain: is a projection of a CLIP text model's states, and the encoder is a "
                f"{type(model).__name__}; give a CLIP text model, or leave plain out"
            )
        encoders.append(Encoder(tokenizer, model, one.max_length, config.adapter.plain))
        if one.name is None or one.train_layers or one.lora_rank:
            trained.append(i)
    return encoders, trained


def gather_plan(slices: list[slice]) -> tuple[Tensor, Tensor]:
    """The rows of each process => (places, sent) for `gather_rows`: the place of every row in the concatenation over
    processes, padded to the largest count; and the rows that this process sends, padded with its first."""
    counts = [part.stop - part.start for part in slices]
    most, local = max(counts), counts[PartialState().process_index]
    places = torch.cat([torch.arange(count) + rank * most for rank, count in enumerate(counts)])
    return places, torch.tensor([i if i < local else 0 for i in range(most)])


def _spread(texts: list[str], at_most: int) -> list[str]:
    """At most `at_most` texts, evenly spaced."""
    return [texts[i * len(texts) // at_most] for i in range(at_most)] if len(texts) > at_most else texts


main = launch.Program(TextConfig, "text_encoder", lambda launched: TextTask(launched.config, launched.run / "cache"))
