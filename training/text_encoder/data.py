"""Stage 1's inputs: texts as tokens or as a frozen encoder's states, pictures as pixels or as features."""

from __future__ import annotations

import hashlib
import json
import sys
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from sd_mini import images
from sd_mini.data import cache
from sd_mini.data.batches import Rows
from sd_mini.data.captioned import CaptionedPictures
from sd_mini.errors import UserError
from sd_mini.stages.contract import model_hash
from sd_mini.text_encoder.adapter import TextStage
from sd_mini.text_encoder.encoder import Encoder, Hidden, Tokens, buckets
from sd_mini.text_encoder.loading import load_open_clip
from sd_mini.texts import shown

CHUNK = 1024  # texts encoded at a time, similar lengths together


def report_cuts(encoders: Sequence[Encoder], captions: Sequence[Sequence[str]], name: str, strict: bool) -> None:
    """Report how many captions are longer than an encoder reads, before training on the cut ones.

    `captions` are those of each row of the data set `name`. Raises ValueError, the row named, for a caption that cannot
    be encoded and, if `strict`, for the first that would be cut.
    """
    first: dict[str, int] = {}
    for row, several in enumerate(captions):
        for text in several:
            first.setdefault(text, row)
    texts = list(first)
    for encoder in encoders:
        rows, cuts = encoder.token_rows(texts, where=lambda i: f"row {first[texts[i]]} of {name}: a caption")
        if not cuts:
            continue
        number, cut = next(iter(cuts.items()))
        rate = 100 * len(cuts) / len(rows)
        finding = (
            f"{name}: {len(cuts)} of {len(rows)} captions ({rate:.2g} %) have more than {encoder.max_length} tokens, "
            f"all that {type(encoder.model).__name__} is given; the first is in row {first[texts[number]]}, "
            f"{shown(texts[number])}, and loses {shown(cut)}"
        )
        if strict:
            raise UserError(f"{finding}: shorten them, raise encoder.max_length, or leave strict out to cut them")
        if PartialState().is_main_process:
            tqdm.write(finding, file=sys.stderr)


