"""What is in a picture of the shapes world, by classical image analysis: raw pixels => coloured, sized, placed shapes.

Segmentation by palette colour in CIELAB, erosion to drop edges and specks, connected components, then each
component's shape and size by re-rendering the four outlines at its centre and area and comparing by soft IoU.
Nothing here knows what was asked for. Every picture is read at 64 px, so lengths below are in those pixels.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

from sd_mini.errors import UserError
from sd_mini.shapes.draw import area, coverage
from sd_mini.shapes.graph import BACKGROUND, COLOURS, SHAPES, SIZES, lab

READING_SIDE = 64  # px
MIN_SIDE = 32  # px

# CIELAB distances. Palette colours lie 47 apart and mixtures of one with the background stay 37 from any third,
# so up to 26 a pixel is that colour with room for noise; edges are no colour at all.
COLOUR_REACH = 26.0
BACKGROUND_REACH = 15.0
FRINGE = 2  # px around an object that its anti-aliased and blurred edge may reach
MIN_CORE = 2  # px that must survive the erosion: a small cross keeps 5 or more, an edge none
MIN_MARK = 9  # px of one connected mark away from all objects that make it an object too: specks and thin lines
MIN_BACKGROUND = 0.45  # share of the picture; a world's picture is never less than 0.59 background
MAX_UNEXPLAINED = 0.10  # share of the picture that is neither background nor an object
MAX_OBJECTS = 12  # more is texture, not a scene

BLURS = (0.0, 0.7, 1.2)  # px, standard deviations: as drawn, and as a decoder may soften it
# Below it an object has no shape. Clean drawings reach 0.97; under a blur of 1 px and noise of 6 / 255 small ones
# still reach 0.85 and large ones 0.91. An object cut in half stays below either, and so does a large diamond.
MIN_IOU_SMALL, MIN_IOU_LARGE = 0.80, 0.88
MIN_IOU_MARGIN = 0.01  # best over second best; below it the shape cannot be told
# radii in fractions of the side between which a size is told: a dead zone between small and large, and ends
SIZE_LIMITS = {"small": (0.08, 0.135), "large": (0.15, 0.23)}

_PALETTE_NAMES = tuple(COLOURS)
_PALETTE_RGB = np.array(list(COLOURS.values()), dtype=np.float64)  # (8, 3)
_REFERENCES = lab(np.array([*COLOURS.values(), BACKGROUND]))  # (9, 3)
_BACKGROUND_LABEL = len(COLOURS)
_OTHER_LABEL = len(COLOURS) + 1  # neither a palette colour nor background: edges, and foreign colours
_CROSS = ndimage.generate_binary_structure(2, 1)
_BLOCK = ndimage.generate_binary_structure(2, 2)
_SIZE_NAMES = tuple(SIZES)


@dataclass(frozen=True, slots=True)
class FoundObject:
    """One object as seen. None is an attribute that is none of the world's; lengths are fractions of the side."""

    shape: str | None
    colour: str | None
    size: str | None
    x: float
    y: float
    width: float
    height: float
    shape_is_clear: bool  # False: two outlines explain it equally well
    pattern: str | None = "plain"  # level 1 has no other


def check_picture(picture: np.ndarray) -> None:
    """Raises ValueError unless `picture` is (3, S, S) uint8 with S of at least 32."""
    shape, dtype = getattr(picture, "shape", None), getattr(picture, "dtype", type(picture).__name__)
    square = shape is not None and len(shape) == 3 and shape[0] == 3 and shape[1] == shape[2]
    if not square or dtype != np.uint8:
        raise UserError(f"picture: got {shape} {dtype}, expected (3, S, S) uint8: convert with sd_mini.images")
    if shape[1] < MIN_SIDE:
        raise UserError(f"picture: got {shape[1]} px, expected at least {MIN_SIDE} px: draw it at a higher resolution")


