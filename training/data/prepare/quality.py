"""Step 3: pictures that are too small, stretched, blank or blurred; captions that describe nothing or do not fit."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from sd_mini import images
from training.data.prepare.config import PrepareConfig, QualityConfig
from training.data.prepare.shard import Refusal, Refusals, pictures, texts

_BATCH = 32
_ENDINGS = r"(?:jpe?g|png|gif|webp|bmp|tiff?|heic|heif|avif|svg|psd|raw|cr2|nef)"
_BOILERPLATE = (
    ("camera_name", rf"(?:img|imag|image|dsc|dscf|dscn|dcim|pic|pict|photo|mvi|vid|gopr|dji|scan|screenshot|wp|pxl)"
     rf"[\s_-]*\d[\d\s_().-]*(?:wa\d+)?(?:\.{_ENDINGS})?"),
    ("file_name", rf"[^\n]*\w\.{_ENDINGS}"),
    ("address", r"(?:(?:https?://|www\.)\S+\s*)+|(?:[\w-]+\.)+[a-z]{2,}/\S*"),
    ("placeholder", r"(?:untitled|no caption|no description|null|none|nan|n/a|image|photo|picture|thumbnail)[\s.\d]*"),
)  # fmt: skip
_PATTERNS = {reason: re.compile(pattern, re.IGNORECASE) for reason, pattern in _BOILERPLATE}


def clean(batch: pa.Table, config: PrepareConfig, refused: Refusals) -> tuple[pa.Table, Refusals]:
    """The rules of one row. That a caption repeats is only known of all rows together (`duplicates.repeated`)."""
    own, more = config.quality, dict[int, Refusal]()
    captions = texts(batch)
    for row, measured in enumerate(batch.select(["width", "height", "contrast", "sharpness"]).to_pylist()):
        if row in refused:
            continue
        fault = picture_fault(own, **measured)
        if fault is None and captions[row]:
            fault = caption_fault(own, captions[row][0])
        if fault is not None:
            more[row] = Refusal("quality", *fault)
    if own.clip is not None and config.data.text_column is not None:
        left = [row for row in range(len(batch)) if row not in refused and row not in more]
        score = load_clip(own.clip)
        for start in range(0, len(left), _BATCH):
            rows = left[start : start + _BATCH]
            scores = score(pictures(batch, rows), [captions[row][0] for row in rows])
            for row, value in zip(rows, scores.tolist(), strict=True):
                if value < own.min_clip_score:
                    more[row] = Refusal("quality", "clip_score", f"{value:.3f}")
    return batch, more


def picture_fault(
    own: QualityConfig, width: int, height: int, contrast: float, sharpness: float
) -> tuple[str, str] | None:
    """A picture's measures => the first rule it breaks and its value, if any."""
    short, long = sorted((width, height))
    if short < own.min_side:
        return "too_small", f"{width} x {height} px"
    if own.max_aspect and long > own.max_aspect * short:
        return "aspect", f"{width} x {height} px"
    if contrast < own.min_contrast:
        return "near_blank", f"contrast {contrast:.2f}"
    if sharpness < own.min_sharpness:
        return "blurred", f"sharpness {sharpness:.2f}"
    return None


def caption_fault(own: QualityConfig, caption: str) -> tuple[str, str] | None:
    """A caption => the first rule it breaks and its beginning, if any."""
    shown = caption[:200]
    if own.boilerplate:
        text = caption.strip()
        for reason, pattern in _PATTERNS.items():
            if pattern.fullmatch(text):
                return reason, shown
        if not any(letter.isalnum() for letter in text):
            return "no_words", shown
    if own.languages is not None and (share := script_share(caption, own.languages)) <= 0.5:
        return "language", f"{share:.0%} of its letters: {shown}"
    return None


def script_share(text: str, scripts: Sequence[str]) -> float:
    """The share of a text's letters that belong to these scripts; 1 where it has no letters."""
    known = [_script(letter) for letter in text if letter.isalpha()]
    return sum(script in scripts for script in known) / len(known) if known else 1.0


@lru_cache(maxsize=65536)
def _script(letter: str) -> str:
    """A letter's script in lower case, the first word of its Unicode name: latin, cyrillic, han, ..."""
    first = unicodedata.name(letter, "unknown").split()[0].lower()
    return {"cjk": "han", "fullwidth": "latin", "halfwidth": "katakana"}.get(first, first)


MEASURED_SIDE = 128  # px: all pictures are measured at one size, as a second derivative grows with the scale


def scaled_grey(rgb: Any) -> Any:
    """A PIL image => its brightness, the short side scaled down to 128 px; smaller ones as they are."""
    grey, side = rgb.convert("L"), min(rgb.size)
    if side <= MEASURED_SIDE:
        return grey
    size = (round(rgb.width * MEASURED_SIDE / side), round(rgb.height * MEASURED_SIDE / side))
    return grey.resize(size, images.Image.Resampling.BILINEAR, reducing_gap=3.0)


def sharpness(grey: Any) -> float:
    """What `scaled_grey` gives => the variance of its Laplacian."""
    if min(grey.size) < 3:
        return 0.0
    at = np.asarray(grey).astype(np.int16)
    laplacian = at[:-2, 1:-1] + at[2:, 1:-1]  # 5 points; of uint8 it fits into 16 bits
    laplacian += at[1:-1, :-2]
    laplacian += at[1:-1, 2:]
    laplacian -= at[1:-1, 1:-1] << 2
    # sums of whole numbers below 2^53 are exact in any order
    values = laplacian.astype(np.float64).ravel()
    return float(values @ values / values.size - (values.sum() / values.size) ** 2)


def contrasts(small: np.ndarray) -> np.ndarray:
    """(N, 24, 24, 3) uint8 => (N,) standard deviation in the channel where it is largest."""
    return small.astype(np.float32).std((1, 2)).max(1)


@lru_cache(maxsize=1)
def load_clip(name: str) -> Callable[[np.ndarray, list[str]], np.ndarray]:
    """An open_clip model => the cosines (N,) of N pictures (N, 3, R, R) uint8 and their captions."""
    import open_clip
    import torch

    from sd_mini.text_encoder.loading import load_open_clip

    architecture, _, weights = name.partition("=")
    model, transform = load_open_clip(architecture, weights or None)
    tokenizer = open_clip.get_tokenizer(architecture)

    @torch.inference_mode()
    def score(batch: np.ndarray, captions: list[str]) -> np.ndarray:
        pixels = torch.stack([transform(one) for one in images.to_pil(batch)])
        image = model.encode_image(pixels, normalize=True)
        text = model.encode_text(tokenizer(captions), normalize=True)
        return (image * text).sum(1).float().numpy()

    return score
