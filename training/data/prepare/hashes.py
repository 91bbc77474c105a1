"""What crosses shards: 60 bytes a picture and 8 a caption, 64 more for a long one."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np
import xxhash

SIDE = 24  # px, at which pictures are compared: 3 cells of the hash's 8 in frequency, 6 x 8 px a thumbnail's cell
THUMBNAIL = (3, 4)  # cells down and across, of three colours
_CELLS = 8
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601
_PERMUTATIONS, BANDS = 128, 16  # of MinHash: 16 bands of 8; Jaccard 0.9 shares one with probability 0.9999
_WORD = re.compile(r"[^\W_]+")


def content_hash(width: int, height: int, pixels: bytes) -> int:
    """64 bits of a picture's decoded pixels and size."""
    return xxhash.xxh3_64_intdigest(pixels, seed=width << 32 | height)


def bytes_hash(data: bytes) -> int:
    """64 bits of an encoded picture."""
    return xxhash.xxh3_64_intdigest(data)


# perceptual hash (Zauner 2010; imagehash.phash with highfreq_factor 3): the signs of the 8 x 8 lowest DCT-II
# coefficients against their median
def perceptual_hashes(small: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, 24, 24, 3) uint8 => (N,) uint64 hashes, and those of the mirrored pictures."""
    from scipy.fft import dct

    grey = small.astype(np.float32) @ _LUMA
    low = dct(dct(grey, axis=1), axis=2)[:, :_CELLS, :_CELLS]
    # mirrored, a picture's odd horizontal coefficients change their sign
    mirrored = low * np.array([1, -1] * (_CELLS // 2), np.float32)
    return _above_median(low), _above_median(mirrored)


def _above_median(low: np.ndarray) -> np.ndarray:
    bits = (low > np.median(low, axis=(1, 2), keepdims=True)).reshape(len(low), 64)
    return np.packbits(bits, axis=1).view(">u8").astype(np.uint64)[:, 0]


def thumbnails(small: np.ndarray) -> np.ndarray:
    """(N, 24, 24, 3) uint8 => (N, 36) uint8: means over 3 x 4 cells."""
    down, across = THUMBNAIL
    cells = small.reshape(len(small), down, SIDE // down, across, SIDE // across, 3)
    return cells.mean((2, 4), dtype=np.float32).round().astype(np.uint8).reshape(len(small), -1)


def correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Two (N, 36) uint8 => (N,) correlation, the larger of that with `b` and with `b` mirrored.

    It does not change with brightness and contrast, and tells colours apart where the hash, which is grey, does not.
    """
    mirrored = b.reshape(-1, *THUMBNAIL, 3)[:, :, ::-1].reshape(b.shape)
    x = _standard(a)
    return np.maximum((x * _standard(b)).sum(1), (x * _standard(mirrored)).sum(1))


def _standard(thumbnails: np.ndarray) -> np.ndarray:
    x = thumbnails.astype(np.float32)
    x -= x.mean(1, keepdims=True)
    return x / np.sqrt((x * x).sum(1, keepdims=True) + 1e-6)


def words(caption: str) -> list[str]:
    """A caption's words as they are compared; of one without any, such as an emoji, the caption itself."""
    return _WORD.findall(unicodedata.normalize("NFKC", caption).casefold()) or [caption]


def caption_key(caption: str) -> int:
    """64 bits of a caption's words; 0 for none."""
    return bytes_hash(" ".join(words(caption)).encode()) or 1 if caption else 0


def jaccard(a: str, b: str) -> float:
    """Similarity of two captions, as multisets of their runs of one, two and three words, in [0, 1].

    Captions that differ in one word of 40 reach 0.9; so do longer ones whose phrases change places."""
    first, second = _shingles(a), _shingles(b)
    union = (first | second).total()
    return (first & second).total() / union if union else 1.0


def _shingles(caption: str) -> Counter[tuple[str, ...]]:
    own = words(caption)
    return Counter(tuple(own[start : start + size]) for size in (1, 2, 3) for start in range(len(own) - size + 1))


def caption_bands(captions: Sequence[str], min_words: int) -> list[list[int] | None]:
    """MinHash signatures, 16 numbers of 32 bits: captions that are alike share one. None for shorter captions."""
    from datasketch import MinHash

    bands: list[list[int] | None] = []
    for caption in captions:
        if len(words(caption)) < min_words:
            bands.append(None)
            continue
        sketch = MinHash(_PERMUTATIONS, seed=1)
        sketch.update_batch([f"{' '.join(shingle)} {n}".encode() for shingle, n in _numbered(caption)])
        rows = np.asarray(sketch.hashvalues, np.uint64).reshape(BANDS, -1)
        bands.append([xxhash.xxh32_intdigest(row.tobytes()) for row in rows])
    return bands


def _numbered(caption: str) -> list[tuple[tuple[str, ...], int]]:
    """A multiset as a set: its n-th member of a kind is (kind, n)."""
    return [(shingle, n) for shingle, count in _shingles(caption).items() for n in range(count)]