def find_objects(picture: np.ndarray) -> list[FoundObject] | None:
    """(3, S, S) uint8 sRGB => its objects in no particular order, or None where the picture cannot be read.

    Unreadable is a picture with too little background, too much that is neither background nor an object, or
    more objects than a scene could hold.
    """
    pixels = reading_pixels(picture)  # (64, 64, 3)
    labels = _label_pixels(pixels)  # (64, 64)
    if np.mean(labels == _BACKGROUND_LABEL) < MIN_BACKGROUND:
        return None
    regions = [(c, region) for c in range(len(_PALETTE_NAMES)) for region in _regions(labels == c)]
    marked = labels != _BACKGROUND_LABEL
    # what the objects' edges do not explain may be objects of a foreign colour
    foreign = _regions(marked & ~_with_fringe([region for _, region in regions]))
    regions += [(_OTHER_LABEL, region) for region in foreign]
    masks = [region for _, region in regions]
    unexplained = marked & ~_with_fringe(masks)
    marks = _marks(unexplained)
    if len(regions) + len(marks) > MAX_OBJECTS or np.mean(unexplained) > MAX_UNEXPLAINED:
        return None
    regions += [(_OTHER_LABEL, mark) for mark in marks]
    masks += marks
    claimed = np.any(masks, axis=0)
    return [_read_object(pixels, label, region, claimed) for label, region in regions]


def _with_fringe(masks: list[np.ndarray]) -> np.ndarray:
    """(H, W) masks => the (H, W) union of them and their edges; without masks, nothing."""
    if not masks:
        return np.zeros((READING_SIDE, READING_SIDE), dtype=bool)
    return ndimage.binary_dilation(np.any(masks, axis=0), _BLOCK, iterations=FRINGE)


def reading_pixels(picture: np.ndarray) -> np.ndarray:
    """(3, S, S) uint8 => (64, 64, 3) float64 in [0, 255]: area average from above, bilinear from below."""
    image = np.ascontiguousarray(picture.transpose(1, 2, 0))
    side = image.shape[0]
    if side != READING_SIDE:
        method = Image.Resampling.BOX if side > READING_SIDE else Image.Resampling.BILINEAR
        image = np.asarray(Image.fromarray(image).resize((READING_SIDE, READING_SIDE), method))
    return image.astype(np.float64)


def _label_pixels(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) sRGB => (H, W) the nearest palette colour's index, the background's, or that of neither."""
    colours = lab(pixels)
    # |a - b|^2 = |a|^2 - 2 a.b + |b|^2: one product, where all differences would take ten times as long
    squares = (colours**2).sum(axis=-1, keepdims=True) - 2 * colours @ _REFERENCES.T + (_REFERENCES**2).sum(axis=-1)
    nearest = squares.argmin(axis=-1)  # (H, W, 9) => (H, W)
    reach = np.where(nearest == _BACKGROUND_LABEL, BACKGROUND_REACH, COLOUR_REACH)
    return np.where(squares.min(axis=-1) <= reach**2, nearest, _OTHER_LABEL)


def _regions(mask: np.ndarray) -> list[np.ndarray]:
    """(H, W) bool => the (H, W) masks of its connected components that are more than an edge or a speck."""
    if not mask.any():
        return []
    component, n = ndimage.label(mask, _BLOCK)
    core = component[ndimage.binary_erosion(mask, _CROSS, border_value=1)]
    core_sizes = np.bincount(core, minlength=n + 1)
    return [component == i for i in range(1, n + 1) if core_sizes[i] >= MIN_CORE]


def _marks(mask: np.ndarray) -> list[np.ndarray]:
    """(H, W) bool => the (H, W) masks of its connected components of MIN_MARK pixels or more, however thin."""
    component, n = ndimage.label(mask, _BLOCK)
    sizes = np.bincount(component.ravel(), minlength=n + 1)
    return [component == i for i in range(1, n + 1) if sizes[i] >= MIN_MARK]


def _read_object(pixels: np.ndarray, label: int, region: np.ndarray, claimed: np.ndarray) -> FoundObject:
    """One component => its attributes. `claimed`: every object's pixels, so that no neighbour is counted in."""
    rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    pad = FRINGE + 1
    box = (slice(max(rows[0] - pad, 0), rows[-1] + pad + 1), slice(max(columns[0] - pad, 0), columns[-1] + pad + 1))
    own, patch = region[box], pixels[box]
    known = label < len(_PALETTE_NAMES)
    if known:
        support = ndimage.binary_dilation(own, _BLOCK, iterations=FRINGE) & (own | ~claimed[box])
        alpha = _opacity(patch, _PALETTE_RGB[label]) * support  # (h, w) in [0, 1]
    else:
        alpha = own.astype(np.float64)  # of no one colour, so no edge to unmix
    x_px, y_px = np.arange(alpha.shape[1]) + box[1].start + 0.5, np.arange(alpha.shape[0]) + box[0].start + 0.5
    total = alpha.sum()
    x, y = alpha.sum(axis=0) @ x_px / total, alpha.sum(axis=1) @ y_px / total
    shape, radius, clear = _fit_shape(alpha, x_px - x, y_px - y)
    return FoundObject(
        shape=shape,
        colour=_PALETTE_NAMES[label] if known else None,
        size=_size(radius / READING_SIDE),
        x=x / READING_SIDE,
        y=y / READING_SIDE,
        width=(columns[-1] - columns[0] + 1) / READING_SIDE,
        height=(rows[-1] - rows[0] + 1) / READING_SIDE,
        shape_is_clear=clear,
    )


