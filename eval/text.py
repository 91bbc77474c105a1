"""What the text stage alone is worth: does a caption find its picture, and is it told from its twin?

It is measured on the pictures of the data themselves, so that neither the autoencoder nor the noise predictor has a
part in it, by the matcher that stage 1 trained beside its adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from eval.composition import wilson
from sd_mini.data import CaptionedPictures
from sd_mini.retrieval import text_scores
from sd_mini.stages import Stage, load_stage
from sd_mini.text_encoder import TextStage

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
        found = text_scores(self.stage, self.matcher, data, data.pixels(range(count)), slice(0, count))
        return _summary({name: float(np.sum(values)) for name, values in found.items()}, count)

    def recorded(self, name: str) -> dict[str, Any] | None:
        """What was measured of the data set `name` ("emoji:test") at the end of training, if it was: for a matcher that
        needs another network's features."""
        valid, scores = self.loaded.contract["valid"], self.loaded.contract["scores"]
        if valid["name"] != name:
            return None
        return _summary({name: value * valid["count"] for name, value in scores.items()}, valid["count"])


def _summary(hits: Mapping[str, float], count: int) -> dict[str, Any]:
    """Hits by name, of `count` => the report's entry of one split. The other direction's and the plain projection's
    recalls are kept too."""
    entry: dict[str, Any] = {name: value / count for name, value in hits.items()}
    for name in ("binding", "binding_projection"):
        entry[f"{name}_low"], entry[f"{name}_high"] = wilson(round(hits[name]), count)
    return {**entry, "n": count}


def blame(exact: float, ceiling: float, binding: float) -> dict[str, float]:
    """Shares of all prompts => what each stage is to blame for; the three parts and `exact` add up to 1.

    The autoencoder: what even true drawings lose in it. The text encoder, at most: the captions that it does not tell
    from their twins, of those that are left. Whoever does not know guesses right half the time, so these are twice the
    misses; and the noise predictor may make more of the tokens than the measure did. The noise predictor: the rest.
    """
    lost = 1 - exact
    autoencoder = min(1 - ceiling, lost)
    text = min(ceiling * min(2 * (1 - binding), 1), lost - autoencoder)
    return {"autoencoder": autoencoder, "text_encoder": text, "noise_predictor": lost - autoencoder - text}
