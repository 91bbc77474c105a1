"""What is in a picture of level 2, by classical image analysis; nothing here knows what was asked for."""

import numpy as np
from scipy import ndimage

from eval.judge.level2.fit import fit
from eval.judge.level2.regions import Region, segment
from eval.judge.objects import FRINGE, MAX_OBJECTS, READING_SIDE, FoundObject, reading_pixels
from sd_mini.shapes.graph import COLOURS
from sd_mini.shapes.level2.outlines import extent

# Soft IoU below which an object has no shape, by its size: pixels are coarser on small ones. What softens a pattern
# lowers it, and so does a neighbour that it touches.
MIN_IOU = {"small": 0.80, "medium": 0.82, "large": 0.86}
MIN_IOU_PATTERNED = 0.76
MIN_IOU_TOUCHING = 0.70
# radii in fractions of the side between which a size is told, with dead zones between
SIZE_LIMITS = {"small": (0.078, 0.113), "medium": (0.117, 0.157), "large": (0.163, 0.22)}

_NAMES = tuple(COLOURS)
_RGB = np.array(list(COLOURS.values()), dtype=np.float64)
_BLOCK = ndimage.generate_binary_structure(2, 2)


def find_objects(picture: np.ndarray) -> list[FoundObject] | None:
    """(3, S, S) uint8 sRGB => its objects in no particular order, or None where the picture cannot be read: where it
    has too little background, or more objects than a scene could hold."""
    pixels = reading_pixels(picture)
    segmented = segment(pixels)
    if segmented is None:
        return None
    background, found = segmented
    if len(found) > MAX_OBJECTS:
        return None
    claimed = np.any([region.mask for region in found], axis=0) if found else np.zeros(pixels.shape[:2], dtype=bool)
    return [_read_object(pixels, background, region, claimed) for region in found]


def _read_object(pixels: np.ndarray, background: np.ndarray, region: Region, claimed: np.ndarray) -> FoundObject:
    """One region => its attributes. `claimed`: every object's pixels, so that no neighbour is counted in."""
    box = _box(region)
    own, hidden = region.mask[box], region.hidden[box]
    if region.colour is None:
        opacity = own.astype(np.float64)  # of no one colour, so no edge to unmix
    else:
        support = ndimage.binary_dilation(own, _BLOCK, iterations=FRINGE) & (own | ~claimed[box])
        opacity = _opacity(pixels[box], background[box], _RGB[region.colour]) * support
    # where two objects touch, a pixel is a mixture of both
    visible = ~(ndimage.binary_dilation(hidden, _BLOCK) if hidden.any() else hidden)
    if (opacity * visible).sum() < 1:  # nothing of it can be seen on its own: its pixels are all that is known
        opacity, visible = own.astype(np.float64), np.ones_like(own)
    height, width = opacity.shape
    x_px, y_px = np.arange(width) + box[1].start + 0.5, np.arange(height) + box[0].start + 0.5
    best = fit(opacity.astype(np.float32), visible, x_px.astype(np.float32), y_px.astype(np.float32))
    size = _size(best.radius / READING_SIDE)
    has_shape = best.iou >= _least_iou(size, best.pattern, bool(hidden.any()))
    radius = best.radius / READING_SIDE
    return FoundObject(
        shape=best.shape if has_shape else None,
        colour=None if region.colour is None else _NAMES[region.colour],
        size=size,
        x=best.x / READING_SIDE,
        y=best.y / READING_SIDE,
        width=2 * extent(best.shape, "left of") * radius,
        height=(extent(best.shape, "above") + extent(best.shape, "below")) * radius,
        shape_is_clear=best.is_clear or not has_shape,
        pattern=best.pattern if has_shape else None,
    )


def _box(region: Region) -> tuple[slice, slice]:
    """The rows and columns around a region, with room for its edge and for what may be hidden of it."""
    rows, columns = np.flatnonzero(region.mask.any(axis=1)), np.flatnonzero(region.mask.any(axis=0))
    pad = FRINGE + 1 + (READING_SIDE // 8 if region.hidden.any() else 0)
    return (
        slice(max(rows[0] - pad, 0), rows[-1] + pad + 1),
        slice(max(columns[0] - pad, 0), columns[-1] + pad + 1),
    )


def _opacity(patch: np.ndarray, background: np.ndarray, rgb: np.ndarray) -> np.ndarray:
    """(h, w, 3) sRGB of both => (h, w) in [0, 1]: how much of `rgb` lies over the background."""
    line = rgb - background
    return np.clip(((patch - background) * line).sum(-1) / (line**2).sum(-1), 0, 1)


def _least_iou(size: str | None, pattern: str, touches: bool) -> float:
    least = MIN_IOU[size or "small"]
    least = min(least, MIN_IOU_PATTERNED) if pattern != "plain" else least
    return min(least, MIN_IOU_TOUCHING) if touches else least


def _size(radius: float) -> str | None:
    """Radius in fractions of the side => its size, None between two and outside all."""
    return next((name for name, (low, high) in SIZE_LIMITS.items() if low <= radius <= high), None)