def _opacity(patch: np.ndarray, rgb: np.ndarray) -> np.ndarray:
    """(h, w, 3) sRGB => (h, w) in [0, 1]: how much of `rgb` lies over the background, by projection on their line."""
    line = rgb - np.array(BACKGROUND)
    return np.clip((patch - BACKGROUND) @ line / (line @ line), 0, 1)


def _fit_shape(alpha: np.ndarray, dx: np.ndarray, dy: np.ndarray) -> tuple[str | None, float, bool]:
    """Soft mask, (w,) and (h,) px from its centre => best outline or None, its radius in px, and whether it is clear.

    Each outline is drawn with the mask's own centre and area, so that only form decides, at each of BLURS, so that
    softness does not. Soft IoU is sum(min(a, b)) / sum(max(a, b)).
    """
    radii = np.array([np.sqrt(alpha.sum() / area(shape)) for shape in SHAPES])
    outlines = np.concatenate([
        coverage(shape, dx[None, None, :], dy[None, :, None], np.full((1, 1, 1), radius))
        for shape, radius in zip(SHAPES, radii, strict=True)
    ])  # (4, h, w)  # fmt: skip
    scores = np.max([_soft_iou(alpha, ndimage.gaussian_filter(outlines, (0, s, s))) for s in BLURS], axis=0)  # (4,)
    second, best = np.argsort(scores)[-2:]
    is_large = radii[best] >= SIZE_LIMITS["large"][0] * READING_SIDE
    if scores[best] < (MIN_IOU_LARGE if is_large else MIN_IOU_SMALL):
        return None, radii[best], True
    return SHAPES[best], radii[best], bool(scores[best] - scores[second] >= MIN_IOU_MARGIN)


def _soft_iou(mask: np.ndarray, outlines: np.ndarray) -> np.ndarray:
    """(h, w) in [0, 1], (n, h, w) in [0, 1] => (n,) in [0, 1]."""
    return np.minimum(mask, outlines).sum(axis=(1, 2)) / np.maximum(mask, outlines).sum(axis=(1, 2))


def _size(radius: float) -> str | None:
    """Radius in fractions of the side => its size, None between the two and outside both."""
    for name in _SIZE_NAMES:
        low, high = SIZE_LIMITS[name]
        if low <= radius <= high:
            return name
    return None
