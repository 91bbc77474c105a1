"""Near-duplicates of pictures: hashes that survive another size, quality or brightness, and their comparison.

Difference hash: which of two neighbouring cells of a 9 x 8 thumbnail is brighter, 64 bits (N. Krawetz, "Kind of Like
That", 2013). Of each picture that of its mirror image is kept too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

_MARGIN = 2  # grey levels, 0 to 255: neighbours that differ by less, as in flat areas, count as equal
MOST_BITS = 4  # in which the hashes of near-duplicates may differ
_MOST_DIFFERENCE = 10.0  # root mean square, grey levels, of near-duplicates beside their difference in brightness


def picture_hashes(picture: Image.Image) -> np.ndarray:
    """A PIL image of mode RGB => (2,) uint64: the hash of the picture and that of its mirror image."""
    cells = np.asarray(picture.convert("L").resize((9, 8), Image.Resampling.BOX)).astype(np.int16)
    both = np.stack([cells, cells[:, ::-1]])
    return np.packbits(np.diff(both, axis=2) >= _MARGIN).view(">u8").astype(np.uint64)


def uniform_of(hashes: np.ndarray) -> np.ndarray:
    """(N, 2) uint64 => (N,) in [0, 1): a number by content alone, the same for a picture and its mirror image."""
    digests = (hashlib.sha256(int(one).to_bytes(8, "big")).digest() for one in hashes.min(1))
    return np.array([int.from_bytes(digest[:8], "big") / 2**64 for digest in digests])


def near_pairs(hashes: np.ndarray, others: np.ndarray) -> Iterator[tuple[int, int, bool]]:
    """(M, 2) and (N, 2) uint64 => the pairs (m, n) of near hashes, and whether n is mirrored."""
    for m, own in enumerate(hashes[:, 0]):  # the first: of the picture itself
        bits = np.bitwise_count(others ^ own)
        for n in np.flatnonzero(bits.min(1) <= MOST_BITS).tolist():
            yield m, n, bool(bits[n, 1] < bits[n, 0])


def is_near(picture: np.ndarray, other: np.ndarray, is_mirrored: bool) -> bool:
    """Whether two (3, H, W) uint8 pictures of near hashes are one picture, up to brightness, quality and mirroring. Of
    different sizes, the second is scaled to the first's."""
    if other.shape != picture.shape:
        scaled = Image.fromarray(np.ascontiguousarray(other.transpose(1, 2, 0))).resize(picture.shape[:0:-1])
        other = np.asarray(scaled).transpose(2, 0, 1)
    if is_mirrored:
        other = other[..., ::-1]
    difference = picture.astype(np.float32) - other
    return float(difference.std()) <= _MOST_DIFFERENCE
