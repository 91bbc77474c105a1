"""Step 1: captions with a term of a word list, pictures that a classifier names."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sd_mini.errors import UserError
from sd_mini.texts import read_lines
from training.data.prepare.config import HarmfulConfig, PrepareConfig
from training.data.prepare.markup import cleaned_caption
from training.data.prepare.shard import Refusal, Refusals, pictures, texts

BUILTIN = Path(__file__).with_name("words.txt")
_BATCH = 32
# NudeNet 3.4's classes of uncovered parts
_EXPOSED = {"FEMALE_BREAST_EXPOSED", "FEMALE_GENITALIA_EXPOSED", "MALE_GENITALIA_EXPOSED", "BUTTOCKS_EXPOSED"}
_EXPOSED |= {"ANUS_EXPOSED"}

Classifier = Callable[[np.ndarray, Sequence[str]], Any]


def clean(batch: pa.Table, config: PrepareConfig, refused: Refusals) -> tuple[pa.Table, Refusals]:
    """The word list over all captions, then the classifier over the pictures that are left."""
    own, more = config.harmful, dict[int, Refusal]()
    pattern = word_pattern(own)
    captions = texts(batch)
    for row, several in enumerate(captions):
        if pattern is None or row in refused:
            continue
        match = next((m for caption in several if (m := pattern.search(normalised(caption)))), None)
        if match is not None:
            more[row] = Refusal("harmful", "word", f"has the term {match[0]!r}")
    if own.classifier is not None:
        classify = load_classifier(own.classifier)
        left = [row for row in range(len(batch)) if row not in refused and row not in more]
        for start in range(0, len(left), _BATCH):
            rows = left[start : start + _BATCH]
            firsts = [captions[row][0] if captions[row] else "" for row in rows]
            for row, value in zip(rows, _probabilities(own, classify, pictures(batch, rows), firsts), strict=True):
                if value >= own.threshold:
                    more[row] = Refusal("harmful", "picture", f"{own.classifier}: {value:.3f}")
    return batch, more


def normalised(text: str) -> str:
    """A text as terms are compared: no markup, no mojibake, NFKC, case folded, white space made one space."""
    return " ".join(unicodedata.normalize("NFKC", cleaned_caption(text)).casefold().split())


@lru_cache(maxsize=4)
def word_pattern(config: HarmfulConfig) -> re.Pattern[str] | None:
    """All terms as one expression of whole words; none where there is no term."""
    lines = read_lines(BUILTIN) if config.builtin_words else []
    lines += read_lines(config.words) if config.words is not None else []
    terms = sorted({normalised(line) for line in lines if line.strip() and not line.startswith("#")}, key=len)
    if not terms:
        return None
    spaced = (re.escape(term).replace(r"\ ", r"[\W_]+") for term in reversed(terms))  # the longest first
    return re.compile(rf"(?<![^\W_])(?:{'|'.join(spaced)})(?![^\W_])")


@lru_cache(maxsize=1)
def load_classifier(name: str) -> Classifier:
    """ "nudenet" or module:PACKAGE.MODULE:FUNCTION => its function. Raises UserError where it cannot be imported."""
    if name == "nudenet":
        return _nudenet()
    kind, _, place = name.partition(":")
    module, _, function = place.partition(":")
    if kind != "module" or not module or not function:
        raise UserError(f"harmful.classifier: got {name!r}, expected nudenet or module:PACKAGE.MODULE:FUNCTION")
    try:
        return getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(f"harmful.classifier: {name!r} cannot be imported: {error}") from error


def _nudenet() -> Classifier:
    try:
        from nudenet import NudeDetector  # ty: ignore[import-not-found]
    except ImportError as error:
        raise UserError(
            f"harmful.classifier: nudenet cannot be imported ({error}); pip install -e '.[safety]' gives it"
        ) from error
    detector = NudeDetector()

    def probabilities(batch: np.ndarray, captions: Sequence[str]) -> list[float]:
        found = []
        for picture in batch:
            # (3, R, R) RGB => (R, R, 3) BGR, as OpenCV reads pictures
            detections = detector.detect(np.ascontiguousarray(picture.transpose(1, 2, 0)[..., ::-1]))
            found.append(max((d["score"] for d in detections if d["class"] in _EXPOSED), default=0.0))
        return found

    return probabilities


def _probabilities(own: HarmfulConfig, classify: Classifier, batch: np.ndarray, captions: list[str]) -> np.ndarray:
    values = np.asarray(classify(batch, captions), dtype=np.float64)
    if values.shape != (len(batch),) or not ((values >= 0) & (values <= 1)).all():
        raise UserError(
            f"harmful.classifier: {own.classifier} gave {values.dtype} of shape {values.shape} for {len(batch)} "
            "pictures, expected a boolean or a probability for each"
        )
    return values
