"""A second renderer of the shapes world, sharing no code with the first: outlines as documented, by point sampling.

A pixel's coverage is the share of its 8 x 8 sample points inside the outline. Slow, and only for tests.
"""

import math

import numpy as np

SAMPLES = 8  # per pixel and axis
INK = {
    "red": (215, 30, 35),
    "orange": (250, 140, 0),
    "yellow": (250, 220, 0),
    "green": (20, 150, 50),
    "blue": (30, 70, 215),
    "pink": (255, 105, 190),
    "brown": (115, 65, 25),
    "black": (15, 15, 15),
}
PAPER = (245, 245, 245)


def inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points, in radii from the object's centre with y down, lie in the outline."""
    if shape == "circle":
        return x**2 + y**2 <= 0.81
    if shape == "square":
        return (abs(x) <= 0.7) & (abs(y) <= 0.7)
    if shape == "cross":
        return ((abs(x) <= 0.95) & (abs(y) <= 0.3)) | ((abs(x) <= 0.3) & (abs(y) <= 0.95))
    # every edge, walked with the triangle on the right (y down), has the point on that side
    corners = [(0, -1), (math.sqrt(3) / 2, 0.5), (-math.sqrt(3) / 2, 0.5)]
    within = np.ones(np.broadcast(x, y).shape, dtype=bool)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        within &= (x1 - x0) * (y - y0) - (y1 - y0) * (x - x0) >= 0
    return within


def render(scene, resolution: int = 64) -> np.ndarray:
    """A scene => (3, resolution, resolution) uint8."""
    picture = np.empty((resolution, resolution, 3))
    picture[:] = PAPER
    for shape, colour, _, x, y, radius in scene.objects():
        left, top = (max(int((centre - radius) * resolution) - 1, 0) for centre in (x, y))
        right, bottom = (min(int((centre + radius) * resolution) + 2, resolution) for centre in (x, y))
        across = (left + (np.arange((right - left) * SAMPLES) + 0.5) / SAMPLES) / resolution
        down = (top + (np.arange((bottom - top) * SAMPLES) + 0.5) / SAMPLES) / resolution
        samples = inside(shape, (across[None, :] - x) / radius, (down[:, None] - y) / radius)
        covered = samples.reshape(bottom - top, SAMPLES, right - left, SAMPLES).mean(axis=(1, 3))[..., None]
        picture[top:bottom, left:right] += covered * (np.array(INK[colour]) - picture[top:bottom, left:right])
    return np.rint(picture).astype(np.uint8).transpose(2, 0, 1)
