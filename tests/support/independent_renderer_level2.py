"""A second renderer of level 2, sharing no code with the first: outlines and patterns by point sampling.

Backgrounds are plain or gradients; grain is not rendered. Slow, and only for tests.
"""

import math

import numpy as np

from tests.support import independent_renderer as level1

SAMPLES = level1.SAMPLES
PAPERS = {
    "white": (245, 245, 245), "grey": (228, 228, 228), "blue": (222, 232, 246),
    "green": (224, 240, 224), "rose": (246, 228, 230), "cream": (246, 238, 220),
}  # fmt: skip
WHITE = np.array([245.0, 245.0, 245.0])


def inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points, in radii from the object's centre with y down, lie in the outline."""
    if shape == "diamond":
        return abs(x) + abs(y) <= 0.97
    if shape == "bar":
        return (abs(x) <= 0.9) & (abs(y) <= 0.42)
    return level1.inside(shape, x, y)


def is_pale(pattern: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points lie in a pattern's light part."""
    if pattern == "striped":
        return (abs(x) > 0.18) & (abs(x) < 0.5) & np.isfinite(y)
    if pattern == "dotted":
        centres = [(0, 0), (0.48, 0), (-0.48, 0), (0, 0.48), (0, -0.48)]
        return np.any([(x - a) ** 2 + (y - b) ** 2 < 0.04 for a, b in centres], axis=0)
    return np.zeros(np.broadcast_shapes(x.shape, y.shape), dtype=bool)


def render(scene, resolution: int = 64) -> np.ndarray:
    """A scene => (3, resolution, resolution) uint8."""
    points = (np.arange(resolution * SAMPLES) + 0.5) / SAMPLES / resolution
    x, y = points[None, :], points[:, None]
    background = scene.background
    first, second = (np.array(PAPERS[tone], dtype=float) for tone in (background.tone, background.second))
    share = np.zeros((len(points), len(points)))
    if background.kind == "gradient":
        across, down = math.cos(background.angle), math.sin(background.angle)
        share = ((x - 0.5) * across + (y - 0.5) * down) / (abs(across) + abs(down)) + 0.5
    canvas = first + share[..., None] * (second - first)
    objects = list(zip(scene.members(), scene.layout, strict=True))
    if scene.top is not None:
        objects.append(objects.pop(scene.top))
    for group, (left, top, radius) in objects:
        u, v = (x - left) / radius, (y - top) / radius
        covered, pale = inside(group.shape, u, v), is_pale(group.pattern, u, v)
        ink = np.array(level1.INK[group.colour], dtype=float)
        canvas[covered & ~pale] = ink
        canvas[covered & pale] = WHITE + 0.45 * (ink - WHITE)
    pixels = canvas.reshape(resolution, SAMPLES, resolution, SAMPLES, 3).mean(axis=(1, 3))
    return np.rint(pixels).astype(np.uint8).transpose(2, 0, 1)
