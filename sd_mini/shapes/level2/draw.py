"""Drawing of level 2: backgrounds, then objects with their patterns, many at once; what lies on top is drawn last."""

from collections.abc import Sequence

import numpy as np

from sd_mini.errors import UserError
from sd_mini.shapes.draw import MIN_RESOLUTION, Patches
from sd_mini.shapes.graph import COLOURS
from sd_mini.shapes.level2.graph import SIZES, TONES, Background, Scene
from sd_mini.shapes.level2.outlines import PALE, coverage, darkness
from sd_mini.shapes.uniforms import uniforms

WHITE = np.array(TONES["white"], dtype=np.float32)
GRAIN_CELLS = 16  # a side: a noisy background's grain is 4 px wide in a picture of 64
GRAIN_DEVIATION = 5.0  # of 255, the same in all channels, between its cells' centres less

_CHUNK_PIXELS = 128 * 64 * 64  # pictures drawn at a time: bounds the memory
_GRAIN_STREAM = 32
_PALETTE = np.array(list(COLOURS.values()), dtype=np.float32)  # (8, 3)
_PALE_PALETTE = WHITE + np.float32(PALE) * (_PALETTE - WHITE)
_COLOUR_INDEX = {name: i for i, name in enumerate(COLOURS)}


def draw_batch(scenes: Sequence[Scene], resolution: int = 64) -> np.ndarray:
    """N scenes => (N, 3, resolution, resolution) uint8 sRGB. Raises UserError below 24 px."""
    if resolution < MIN_RESOLUTION:
        raise UserError(f"resolution: got {resolution} px, expected at least {MIN_RESOLUTION} px: draw larger")
    pictures = np.empty((len(scenes), 3, resolution, resolution), dtype=np.uint8)
    chunk = max(1, _CHUNK_PIXELS // resolution**2)
    for start in range(0, len(scenes), chunk):
        part = scenes[start : start + chunk]
        canvas = backgrounds([scene.background for scene in part], resolution)
        _paint(canvas, part)
        pictures[start : start + chunk] = (canvas + 0.5).astype(np.uint8)
    return pictures


def backgrounds(several: Sequence[Background], resolution: int) -> np.ndarray:
    """N backgrounds => (N, 3, resolution, resolution) float32 in [0, 255]."""
    first = np.array([TONES[one.tone] for one in several], dtype=np.float32)
    second = np.array([TONES[one.second] for one in several], dtype=np.float32)
    canvas = np.broadcast_to(first[:, :, None, None], (len(several), 3, resolution, resolution)).copy()
    centred = (np.arange(resolution) + 0.5) / resolution - 0.5
    for i, one in enumerate(several):
        if one.kind == "gradient":
            cos, sin = np.cos(one.angle), np.sin(one.angle)
            # 0 and 1 at the corners that lie farthest along the angle
            along = (cos * centred[None, :] + sin * centred[:, None]) / (abs(cos) + abs(sin)) + 0.5
            canvas[i] += along.astype(np.float32) * (second[i] - first[i])[:, None, None]
    noisy = [i for i, one in enumerate(several) if one.kind == "noisy"]
    if noisy:
        canvas[noisy] += _grain([several[i].grain for i in noisy], resolution)[:, None]
    return np.clip(canvas, 0, 255)


def _grain(seeds: Sequence[int], resolution: int) -> np.ndarray:
    """(N, resolution, resolution): independent normal values at GRAIN_CELLS a side, linear between them."""
    count = GRAIN_CELLS**2
    u = uniforms(0, _GRAIN_STREAM, np.array(seeds, dtype=np.uint64), 2 * count)
    # Box and Muller 1958
    values = np.sqrt(-2 * np.log(1 - u[:, :count])) * np.cos(2 * np.pi * u[:, count:])
    cells = (GRAIN_DEVIATION * values).reshape(-1, GRAIN_CELLS, GRAIN_CELLS)
    position = np.clip((np.arange(resolution) + 0.5) / resolution * GRAIN_CELLS - 0.5, 0, GRAIN_CELLS - 1)
    weights = np.clip(1 - np.abs(position[:, None] - np.arange(GRAIN_CELLS)), 0, 1)  # (resolution, cells)
    return (weights @ cells @ weights.T).astype(np.float32)


def _paint(canvas: np.ndarray, scenes: Sequence[Scene]) -> None:
    """Draw each scene's objects into its picture, (N, 3, S, S) float32, in place."""
    resolution = canvas.shape[-1]
    alike: dict[tuple[bool, str, str, str], list[tuple]] = {}
    for i, scene in enumerate(scenes):
        for number, (group, where) in enumerate(zip(scene.members(), scene.layout, strict=True)):
            key = (number == scene.top, group.shape, group.size, group.pattern)
            alike.setdefault(key, []).append((i, _COLOUR_INDEX[group.colour], *where))
    # objects that lie on top come last; all others are disjoint, so the order among them is free
    for key in sorted(alike):
        _, shape, size, pattern = key
        rows = np.array(alike[key])
        indices, centre_radius = rows[:, :2].astype(int), rows[:, 2:] * resolution
        _paint_alike(canvas, indices, shape, pattern, centre_radius, SIZES[size][1])


def _paint_alike(canvas, indices, shape, pattern, centre_radius, largest) -> None:
    """Draw K objects of one outline and pattern.

    indices: (K, 2) of the picture and the colour; centre_radius: (K, 3) px; largest: radius in fractions of the side.
    """
    resolution = canvas.shape[-1]
    patches = Patches(centre_radius, largest, resolution)
    alpha = coverage(shape, patches.dx, patches.dy, patches.radius)  # (K, patch, patch)
    dark = darkness(pattern, patches.dx, patches.dy, patches.radius)
    touched = np.flatnonzero(alpha)
    k, where = patches.places(touched)
    picture, colour = indices[k].T
    weight, dark = alpha.ravel()[touched], dark.ravel()[touched]
    flat = canvas.reshape(len(canvas), 3, resolution * resolution)
    for channel in range(3):
        pale, full = _PALE_PALETTE[colour, channel], _PALETTE[colour, channel]
        below = flat[picture, channel, where]
        flat[picture, channel, where] = below + weight * (pale + dark * (full - pale) - below)
