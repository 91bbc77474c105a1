"""Where objects go: layouts constructed from uniforms, many scenes at once, each within the rules by construction.

Lengths are fractions of the picture's side, y down. Every function takes N scenes' rows of uniforms in [0, 1).
"""

import numpy as np

from sd_mini.shapes_graph import GAP, MARGIN, MAX_SLANT, PLACES, SIZES

_SIZE_RANGES = np.array(list(SIZES.values()))  # (2, 2)
_PLACE_RANGES = np.array(list(PLACES.values()))  # (5, 2 axes, 2 ends)


def radii(size: np.ndarray, u: np.ndarray) -> np.ndarray:
    """(N,) indices of SIZES, (N,) uniforms => (N,) radii in fractions of the side."""
    low, high = _SIZE_RANGES[size].T
    return low + u * (high - low)


def one_object_layouts(place: np.ndarray, radius: np.ndarray, u: np.ndarray) -> np.ndarray:
    """(N,) indices of PLACES, (N,) radii => (N, 3) [x, y, radius]: the centre uniform in the place."""
    inner = (MARGIN + radius)[:, None]
    low = np.maximum(_PLACE_RANGES[place, :, 0], inner)
    high = np.minimum(_PLACE_RANGES[place, :, 1], 1 - inner)
    return np.concatenate([low + u[:, :2] * (high - low), radius[:, None]], axis=1)


def two_object_layouts(relation: np.ndarray, radius_a: np.ndarray, radius_b: np.ndarray, u: np.ndarray) -> np.ndarray:
    """(N,) indices of RELATIONS, (N,) radii of both => (N, 2 objects, 3 [x, y, radius]).

    Along the relation's axis the distance is uniform from the least gap to the whole picture; across it the two
    differ by at most MAX_SLANT of that. GenEval's scores are then at least 0.75 along and at most 0.35 across
    (its threshold is 0.5), so exactly the stated relation holds.
    """
    horizontal, a_is_second = relation < 2, relation % 2 == 1  # RELATIONS: left, right, above, below
    first = np.where(a_is_second, radius_b, radius_a)
    nearest = radius_a + radius_b + GAP
    room = 1 - 2 * MARGIN - radius_a - radius_b - nearest
    distance = nearest + u[:, 0] * room
    start = MARGIN + first + u[:, 1] * (1 - u[:, 0]) * room
    along_a, along_b = (np.where(a_is_second, start + distance, start), np.where(a_is_second, start, start + distance))
    across_a = MARGIN + radius_a + u[:, 2] * (1 - 2 * MARGIN - 2 * radius_a)
    # never empty: the two radii differ by less than MAX_SLANT times the least distance
    low = np.maximum(MARGIN + radius_b, across_a - MAX_SLANT * distance)
    high = np.minimum(1 - MARGIN - radius_b, across_a + MAX_SLANT * distance)
    across_b = low + u[:, 3] * (high - low)
    along, across = np.stack([along_a, along_b], axis=1), np.stack([across_a, across_b], axis=1)  # (N, 2)
    x, y = np.where(horizontal[:, None], along, across), np.where(horizontal[:, None], across, along)
    return np.stack([x, y, np.stack([radius_a, radius_b], axis=1)], axis=2)


def count_layouts(radius: np.ndarray, u: np.ndarray) -> np.ndarray:
    """(N,) radii => (N, 4, 3) [x, y, radius]: a shuffle of the picture's quarters, one object in each."""
    quarter = np.argsort(u[:, :4], axis=1)  # (N, 4)
    inside = (0.5 - GAP / 2 - MARGIN - 2 * radius)[:, None]
    x = (quarter % 2) * (0.5 + GAP / 2 - MARGIN) + (MARGIN + radius)[:, None] + u[:, 4:8] * inside
    y = (quarter // 2) * (0.5 + GAP / 2 - MARGIN) + (MARGIN + radius)[:, None] + u[:, 8:12] * inside
    return np.stack([x, y, np.broadcast_to(radius[:, None], x.shape)], axis=2)
