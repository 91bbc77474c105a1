"""Where objects go: layouts constructed from uniforms, many scenes at once, each within the rules by construction.

Lengths are fractions of the picture's side, y down. Every function takes N scenes' rows of uniforms in [0, 1).
"""

import numpy as np

from sd_mini.shapes.graph import GAP, MARGIN, MAX_SLANT, PLACES, SIZES

JITTER = 0.05  # how far a centre, or the middle of a pair, lies from its usual spot; the caption does not say
SPREAD = 0.15  # how much farther apart than they have to be two objects may lie

_SIZE_RANGES = np.array(list(SIZES.values()))  # (2, 2)
_PLACE_RANGES = np.array(list(PLACES.values()))  # (5, 2 axes, 2 ends)


def radii(size: np.ndarray, u: np.ndarray) -> np.ndarray:
    """(N,) indices of SIZES, (N,) uniforms => (N,) radii in fractions of the side."""
    low, high = _SIZE_RANGES[size].T
    return low + u * (high - low)


def one_object_layouts(place: np.ndarray, radius: np.ndarray, u: np.ndarray) -> np.ndarray:
    """(N,) indices of PLACES, (N,) radii => (N, 3) [x, y, radius]: the centre within JITTER of the place's middle."""
    inner = (MARGIN + radius)[:, None]
    low = np.maximum(_PLACE_RANGES[place, :, 0], inner)
    high = np.minimum(_PLACE_RANGES[place, :, 1], 1 - inner)
    return np.concatenate([_near((low + high) / 2, (high - low) / 2, u[:, :2]), radius[:, None]], axis=1)


def two_object_layouts(relation: np.ndarray, radius_a: np.ndarray, radius_b: np.ndarray, u: np.ndarray) -> np.ndarray:
    """(N,) indices of RELATIONS, (N,) radii of both => (N, 2 objects, 3 [x, y, radius]).

    Along the relation's axis the distance is the least plus up to SPREAD, the pair's middle within JITTER of the
    picture's where there is room; across it the two differ by at most MAX_SLANT of the distance. GenEval's scores are
    then at least 0.75 along and at most 0.35 across (its threshold is 0.5), so exactly the stated relation holds.
    """
    horizontal, a_is_second = relation < 2, relation % 2 == 1  # RELATIONS: left, right, above, below
    first, second = np.where(a_is_second, radius_b, radius_a), np.where(a_is_second, radius_a, radius_b)
    nearest = radius_a + radius_b + GAP
    distance = nearest + u[:, 0] * np.minimum(1 - 2 * MARGIN - radius_a - radius_b - nearest, SPREAD)
    start = 0.5 - distance / 2 + (2 * u[:, 1] - 1) * JITTER
    start = np.clip(start, MARGIN + first, 1 - MARGIN - second - distance)
    along_a, along_b = (np.where(a_is_second, start + distance, start), np.where(a_is_second, start, start + distance))
    across_a = 0.5 + (2 * u[:, 2] - 1) * JITTER
    across_b = across_a + (2 * u[:, 3] - 1) * np.minimum(JITTER, MAX_SLANT * distance)
    along, across = np.stack([along_a, along_b], axis=1), np.stack([across_a, across_b], axis=1)  # (N, 2)
    x, y = np.where(horizontal[:, None], along, across), np.where(horizontal[:, None], across, along)
    return np.stack([x, y, np.stack([radius_a, radius_b], axis=1)], axis=2)


def count_layouts(radius: np.ndarray, u: np.ndarray) -> np.ndarray:
    """(N,) radii => (N, 4, 3) [x, y, radius]: one object near the middle of each of four shuffled quarters."""
    quarter = np.argsort(u[:, :4], axis=1)  # (N, 4)
    half = (0.25 - GAP / 4 - MARGIN / 2 - radius)[:, None]  # from the middle of the free part to its end
    low = (MARGIN + radius)[:, None]
    x = (quarter % 2) * (0.5 + GAP / 2 - MARGIN) + _near(low + half, half, u[:, 4:8])
    y = (quarter // 2) * (0.5 + GAP / 2 - MARGIN) + _near(low + half, half, u[:, 8:12])
    return np.stack([x, y, np.broadcast_to(radius[:, None], x.shape)], axis=2)


def _near(middle: np.ndarray, room: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Uniform in middle +- JITTER, or +- room where that is less."""
    return middle + (2 * u - 1) * np.minimum(JITTER, room)
