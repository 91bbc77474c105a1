"""Aspect-ratio buckets: the few picture sizes of about one area that a training uses, and each picture's own.

NovelAI, "Improvements on Stable Diffusion" (2022), Aspect Ratio Bucketing: of sides that are multiples of a step, those
whose area is at most that of the square; a picture takes the one that is nearest in the logarithm of width / height.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sd_mini.errors import UserError

if TYPE_CHECKING:
    from sd_mini.data.captioned import DataConfig


class Size(NamedTuple):
    """Of a picture, in px."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.width} x {self.height} px"


def bucket_sizes(config: DataConfig) -> list[Size]:
    """The sizes that `config` asks for, upright ones first; the square alone where `max_aspect` is 1.

    Raises UserError for a resolution that is no multiple of `bucket_step`, and where the square is the only one.
    """
    side, step = config.resolution, config.bucket_step
    if config.max_aspect == 1:
        return [Size(side, side)]
    if side % step:
        raise UserError(
            f"data.bucket_step {step} does not divide data.resolution {side}; give a multiple of the step as resolution"
        )
    wide = []
    for width in range(side + step, side * side // step + 1, step):
        height = side * side // width // step * step
        if width > config.max_aspect * height:
            break
        wide.append(Size(height, width))
    if not wide:
        raise UserError(
            f"data.max_aspect {config.max_aspect:g}: no bucket but the square has sides that are multiples of "
            f"data.bucket_step {step}; give a smaller step, or a larger max_aspect"
        )
    return [*(Size(width, height) for height, width in reversed(wide)), Size(side, side), *wide]


def nearest_bucket(sizes: np.ndarray, buckets: list[Size]) -> np.ndarray:
    """(N, 2) pictures' own sizes in px, width first => (N,) the number of each one's bucket; sizes of 0, which
    are not known, have the square."""
    if len(buckets) == 1:
        return np.zeros(len(sizes), np.int64)
    own = np.log(np.maximum(sizes, 1).astype(np.float64)) @ [1, -1]
    theirs = np.log([width / height for height, width in buckets])
    return np.abs(own[:, None] - theirs).argmin(1)


def longest_aspect(buckets: list[Size]) -> float:
    """The ratio of the long side to the short one, of the longest bucket."""
    return buckets[-1].width / buckets[-1].height


def drawn_place(id: str) -> float:
    """A row's id => U[0, 1): where the random crop of its picture lies, the same in every run."""
    return int.from_bytes(hashlib.sha256(id.encode()).digest()[:8], "big") / 2**64
