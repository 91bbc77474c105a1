"""Which pictures a report shows, by rules that leave no choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval.metrics.memorisation import Nearest
from sd_mini.data.captioned import CaptionedPictures

SHOWN, FEW = 24, 12
PAIRS = 6


@dataclass(frozen=True)
class Tile:
    """One picture of the page, (3, H, W) uint8, what was asked for, and what is said of it."""

    picture: np.ndarray
    prompt: str
    note: str = ""


@dataclass(frozen=True)
class Gallery:
    """Pictures of the page, and the rule by which they were picked."""

    title: str
    rule: str
    tiles: list[Tile]


def pick_galleries(
    made: np.ndarray, captions: Sequence[str], values: np.ndarray, measure: str, notes: Sequence[str]
) -> list[Gallery]:
    """Pictures (N, 3, R, R) uint8 and each one's value, higher is better, by `measure` => the first in order, some at
    random, the best and the worst. Where all N are shown in order there is nothing more to show."""
    tiles = [Tile(*row) for row in zip(made, captions, notes, strict=True)]
    count, order = len(tiles), np.argsort(-np.asarray(values), kind="stable").tolist()
    rule = f"The first {min(SHOWN, count)} prompts of {count}, whatever came of them."
    galleries = [Gallery("In order", rule, tiles[:SHOWN])]
    if count <= SHOWN:
        return galleries
    chosen = sorted(np.random.default_rng(0).permutation(count)[:FEW].tolist())
    for title, rule, rows in (
        ("At random", f"{FEW} of the {count}, drawn by numpy's generator of seed 0.", chosen),
        ("Best", f"The {FEW} highest of {count} by {measure}; equal ones in order.", order[:FEW]),
        ("Worst", f"The {FEW} lowest of {count} by {measure}; equal ones from the last on.", order[::-1][:FEW]),
    ):
        galleries.append(Gallery(title, rule, [tiles[i] for i in rows]))
    return galleries


def pick_pairs(made: np.ndarray, captions: Sequence[str], training: CaptionedPictures, found: Nearest) -> Gallery:
    """The made pictures that lie closest to a training picture, each before it."""
    tiles = []
    for row in np.argsort(found.distances, kind="stable")[:PAIRS]:
        number = int(found.numbers[row])
        known = training.captions[number][0] if training.captions[number] else ""
        tiles.append(Tile(made[row], captions[row], f"made; {found.distances[row]:.3g} away"))
        tiles.append(Tile(training.pictures[number], known, f"training picture {number}"))
    rule = f"The {PAIRS} made pictures that are closest to a training picture by pixels, each beside it."
    return Gallery("Closest to the training pictures", rule, tiles)