class Texts:
    """Texts by number: `add` gives numbers, `close` encodes what can be encoded once, `take` gives an encoder's input.

    The input of an encoder that is trained is its tokens; of a frozen one its states, cached on disk.
    """

    def __init__(self, stage: TextStage, trained: Sequence[int]):
        self.stage, self.trained = stage, set(trained)
        self.numbers: dict[str, int] = {}

    def add(self, texts: Iterable[str]) -> list[int]:
        return [self.numbers.setdefault(text, len(self.numbers)) for text in texts]

    def close(self, folder: Path, dtype: str) -> None:
        """Call once, when all texts are added; `folder` takes the cache of frozen encoders' states."""
        texts = list(self.numbers)
        self.rows = [encoder.token_rows(texts)[0] for encoder in self.stage.encoders]
        # word vectors of frozen encoders: the encoder itself may move to a device that no worker has
        self.words = [Words(encoder, rows) for encoder, rows in zip(self.stage.encoders, self.rows, strict=True)]
        self.caches: dict[int, dict[str, Rows]] = {}
        for i, encoder in enumerate(self.stage.encoders):
            if i not in self.trained:
                self.caches[i] = self._encode(encoder, self.rows[i], folder, dtype)

    def _encode(self, encoder: Encoder, rows: list[array[int]], folder: Path, dtype: str) -> dict[str, Rows]:
        device = PartialState().device

        def encode_rows(part: slice) -> dict[str, np.ndarray]:
            chunk = rows[part]
            states = torch.zeros(len(chunk), encoder.max_length, width)
            pooled = torch.zeros(len(chunk), pooled_width)
            for group in buckets(torch.tensor([len(row) for row in chunk])):
                tokens = encoder.padded([chunk[i] for i in group.tolist()])
                with torch.no_grad():
                    hidden = encoder(tokens.ids.to(device), tokens.mask.to(device))
                states[group, : tokens.ids.shape[1]] = (hidden.states * hidden.mask[..., None]).float().cpu()
                pooled[group] = hidden.pooled.float().cpu()
            return {"states": states.numpy(), "pooled": pooled.numpy()}

        name, (width, _, pooled_width) = type(encoder.model).__name__, encoder.widths
        key = {"encoder": model_hash(encoder.model), "length": encoder.max_length, "tokens": _hash_of(rows)}
        key |= {"attends_to_padding": True} if encoder.attends_to_padding else {}
        title = f"texts by {name}"
        return cache.encode(folder / "text_states", key, len(rows), encode_rows, title, dtype, CHUNK, [encoder.model])

    def take(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """(T,) numbers => ids_0, mask_0 of encoder 0 if it is trained, else states_0, words_0, mask_0, pooled_0; ..."""
        inputs: dict[str, Tensor] = {}
        for i, encoder in enumerate(self.stage.encoders):
            tokens = encoder.padded([self.rows[i][number] for number in numbers])
            if i in self.trained:
                fields: Any = tokens
            else:
                ids, stored = np.asarray(numbers), self.caches[i]
                states = torch.from_numpy(stored["states"][ids][:, : tokens.ids.shape[1]]).float()
                pooled = torch.from_numpy(stored["pooled"][ids]).float()
                fields = Hidden(states, self.words[i].take(tokens), tokens.mask, pooled)
            inputs |= {f"{name}_{i}": value for name, value in fields._asdict().items()}
        return inputs


def _hash_of(rows: Iterable[array[int]]) -> str:
    """`files.combined_hash` of the rows as lists, which are not all made at once."""
    digest, joint = hashlib.sha256(b"["), ""
    for row in rows:
        digest.update(f"{joint}{json.dumps(row.tolist())}".encode())
        joint = ", "
    digest.update(b"]")
    return digest.hexdigest()


class Words:
    """The vectors (N, W) of the words that occur in the texts, each once, on the CPU."""

    def __init__(self, encoder: Encoder, rows: Iterable[Iterable[int]]):
        self.ids = torch.tensor(sorted({number for row in rows for number in row}))
        with torch.no_grad():
            self.vectors = encoder.words(self.ids.to(encoder.model.device)).float().cpu()

    def take(self, tokens: Tokens) -> Tensor:
        """Tokens (B, L) => (B, L, W), zeros where there is padding."""
        vectors = self.vectors[torch.searchsorted(self.ids, tokens.ids).clamp(max=len(self.ids) - 1)]
        return vectors * tokens.mask[..., None]


def tower_features(name: str, weights: str | None, pictures: CaptionedPictures, folder: Path) -> Tensor:
    """A frozen open_clip picture tower's features of every picture, (N, F); `folder` takes their cache."""
    model, transform = load_open_clip(name, weights)
    device = PartialState().device

    def encode_rows(rows: slice) -> dict[str, np.ndarray]:
        own = (images.to_pil(pictures.pictures[[i]])[0] for i in range(rows.start, rows.stop))
        batch = torch.stack([transform(picture) for picture in own])
        with torch.no_grad():
            return {"features": model.encode_image(batch.to(device)).float().cpu().numpy()}

    key = {"tower": model_hash(model), "transform": str(transform), "data": pictures.pictures_fingerprint}
    title = f"features of {pictures.name}"
    where = folder / "picture_features"
    stored = cache.encode(where, key, len(pictures), encode_rows, title, "float32", models=[model])["features"]
    return torch.from_numpy(stored[:])


def read_features(path: Path, pictures: CaptionedPictures) -> Tensor:
    """Features made elsewhere, a .npy file of (N, F) numbers, a row for each picture in order. Raises ValueError."""
    try:
        features = np.load(path)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise UserError(f"tower.features: {path} cannot be read ({error}); expected a .npy file of (N, F)") from None
    if not isinstance(features, np.ndarray):
        raise UserError(f"tower.features: {path} holds several arrays; expected a .npy file of one, (N, F)")
    if features.ndim != 2 or len(features) != len(pictures) or features.dtype.kind != "f":
        raise UserError(
            f"tower.features: {path} is {features.dtype} of shape {features.shape}; expected floats, "
            f"({len(pictures)}, F): a row for each picture of {pictures.name}"
        )
    with np.errstate(over="ignore"):  # an overflow is reported below
        features = features.astype(np.float32)
    if not np.isfinite(features).all():
        raise UserError(
            f"tower.features: {path}, row {np.argwhere(~np.isfinite(features))[0][0]} is not finite in float32"
        )
    return torch.from_numpy(features)
