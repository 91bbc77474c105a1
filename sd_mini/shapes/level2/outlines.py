"""The six outlines and three patterns of level 2, as functions of an object's radius r, upright, y down.

Level 1's four outlines, and
    diamond  |x| + |y| <= 0.97 r
    bar      0.9 r to each side, 0.42 r up and down
Patterns are laid on from the object's centre; their light part is the colour mixed into white, PALE of it:
    striped  vertical bands: dark within 0.18 r of the centre, light to 0.5 r, dark beyond
    dotted   light dots of radius 0.2 r at the centre and 0.48 r to its left, right, above and below
"""

from functools import lru_cache

import numpy as np

from sd_mini.shapes.draw import CIRCLE_RADIUS, CROSS_HALF_LENGTH, SQUARE_HALF_SIDE
from sd_mini.shapes.draw import coverage as level1_coverage
from sd_mini.shapes.graph import SHAPES as LEVEL1_SHAPES

SHAPES = (*LEVEL1_SHAPES, "diamond", "bar")
DIAMOND_HALF_DIAGONAL = 0.97
BAR_HALF_LENGTH, BAR_HALF_WIDTH = 0.9, 0.42
STRIPE_EDGES = (0.18, 0.5)
DOT_RADIUS, DOT_DISTANCE = 0.2, 0.48
PALE = 0.45  # of the colour in a pattern's light part, the rest white
MOST_HIDDEN = 0.2  # share of an object's area that another may cover

_FINE = 400  # samples a side for areas that have no closed form worth writing


def coverage(shape: str, dx: np.ndarray, dy: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """How much of each pixel an outline covers, as level 1's: offsets and radius in pixels => [0, 1]."""
    if shape == "diamond":
        return np.clip(0.5 + (DIAMOND_HALF_DIAGONAL * radius - np.abs(dx) - np.abs(dy)) / np.float32(np.sqrt(2)), 0, 1)
    if shape == "bar":
        across = np.clip(BAR_HALF_LENGTH * radius + 0.5 - np.abs(dx), 0, 1)
        return across * np.clip(BAR_HALF_WIDTH * radius + 0.5 - np.abs(dy), 0, 1)
    return level1_coverage(shape, dx, dy, radius)


def darkness(pattern: str, dx: np.ndarray, dy: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """The share of the full colour in each pixel of a pattern, against its light part: [0, 1], shaped as dx with dy."""
    if pattern == "striped":
        low, high = (edge * radius for edge in STRIPE_EDGES)
        light = np.clip(np.minimum(np.abs(dx) - low, high - np.abs(dx)) + 0.5, 0, 1)
        return 1 - np.broadcast_to(light, np.broadcast_shapes(dx.shape, dy.shape))
    if pattern == "dotted":
        # the dots lie alike on both axes, so one of each two stands for both
        aside_x, aside_y = np.abs(dx), np.abs(dy)
        beside = np.minimum(
            (aside_x - DOT_DISTANCE * radius) ** 2 + dy**2, dx**2 + (aside_y - DOT_DISTANCE * radius) ** 2
        )
        nearest = np.sqrt(np.minimum(dx**2 + dy**2, beside))
        return 1 - np.clip(DOT_RADIUS * radius + 0.5 - nearest, 0, 1)
    return np.ones(np.broadcast_shapes(dx.shape, dy.shape), dtype=np.float32)


@lru_cache
def opacity_moments(shape: str, pattern: str) -> tuple[float, float]:
    """Of an object of radius 1 whose light parts weigh PALE: its total weight, and its centre of weight's y."""
    offsets = (np.arange(_FINE) + 0.5) / _FINE * 2.2 - 1.1
    # coverage ramps over a pixel, so the unit is a pixel here and the radius many
    dx, dy = offsets[None, :] * _FINE / 2.2, offsets[:, None] * _FINE / 2.2
    radius = np.full((1, 1), _FINE / 2.2)
    weight = coverage(shape, dx, dy, radius) * (PALE + (1 - PALE) * darkness(pattern, dx, dy, radius))
    total = weight.sum()
    return float(total / radius.item() ** 2), float((weight * dy).sum() / total / radius.item())


_EXTENTS = {  # of radius 1: to the left and right, upwards, downwards
    "circle": (CIRCLE_RADIUS,) * 3,
    "square": (SQUARE_HALF_SIDE,) * 3,
    "triangle": (float(np.sqrt(0.75)), 1.0, 0.5),
    "cross": (CROSS_HALF_LENGTH,) * 3,
    "diamond": (DIAMOND_HALF_DIAGONAL,) * 3,
    "bar": (BAR_HALF_LENGTH, BAR_HALF_WIDTH, BAR_HALF_WIDTH),
}


def extent(shape: str, side: str) -> float:
    """How far an outline of radius 1 reaches from its centre to a side: "left of", "right of", "above" or "below"."""
    across, up, down = _EXTENTS[shape]
    return {"left of": across, "right of": across, "above": up, "below": down}[side]


@lru_cache
def safe_depth(shape: str, side: str) -> float:
    """How deep a straight cut from a side may go into an outline of radius 1 and take MOST_HIDDEN of its area."""
    offsets = (np.arange(_FINE) + 0.5) / _FINE * 2.2 - 1.1
    scale = _FINE / 2.2
    covered = coverage(shape, offsets[None, :] * scale, offsets[:, None] * scale, np.full((1, 1), scale))
    profile = covered.sum(axis=0 if side in ("left of", "right of") else 1)
    if side in ("right of", "below"):
        profile = profile[::-1]
    reached = np.cumsum(profile) / profile.sum()
    depth_from_edge = (np.searchsorted(reached, MOST_HIDDEN, side="right")) / scale
    return float(depth_from_edge - (1.1 - extent(shape, side)))
