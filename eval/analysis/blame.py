"""Which stage is to blame: sets of pictures in which one stage after the other takes part, measured alike.

    real          true pictures of what is asked
    autoencoder   the same, through the autoencoder and back
    text_encoder  the same, but where the text stage does not know better, the picture of what it takes the caption for
    made          the pipeline's own pictures

What the error grows by from one set to the next is that stage's share. Where the text stage cannot be measured (it is
another's, or its matcher is not there), the last share is its and the noise predictor's together, `rest`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TypeVar

import numpy as np

from eval.analysis.text import TextProbe
from eval.makers.questions import PromptSet
from eval.metrics.bootstrap import prompt_interval
from eval.metrics.reconstruction import reconstruct
from sd_mini import shapes
from sd_mini.autoencoder.model import Autoencoder
from sd_mini.data.captioned import CaptionedPictures
from sd_mini.text_encoder.matcher import MEASURED

REAL, AUTOENCODER, TEXT, MADE, REST = "real", "autoencoder", "text_encoder", "made", "rest"
FLOOR, PREDICTOR = "floor", "noise_predictor"
Sets = dict[str, np.ndarray]
Error = TypeVar("Error", float, np.ndarray)


def picture_sets(
    asked: PromptSet,
    made: np.ndarray,
    autoencoder: Autoencoder | None,
    probe: TextProbe | None,
    data: CaptionedPictures | None,
    batch: int,
) -> Sets:
    """The sets above, (N, 3, R, R) uint8 each, as far as the stages are there. `data`: the asked rows, as `probe` takes
    them."""
    assert asked.pictures is not None  # else there is nothing to share out
    sets = {REAL: asked.pictures}
    if autoencoder is not None:
        sets[AUTOENCODER] = reconstruct(autoencoder, asked.pictures, batch)
    if probe is not None and data is not None and len(data) > 1:
        rows, pictures = _taken_for(asked, probe, data)
        before = sets.get(AUTOENCODER, asked.pictures)
        if len(rows) and autoencoder is not None:
            pictures = reconstruct(autoencoder, pictures, batch)
        sets[TEXT] = before.copy()
        sets[TEXT][rows] = pictures
    return {**sets, MADE: made}


def _taken_for(asked: PromptSet, probe: TextProbe, data: CaptionedPictures) -> tuple[np.ndarray, np.ndarray]:
    """The captions that the text stage does not know, and pictures of what it takes them for: of a scene graph its
    twin, and of any other data a picture of the caption whose picture it finds first."""
    assert asked.pictures is not None
    if asked.scenes is None:
        found = probe.taken_for(data)
        rows = np.flatnonzero(found != np.arange(len(found)))
        return rows, asked.pictures[found[rows]]
    rows = np.flatnonzero(probe.doubtful(data))
    others = [shapes.swapped(asked.scenes[row], row + MEASURED)[0] for row in rows]
    drawn = shapes.draw_batch(others, asked.pictures.shape[-1]) if others else asked.pictures[:0]
    return rows, drawn


def share_out(errors: Mapping[str, Error]) -> dict[str, Error]:
    """Each set's error => the floor (real pictures') and each stage's share. They add up to the made pictures' error;
    a share below 0 is noise, or a stage that mends what the one before it broke."""
    names = list(errors)
    shares: dict[str, Error] = {FLOOR: errors[REAL]}
    for before, name in pairwise(names):
        part = name if name != MADE else PREDICTOR if TEXT in errors else REST
        shares[part] = errors[name] - errors[before]  # ty: ignore[invalid-assignment]  # of a type that subtracts
    return shares


def share_out_each(errors: Mapping[str, np.ndarray], prompts: Sequence[str]) -> dict[str, dict[str, float]]:
    """As `share_out`, of errors that each picture has, (N,): the mean share, and low, high, its 95 % interval over
    prompts; the same prompts stand in every set."""
    found = {}
    for part, values in share_out(errors).items():
        low, high = prompt_interval(values, prompts)
        found[part] = {"share": float(values.mean()), "low": low, "high": high}
    return found
