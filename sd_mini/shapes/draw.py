"""Drawing: scene graphs => anti-aliased pictures, by exact area or signed distance, many objects at once.

Outlines for an object at (x, y) with radius r, all upright, y down; each one's centre of area is (x, y):
    circle    radius 0.9 r
    square    sides of 2 * 0.7 r, parallel to the picture's
    triangle  equilateral, vertices (x, y - r), (x - sqrt(3)/2 r, y + r/2), (x + sqrt(3)/2 r, y + r/2)
    cross     two bars, 2 * 0.95 r long and 2 * 0.3 r wide, one along each axis
A pixel (row, column) of a picture with side S covers the square [column, column + 1] x [row, row + 1] / S.
"""

from collections.abc import Sequence

import numpy as np

from sd_mini.errors import UserError
from sd_mini.shapes.graph import BACKGROUND, COLOURS, SHAPES, SIZES, Scene

CIRCLE_RADIUS = 0.9
SQUARE_HALF_SIDE = 0.7
CROSS_HALF_LENGTH = 0.95
CROSS_HALF_WIDTH = 0.3

MIN_RESOLUTION = 24  # px; below it the gap between objects falls under a pixel
_CHUNK_PIXELS = 256 * 64 * 64  # pictures drawn at a time: bounds the memory for patches to a few tens of MB

_SHAPE_INDEX = {name: i for i, name in enumerate(SHAPES)}
_COLOUR_INDEX = {name: i for i, name in enumerate(COLOURS)}
_SIZE_INDEX = {name: i for i, name in enumerate(SIZES)}
_PALETTE = np.array(list(COLOURS.values()), dtype=np.float32)  # (8, 3)
_BACKGROUND = np.array(BACKGROUND, dtype=np.float32)


def area(shape: str) -> float:
    """Area of an outline of radius 1."""
    return {
        "circle": np.pi * CIRCLE_RADIUS**2,
        "square": 4 * SQUARE_HALF_SIDE**2,
        "triangle": 3 * np.sqrt(3) / 4,
        "cross": 8 * CROSS_HALF_LENGTH * CROSS_HALF_WIDTH - 4 * CROSS_HALF_WIDTH**2,
    }[shape]


