"""What stage 3 reads of a data set: latents and prompt embeddings, encoded once and cached."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from sd_mini import files, stages
from sd_mini.data.captioned import CaptionedPictures, unique_captions
from sd_mini.errors import UserError
from sd_mini.stages.contract import Stage
from sd_mini.text_encoder.adapter import TextStage
from training.storage import cache
from training.text_encoder.data import CHUNK, report_cuts

STD = (0.97, 1.03)  # of latents that are standardised by their own statistics


class Encoded:
    """A data set as stage 3 sees it: latents and prompt embeddings, from the caches."""

    def __init__(
        self,
        pictures: CaptionedPictures,
        text: Stage,
        vae: Stage,
        captions: int,
        folder: Path,
        dtype: str,
        is_held_out: bool = False,
    ):
        texts = [_some(several, captions, number) for number, several in enumerate(pictures.captions)]
        unique = unique_captions(texts)
        number = {text: i for i, text in enumerate(unique)}
        self.counts = np.array([len(several) for several in texts])
        # (n, most captions of a picture): numbers of texts, the rest unused
        self.captions = np.zeros((len(texts), self.counts.max()), dtype=np.int64)
        for row, several in enumerate(texts):
            self.captions[row, : len(several)] = [number[text] for text in several]
        device = PartialState().device
        autoencoder, stage = vae.parts["autoencoder"].to(device), text_stage(text, device)
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
            {"stage": stages.encoder_of(vae.contract), "data": pictures.pictures_fingerprint},
            len(pictures),
            encode_pictures,
            f"latents of {pictures.name}",
            dtype,
        )["latents"]
        if not is_held_out:  # the latents are standardised over training pictures, which others differ from
            check_scale(self.latents, pictures, vae.contract)
        words = cache.encode(
            folder / "prompts",
            {"stage": text.hash, "texts": files.combined_hash(unique)},
            len(unique),
            encode_texts,
            f"prompts of {pictures.name}",
            dtype,
            chunk=CHUNK,
        )
        self.tokens, self.mask = words["tokens"], words["mask"]
        self.resident: tuple[Tensor, ...] | None = None

    def __len__(self) -> int:
        return len(self.latents)

    def take(self, ids: np.ndarray, draw: Sequence[float]) -> dict[str, Tensor]:
        """Sample numbers, and U[0, 1) that picks a caption of each => latents, prompt_embeds, prompt_mask."""
        texts = self.captions[ids, (np.asarray(draw) * self.counts[ids]).astype(np.int64)]
        if self.resident is not None:
            latents, tokens, mask = self.resident
            own, said = (torch.from_numpy(rows).to(latents.device, non_blocking=True) for rows in (ids, texts))
            return {"latents": latents[own].float(), "prompt_embeds": tokens[said].float(), "prompt_mask": mask[said]}
        return {
            "latents": torch.from_numpy(self.latents[ids]).float(),
            "prompt_embeds": torch.from_numpy(self.tokens[texts]).float(),
            "prompt_mask": torch.from_numpy(self.mask[texts]),
        }

    def move(self, device: torch.device) -> None:
        """Keep all rows in that device's memory, in the cache's dtype; `take` gathers them there from then on."""
        arrays = (self.latents, self.tokens, self.mask)
        self.resident = tuple(torch.from_numpy(rows[np.arange(len(rows))]).to(device) for rows in arrays)


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
    measured_on = contract.get("data", {}).get("fingerprint")
    is_same = measured_on in (pictures.fingerprint, pictures.pictures_fingerprint)
    if is_same and "latents_of" not in contract:
        raise UserError(f"{said}; train the autoencoder again, with a larger statistics_count if that was small")
    cache.say(f"{said}: the autoencoder was measured on other pictures; train it on these if much is missing")


def text_stage(text: Stage, device: torch.device | str) -> TextStage:
    stage = TextStage.from_parts(text.parts)
    for part in (stage.adapter, *(encoder.model for encoder in stage.encoders)):
        part.to(device)
    return stage
