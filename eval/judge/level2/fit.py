"""What an object is: six outlines in three patterns, rendered again at its place and compared by soft IoU."""

from typing import NamedTuple

import numpy as np
from scipy import ndimage

from sd_mini.shapes.level2.graph import PATTERNS
from sd_mini.shapes.level2.outlines import PALE, SHAPES, coverage, darkness, opacity_moments

BLURS = (0.4, 0.8, 1.2)  # px, standard deviations: nearly as drawn, and as a decoder may soften it
FILL_ROUNDS, RELAXATION = 7, 1.7  # of filling in what is hidden
MAX_HIDDEN = 0.35  # share of an outline; more is not an object that is seen
MIN_MARGIN = 0.01  # soft IoU, best shape over second best; below it the shape cannot be told

HYPOTHESES = [(shape, pattern) for pattern in PATTERNS for shape in SHAPES]
_MOMENTS = np.array([opacity_moments(shape, pattern) for shape, pattern in HYPOTHESES], dtype=np.float32)  # (18, 2)


class Fit(NamedTuple):
    """The best hypothesis: centre and radius in px, its soft IoU, and whether no other shape comes near."""

    shape: str
    pattern: str
    x: float
    y: float
    radius: float
    iou: float
    is_clear: bool


def fit(opacity: np.ndarray, visible: np.ndarray, x_px: np.ndarray, y_px: np.ndarray) -> Fit:
    """(h, w) in [0, 1], (h, w) bool, pixel centres (w,) and (h,) => the hypothesis that fits best where it is visible.

    Each hypothesis is given the centre and the total opacity of what is there, so that only form decides. Behind
    other objects, its own rendering stands for what cannot be seen, again and again until that changes little.
    """
    filled = np.broadcast_to(np.where(visible, opacity, 0), (len(HYPOTHESES), *opacity.shape))
    placed = _placed(filled, x_px, y_px)
    rendered = _render(placed, x_px, y_px)
    for _ in range(0 if visible.all() else FILL_ROUNDS):
        # over-relaxed, as each round makes up for only a part of what is hidden
        placed = placed + RELAXATION * (_placed(np.where(visible, opacity, rendered), x_px, y_px) - placed)
        rendered = _render(placed, x_px, y_px)
    x, y, radius = placed
    scores = np.max([_soft_iou(opacity, ndimage.gaussian_filter(rendered, (0, s, s)), visible) for s in BLURS], axis=0)
    if not visible.all():
        scores = np.where((rendered * ~visible).sum((1, 2)) <= MAX_HIDDEN * rendered.sum((1, 2)), scores, 0)
    by_shape = scores.reshape(len(PATTERNS), len(SHAPES)).max(axis=0)
    best = int(scores.argmax())
    second, first = np.sort(by_shape)[-2:]
    shape, pattern = HYPOTHESES[best]
    centre = float(x[best]), float(y[best])
    return Fit(shape, pattern, *centre, float(radius[best]), float(scores[best]), bool(first - second >= MIN_MARGIN))


def _placed(filled: np.ndarray, x_px: np.ndarray, y_px: np.ndarray) -> np.ndarray:
    """(18, h, w) opacity => each hypothesis's x, y and radius, (3, 18) px, that give it the same moments."""
    total = filled.sum((1, 2))
    radius = np.sqrt(total / _MOMENTS[:, 0])
    x = filled.sum(1) @ x_px / total
    y = filled.sum(2) @ y_px / total - _MOMENTS[:, 1] * radius
    return np.stack([x, y, radius])


def _render(placed: np.ndarray, x_px: np.ndarray, y_px: np.ndarray) -> np.ndarray:
    """x, y and radius (3, 18) of the hypotheses => their opacity, (18, h, w)."""
    x, y, radius = placed
    dx, dy = x_px[None, None, :] - x[:, None, None], y_px[None, :, None] - y[:, None, None]
    rendered = np.empty((len(HYPOTHESES), len(y_px), len(x_px)), dtype=np.float32)
    for i, (shape, pattern) in enumerate(HYPOTHESES):
        own = slice(i, i + 1)
        size = radius[own, None, None]
        rendered[i] = coverage(shape, dx[own], dy[own], size)[0]
        if pattern != "plain":
            rendered[i] *= PALE + (1 - PALE) * darkness(pattern, dx[own], dy[own], size)[0]
    return rendered


def _soft_iou(opacity: np.ndarray, rendered: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """(h, w), (18, h, w), and where to compare, (h, w) bool => (18,) in [0, 1]."""
    shared = (np.minimum(opacity, rendered) * visible).sum((1, 2))
    return shared / (np.maximum(opacity, rendered) * visible).sum((1, 2))