def coverage(shape: str, dx: np.ndarray, dy: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """How much of each pixel an outline covers.

    dx: (K, 1, W), dy: (K, H, 1), pixel centre minus object centre; radius: (K, 1, 1), all in pixels.
    Returns (K, H, W) in [0, 1]: exact areas for square and cross, a linear ramp over the signed distance to the
    nearest edge for circle and triangle.
    """
    if shape == "circle":
        return np.clip(CIRCLE_RADIUS * radius + 0.5 - np.sqrt(dx * dx + dy * dy), 0, 1)
    if shape == "square":
        half = SQUARE_HALF_SIDE * radius
        return _overlap(dx, half) * _overlap(dy, half)
    if shape == "cross":
        across_x, across_y = _overlap(dx, CROSS_HALF_WIDTH * radius), _overlap(dy, CROSS_HALF_WIDTH * radius)
        along_x, along_y = _overlap(dx, CROSS_HALF_LENGTH * radius), _overlap(dy, CROSS_HALF_LENGTH * radius)
        # |A or B| = |A| + |B| - |A and B|; the bars meet in a box, so each term is a product of overlaps
        return along_x * across_y + across_x * (along_y - across_y)
    # an equilateral triangle is three half-planes, each radius / 2 from the centre
    slanted = np.abs(dx) * np.float32(np.sqrt(0.75)) - dy * np.float32(0.5)
    return np.clip(0.5 + radius / 2 - np.maximum(slanted, dy), 0, 1)


def _overlap(offset: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Length shared by the pixel [offset - 0.5, offset + 0.5] and the bar [-half, half], for half >= 0.5."""
    return np.clip(half + 0.5 - np.abs(offset), 0, 1)


def draw_batch(scenes: Sequence[Scene], resolution: int = 64) -> np.ndarray:
    """N scenes => (N, 3, resolution, resolution) uint8 sRGB pictures on the world's background.

    Raises ValueError below 24 px. Memory beside the result does not grow with N.
    """
    if resolution < MIN_RESOLUTION:
        raise UserError(f"resolution: got {resolution} px, expected at least {MIN_RESOLUTION} px: draw larger")
    pictures = np.empty((len(scenes), 3, resolution, resolution), dtype=np.uint8)
    pictures[:] = np.array(BACKGROUND, dtype=np.uint8)[:, None, None]
    chunk = max(1, _CHUNK_PIXELS // resolution**2)
    for start in range(0, len(scenes), chunk):
        _paint(pictures[start : start + chunk], scenes[start : start + chunk])
    return pictures


def _paint(pictures: np.ndarray, scenes: Sequence[Scene]) -> None:
    """Draw each scene's objects into its picture, (N, 3, S, S) uint8, in place."""
    resolution = pictures.shape[-1]
    labels, places = [], []
    for i, scene in enumerate(scenes):
        for shape, colour, size, x, y, radius in scene.objects():
            labels.append((i, _SHAPE_INDEX[shape], _COLOUR_INDEX[colour], _SIZE_INDEX[size]))
            places.append((x, y, radius))
    if not labels:
        return
    picture, shape, colour, size = np.array(labels).T
    centre_radius = np.array(places) * resolution  # (M, 3) fractions of the side => pixels
    # objects of one shape and one size share a patch size, so they are one array operation
    for shape_index, name in enumerate(SHAPES):
        for size_index, (_, largest) in enumerate(SIZES.values()):
            chosen = np.flatnonzero((shape == shape_index) & (size == size_index))
            if chosen.size:
                _paint_alike(pictures, picture[chosen], name, colour[chosen], centre_radius[chosen], largest)


class Patches:
    """Squares of pixels that hold K objects of one size: offsets of their pixels from each object's centre.

    centre_radius: (K, 3) px; largest: radius in fractions of the side. dx (K, 1, patch), dy (K, patch, 1), radius
    (K, 1, 1), float32 px.
    """

    def __init__(self, centre_radius: np.ndarray, largest: float, resolution: int):
        x, y, radius = centre_radius.T
        self.resolution = resolution
        self.patch = patch = min(2 * int(np.ceil(largest * resolution)) + 3, resolution)
        self.left, self.top = (np.clip(np.floor(c).astype(int) - patch // 2, 0, resolution - patch) for c in (x, y))
        steps = np.arange(patch)
        # offsets are taken in float64 first, so that float32 holds them to a hundred-thousandth of a pixel
        self.dx = (self.left[:, None] + steps + 0.5 - x[:, None]).astype(np.float32)[:, None, :]
        self.dy = (self.top[:, None] + steps + 0.5 - y[:, None]).astype(np.float32)[:, :, None]
        self.radius = radius.astype(np.float32)[:, None, None]

    def places(self, touched: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Flat numbers of pixels of the patches (T,) => which object each is of, and its number in the picture."""
        k, within = np.divmod(touched, self.patch**2)
        row, column = np.divmod(within, self.patch)
        return k, (self.top[k] + row) * self.resolution + self.left[k] + column


def _paint_alike(pictures, picture, shape, colour, centre_radius, largest) -> None:
    """Draw K objects of one shape; picture, colour: (K,) indices; centre_radius: (K, 3) px; largest: of the side."""
    resolution = pictures.shape[-1]
    patches = Patches(centre_radius, largest, resolution)
    alpha = coverage(shape, patches.dx, patches.dy, patches.radius)  # (K, patch, patch)
    # objects are disjoint, so each touched pixel is one object's over the background and may simply be assigned
    touched = np.flatnonzero(alpha)
    k, where = patches.places(touched)
    weight = alpha.ravel()[touched]
    tint = (_PALETTE - _BACKGROUND)[colour[k]]  # (T, 3)
    flat = pictures.reshape(len(pictures), 3, resolution * resolution)
    for channel in range(3):
        flat[picture[k], channel, where] = (_BACKGROUND[channel] + weight * tint[:, channel] + 0.5).astype(np.uint8)
