"""Level 2's segmentation: what differs from a background that is estimated from the picture itself.

Every picture is read at 64 px, so lengths are in those pixels.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from sd_mini.shapes.graph import COLOURS, lab
from sd_mini.shapes.level2.graph import TONES
from sd_mini.shapes.level2.outlines import PALE

# CIELAB. Paper is light and nearly grey: L* 90 or more, chroma below 10; a pale band of a colour is one or the other
PAPER_LIGHTNESS, PAPER_CHROMA = 80.0, 18.0
PAPER_RESIDUAL = 15.0  # a pixel farther from the plane through the paper is left out of its next fit
MIN_PAPER = 0.45  # share of the picture
FOREGROUND = 15.0  # distance from the paper at which a pixel belongs to an object
COLOUR_REACH = 20.0  # of the line from white to a colour
MIN_MARK = 9  # px of one connected mark that make it an object: fewer is a speck
MIN_VOTES = 0.15  # share of a mark's pixels that are of a palette colour, for it to be an object of that colour
MIN_CORE = 2  # px of a colour that survive erosion: none of the thin mixture where two objects touch

_RGB = np.array(list(COLOURS.values()), dtype=np.float64)  # (8, 3)
_WHITE = np.array(TONES["white"], dtype=np.float64)
# points on the line from white to each colour, from its pale band on: (8, 4, 3)
_LINES = lab(_WHITE + np.array([PALE, 0.65, 0.82, 1.0])[None, :, None] * (_RGB - _WHITE)[:, None, :])
_CROSS = ndimage.generate_binary_structure(2, 1)
_FIT_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Region:
    """The pixels of an object, (64, 64) bool; its colour's index, None for a foreign one; and the pixels of objects
    that touch it, where it may be hidden."""

    mask: np.ndarray
    colour: int | None
    hidden: np.ndarray


def segment(pixels: np.ndarray) -> tuple[np.ndarray, list[Region]] | None:
    """(64, 64, 3) sRGB => the background under every pixel, (64, 64, 3) sRGB, and the objects; None where there is too
    little background."""
    colours = lab(pixels)
    side = pixels.shape[0]
    down, across = np.mgrid[:side, :side] / side - 0.5
    terms = np.stack([np.ones_like(down), down, across], axis=-1)  # (64, 64, 3)
    # plane through the paper, by least squares over every second pixel of every second row
    some = [part[::2, ::2].reshape(-1, 3) for part in (terms, pixels, colours)]
    values = np.concatenate(some[1:], axis=-1)  # (1024, 6)
    is_paper = (some[2][:, 0] > PAPER_LIGHTNESS) & (np.hypot(some[2][:, 1], some[2][:, 2]) < PAPER_CHROMA)
    weights = np.zeros((3, 6))
    for _ in range(_FIT_ROUNDS):
        if is_paper.mean() < MIN_PAPER:
            return None
        known = some[0][is_paper]
        weights = np.linalg.solve(known.T @ known, known.T @ values[is_paper])
        # what does not lie on it is left out of the next round
        is_paper &= np.linalg.norm(some[2] - some[0] @ weights[:, 3:], axis=-1) < PAPER_RESIDUAL
    planes = terms @ weights
    away = np.linalg.norm(colours - planes[..., 3:], axis=-1)
    component, n = ndimage.label(away > FOREGROUND, _CROSS)
    sizes = np.bincount(component.ravel(), minlength=n + 1)
    marks = [component == i for i in range(1, n + 1) if sizes[i] >= MIN_MARK]
    return planes[..., :3], [region for mark in marks for region in _split(colours, mark)]


def _split(colours: np.ndarray, mark: np.ndarray) -> list[Region]:
    """One connected mark => its objects: one, or several of different colours that touch."""
    inside = colours[mark]  # (P, 3)
    # pale bands of two colours may be alike, so they do not vote
    distances = np.linalg.norm(inside[:, None, None] - _LINES[:, 1:], axis=-1).min(axis=-1)  # (P, 8)
    nearest = np.where(distances.min(axis=1) <= COLOUR_REACH, distances.argmin(axis=1), -1)
    votes = np.bincount(nearest[nearest >= 0], minlength=len(_LINES)) / len(inside)
    nothing = np.zeros_like(mark)
    candidates = np.flatnonzero(votes >= MIN_VOTES / 2)
    if votes.sum() < MIN_VOTES:
        return [Region(mark, None, nothing)]
    if len(candidates) <= 1:
        return [Region(mark, int(votes.argmax()), nothing)]
    masks = _assigned(inside, mark, candidates)
    kept = [c for c, own in zip(candidates, masks, strict=True) if _has_core(own & _voted(mark, nearest == c))]
    if len(kept) <= 1:
        return [Region(mark, int(kept[0] if kept else votes.argmax()), nothing)]
    masks = _assigned(inside, mark, np.array(kept))
    return [Region(_largest(own), int(c), mark & ~own) for c, own in zip(kept, masks, strict=True)]


def _voted(mark: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """(P,) bool of a mark's pixels => (64, 64) bool."""
    mask = np.zeros_like(mark)
    mask[mark] = chosen
    return mask


def _assigned(inside: np.ndarray, mark: np.ndarray, candidates: np.ndarray) -> list[np.ndarray]:
    """Each candidate colour's pixels of a mark: those whose nearest line from white to a colour is its own."""
    lines = _LINES[candidates]  # (C, 4, 3)
    distances = np.linalg.norm(inside[:, None, None] - lines, axis=-1).min(axis=-1)  # (P, C)
    nearest = distances.argmin(axis=1)
    return [_voted(mark, nearest == i) for i in range(len(candidates))]


def _has_core(mask: np.ndarray) -> bool:
    return int(ndimage.binary_erosion(mask, _CROSS).sum()) >= MIN_CORE


def _largest(mask: np.ndarray) -> np.ndarray:
    """The largest connected part of a mask."""
    component, n = ndimage.label(mask, _CROSS)
    return mask if n <= 1 else component == np.bincount(component.ravel())[1:].argmax() + 1
