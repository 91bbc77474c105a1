"""What the text stage alone is worth: does a caption find its picture, and is it told from its twin?

It is measured on the pictures of the data themselves, so that neither the autoencoder nor the noise predictor has a
part in it, by the matcher that stage 1 trained beside its adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.judge.judge import wilson
from eval.metrics.bootstrap import few_prompts
from sd_mini.data.captioned import CaptionedPictures
from sd_mini.stages.contract import Stage, load_stage
from sd_mini.text_encoder.adapter import TextStage
from sd_mini.text_encoder.matcher import (
    MEASURED,
    different,
    embed_images,
    embed_texts,
    measured_caption,
    own_similarity,
    similarity,
    text_scores,
    twins,
)

MEASURES = ("recall_at_1", "recall_at_5", "recall_at_10", "binding", "binding_projection")


class TextProbe:
    """The text stage in `folder` with its matcher. `resolution`: px of the pictures that it was trained on."""

    def __init__(self, folder: Path):
        self.loaded: Stage = load_stage(folder, "text_encoder")
        self.stage = TextStage.from_parts(self.loaded.parts)
        self.matcher = self.loaded.parts["matcher"]
        self.resolution: int = self.loaded.contract["resolution"]

    @property
    def sees_pixels(self) -> bool:
        """Whether its picture side reads pictures, not the features that some other network made of them."""
        return self.matcher.config.feature_dim is None

    def scores(self, data: CaptionedPictures) -> dict[str, Any]:
        """Each measure's share of all pictures of `data`, the 95 % interval of the two of binding, and n."""
        count = len(data)
        found = text_scores(self.stage, self.matcher, data, data.pixel_parts(), slice(0, count))
        captions = [own[measured_caption(data, i)] for i, own in enumerate(data.captions)]
        few = few_prompts(captions) is not None
        return _summary({name: float(np.sum(values)) for name, values in found.items()}, count, few)

    @torch.no_grad()
    def doubtful(self, data: CaptionedPictures) -> np.ndarray:
        """(N,) bool: the captions that the stage does not tell from their twins.

        Half of the guesses of whoever does not know are right, so these are the misses and as many hits, the closest.
        """
        which = [measured_caption(data, i) for i in range(len(data))]
        captions = [own[i] for own, i in zip(data.captions, which, strict=True)]
        twisted = [twins(data, i, MEASURED)[which[i]] for i in range(len(data))]
        seen = embed_images(self.matcher, data.pixel_parts())
        right, wrong = (embed_texts(self.stage, self.matcher, texts)[0] for texts in (captions, twisted))
        margin = (own_similarity(seen, right) - own_similarity(seen, wrong)).cpu().numpy()
        found = np.zeros(len(data), dtype=bool)
        found[np.argsort(margin, kind="stable")[: 2 * int((margin <= 0).sum())]] = True
        return found

    @torch.no_grad()
    def taken_for(self, data: CaptionedPictures) -> np.ndarray:
        """(N,) the number of a picture that each row's caption is taken for: its own where that caption finds a picture
        of itself first, else one of the caption whose picture it finds.

        Where captions repeat, the rows of one take the pictures of the other in turn: one picture in all their places
        would be a collapsed set, which no text stage makes.
        """
        captions = [own[0] for own in data.captions]
        unique, number = different(captions)
        texts = embed_texts(self.stage, self.matcher, unique)[0]
        scores = similarity(embed_images(self.matcher, data.pixel_parts()), texts)
        best = scores.argmax(0).cpu()[number].numpy()
        rows_of: dict[str, list[int]] = {}
        for row, caption in enumerate(captions):
            rows_of.setdefault(caption, []).append(row)
        found, turns = np.arange(len(captions)), dict.fromkeys(rows_of, 0)
        for row, caption in enumerate(captions):
            if (other := captions[best[row]]) != caption:
                found[row] = rows_of[other][turns[other] % len(rows_of[other])]
                turns[other] += 1
        return found

    def recorded(self, name: str) -> dict[str, Any] | None:
        """What was measured of the data set `name` ("emoji:test") at the end of training, if it was: for a matcher that
        needs another network's features."""
        valid, scores = self.loaded.contract["valid"], self.loaded.contract["scores"]
        if valid["name"] != name:
            return None
        return _summary({name: value * valid["count"] for name, value in scores.items()}, valid["count"])


def _summary(hits: Mapping[str, float], count: int, few: bool = False) -> dict[str, Any]:
    """Hits by name, of `count` => the report's entry of one split. The other direction's and the plain projection's
    recalls are kept too. `few`: of so few different captions that only finding a picture means something."""
    left_out = ("binding", "recall_of_captions") if few else ()
    entry: dict[str, Any] = {name: value / count for name, value in hits.items() if not name.startswith(left_out)}
    for name in ("binding", "binding_projection"):
        if name in entry:
            entry[f"{name}_low"], entry[f"{name}_high"] = wilson(round(hits[name]), count)
    return {**entry, "n": count}
