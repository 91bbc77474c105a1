"""Latents and prompt embeddings of a data set: encoded once by stages 1 and 2, cached on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sd_mini import files, stages
from sd_mini.data import cache
from sd_mini.data.arrays import Buckets, joined, spans
from sd_mini.data.batches import Rows
from sd_mini.data.captioned import CaptionedPictures, unique_captions
from sd_mini.errors import UserError
from sd_mini.processes import process_device
from sd_mini.stages.contract import Stage
from sd_mini.text_encoder.adapter import TextStage
from training.text_encoder.data import CHUNK, report_cuts

STD = (0.97, 1.03)  # of latents that are standardised by their own statistics


class EncodedRows(NamedTuple):
    """N pictures and T texts. `captions` (N, most captions of a picture): numbers of texts, of which the first
    `counts` (N,) are used; `latents` (N, C, h, w), in `Buckets` where sizes differ, `tokens` (T, L, D), `mask`
    (T, L)."""

    captions: np.ndarray
    counts: np.ndarray
    latents: Rows | Buckets
    tokens: Rows
    mask: Rows


def encode(
    pictures: CaptionedPictures,
    text: Stage,
    vae: Stage,
    captions: int,
    folder: Path,
    dtype: str,
    is_held_out: bool,
    in_order: bool = False,
) -> EncodedRows:
    """At most `captions` texts of each picture, the first ones if `in_order`; `folder` takes the caches, floats as
    `dtype`.

    Raises UserError for latents that are not standardised, unless `is_held_out`: their statistics are the training
    pictures'.
    """
    starts = range(len(pictures)) if not in_order else [0] * len(pictures)
    texts = [_some(several, captions, start) for start, several in zip(starts, pictures.captions, strict=True)]
    unique = unique_captions(texts)
    device = process_device()
    autoencoder, stage = vae.parts["autoencoder"], TextStage.from_parts(text.parts)
    report_cuts(stage.encoders, texts, pictures.name, strict=False)

    def encoded_pictures(pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return autoencoder.encode(pixels.to(device))

    def encode_texts(rows: slice) -> dict[str, np.ndarray]:
        with torch.no_grad():
            encoded = stage.encode(unique[rows], warn=False)
        return {"tokens": encoded.tokens.float().cpu().numpy(), "mask": encoded.mask.cpu().numpy()}

    key, where = {"stage": stages.encoder_of(vae.contract)}, folder / "latents"
    latents = cached_of_pictures(pictures, "latents", encoded_pictures, key, where, dtype, autoencoder)
    if not is_held_out:
        check_scale(latents, pictures, vae.contract)
    key = {"stage": text.hash, "texts": files.combined_hash(unique)}
    title = f"prompts of {pictures.name}"
    prompts = cache.encode(folder / "prompts", key, len(unique), encode_texts, title, dtype, CHUNK, stage.models)
    return EncodedRows(*_numbered(texts, unique), latents, prompts["tokens"], prompts["mask"])


def cached_of_pictures(
    pictures: CaptionedPictures,
    name: str,
    encode_pixels: Callable[[Tensor], Tensor],
    key: Mapping[str, object],
    folder: Path,
    dtype: str,
    model: nn.Module,
) -> Rows | Buckets:
    """pixels (b, 3, H, W) => (b, ...) of every picture, cached; a cache for each size of pictures. `name` is what
    messages call them."""
    parts, array = [], name.split()[-1]
    for span in pictures.spans:
        own = pictures if len(pictures.spans) == 1 else pictures.select(span)

        def encode_rows(rows: slice, own: CaptionedPictures = own) -> dict[str, np.ndarray]:
            pixels = own.pixels(range(rows.start, rows.stop))
            return {array: encode_pixels(pixels).float().contiguous().cpu().numpy()}

        title = f"{name} of {pictures.name}" + ("" if own is pictures else f", {own.sizes[0]}")
        whole_key = {**key, "data": own.pictures_fingerprint}
        parts.append(cache.encode(folder, whole_key, len(own), encode_rows, title, dtype, models=[model])[array])
    return joined(parts)


def _numbered(texts: list[list[str]], unique: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Each picture's texts => their numbers in `unique`, filled up with zeros, and how many there are."""
    number = {text: i for i, text in enumerate(unique)}
    counts = np.array([len(several) for several in texts])
    captions = np.zeros((len(texts), counts.max()), dtype=np.int64)
    for row, several in enumerate(texts):
        captions[row, : len(several)] = [number[text] for text in several]
    return captions, counts


def _some(captions: list[str], at_most: int, number: int) -> list[str]:
    """`at_most` of a picture's captions, neighbours taking different ones, so that every phrasing is seen."""
    start = number % len(captions)
    return (captions[start:] + captions[:start])[:at_most]


def check_scale(latents: Rows | Buckets, pictures: CaptionedPictures, contract: dict[str, Any]) -> None:
    """Check the std of each channel over up to 4,096 latents: noise of unit variance needs it to be 1.

    Outside STD a warning, if the autoencoder's statistics were measured on other pictures or are another
    autoencoder's. Raises UserError if they were measured on these.
    """
    rows = np.unique(np.linspace(0, len(latents) - 1, 4096).astype(int))
    chosen = (rows[(span.start <= rows) & (rows < span.stop)] for span in spans(latents))
    by_shape = (latents[some].astype(np.float64) for some in chosen if len(some))
    values = [some.swapaxes(0, 1).reshape(some.shape[1], -1) for some in by_shape]  # (n, C, h, w) => (C, values)
    std = np.concatenate(values, axis=1).std(1)
    if STD[0] <= std.min() and std.max() <= STD[1]:
        return
    finding = (
        f"latents of {pictures.name}: std a channel from {std.min():.3f} to {std.max():.3f}, expected {STD[0]} to "
        f"{STD[1]}"
    )
    measured_on = contract.get("data", {}).get("fingerprint")
    is_same = measured_on in (pictures.fingerprint, pictures.pictures_fingerprint)
    if is_same and "latents_of" not in contract:
        raise UserError(f"{finding}; train the autoencoder again, with a larger statistics_count if that was small")
    cache.message(f"{finding}: the autoencoder was measured on other pictures; train it on these if much is missing")
