"""Where the objects of level 2 go: constructed from draws, each layout within the rules by construction."""

import itertools
from collections.abc import Sequence

import numpy as np

from sd_mini.shapes.graph import INVERSE, MARGIN, MAX_SLANT, PLACES
from sd_mini.shapes.layout import JITTER, SPREAD
from sd_mini.shapes.level2.graph import GAP, SIZES, Group, covered_side
from sd_mini.shapes.level2.outlines import extent, safe_depth

Layout = tuple[tuple[float, float, float], ...]
LEAST_DEPTH = 0.4  # of the deepest overlap that is allowed: less would be a touch
ROW_JITTER = 0.03  # how far an object of a group lies from its even spacing, at most
_STEPS = {"left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}  # from a to b in "a RELATION b"


class Draws:
    """A row of uniforms in [0, 1), used up from its start."""

    def __init__(self, row: np.ndarray):
        self._rest = iter(row.tolist())

    def between(self, low: float, high: float) -> float:
        return low + next(self._rest) * (high - low)

    def below(self, n: int) -> int:
        return int(next(self._rest) * n)

    def pick(self, options: Sequence):
        return options[self.below(len(options))]

    def shuffled(self, n: int) -> list[int]:
        """0 .. n - 1 in random order (Fisher and Yates)."""
        order = list(range(n))
        for i in range(n - 1, 0, -1):
            j = self.below(i + 1)
            order[i], order[j] = order[j], order[i]
        return order


def new_layout(
    kind: str, groups: tuple[Group, ...], relations: tuple[str, ...], top: int | None, draws: Draws
) -> Layout:
    """(x, y, radius) of each object of a graph, fractions of the side."""
    radii = [draws.between(*SIZES[group.size]) for group in groups]
    if kind == "one_object":
        return (_in_place(groups[0].place or "", radii[0], draws),)
    if kind == "groups":
        return _rows(groups, radii, draws)
    if top is None:
        distances = _apart(relations, radii, draws)
    else:
        distances = [_overlapping(groups, relations[0], top, radii, draws)]
    return _chained(relations, radii, distances, draws)


def _in_place(place: str, radius: float, draws: Draws) -> tuple[float, float, float]:
    """The centre within JITTER of the middle of the free part of a place."""
    centre = []
    for low, high in PLACES[place]:
        low, high = max(low, MARGIN + radius), min(high, 1 - MARGIN - radius)
        room = min(JITTER, (high - low) / 2)
        centre.append((low + high) / 2 + draws.between(-room, room))
    return centre[0], centre[1], radius


def _apart(relations: tuple[str, ...], radii: list[float], draws: Draws) -> list[float]:
    """The distance of each two neighbours along their relation's axis: the least, and some of the room that is left."""
    nearest = [a + b + GAP for a, b in itertools.pairwise(radii)]
    is_row = len(relations) == 2 and relations[0] == relations[1]
    ends = [radii[0] + radii[-1]] if is_row else [a + b for a, b in itertools.pairwise(radii)]
    lengths = [sum(nearest)] if is_row else nearest
    rooms = [max(1 - 2 * MARGIN - end - length, 0) for end, length in zip(ends, lengths, strict=True)]
    if is_row:
        rooms = [rooms[0] / 2] * 2
    return [least + draws.between(0, min(room, SPREAD)) for least, room in zip(nearest, rooms, strict=True)]


def _overlapping(groups: tuple[Group, ...], relation: str, top: int, radii: list[float], draws: Draws) -> float:
    """The distance at which the upper object covers a part of the lower one that is at most a fifth of its area."""
    lower, side = covered_side(groups, relation, top)
    depth = draws.between(LEAST_DEPTH, 1) * safe_depth(lower.shape, side) * radii[1 - top]
    reach = extent(groups[0].shape, INVERSE[relation]) * radii[0] + extent(groups[1].shape, relation) * radii[1]
    return reach - depth


def _chained(relations: tuple[str, ...], radii: list[float], distances: list[float], draws: Draws) -> Layout:
    """Objects one after the other, each at its distance from the one before; their frame near the picture's middle."""
    centres = [(0.0, 0.0)]
    for relation, distance in zip(relations, distances, strict=True):
        (x, y), (along_x, along_y) = centres[-1], _STEPS[relation]
        slant = draws.between(-1, 1) * min(JITTER, MAX_SLANT * distance)
        centres.append((x + along_x * distance + along_y * slant, y + along_y * distance + along_x * slant))
    shifts = []
    for axis in (0, 1):
        low = min(centre[axis] - radius for centre, radius in zip(centres, radii, strict=True))
        high = max(centre[axis] + radius for centre, radius in zip(centres, radii, strict=True))
        room = max((1 - 2 * MARGIN - (high - low)) / 2, 0)
        shifts.append(0.5 - (low + high) / 2 + draws.between(-1, 1) * min(JITTER, room))
    return tuple((x + shifts[0], y + shifts[1], r) for (x, y), r in zip(centres, radii, strict=True))


def _rows(groups: tuple[Group, ...], radii: list[float], draws: Draws) -> Layout:
    """A row a group, in random order from the top; the objects of a row evenly spaced, up to ROW_JITTER."""
    order = draws.shuffled(len(groups))
    heights, room_y = _even([radii[i] for i in order])
    layout: dict[int, list[tuple[float, float, float]]] = {}
    for i, middle in zip(order, heights, strict=True):
        places, room_x = _even([radii[i]] * groups[i].count)
        # Beside a row the free space is the edge's, above and below it the next row's too, which moves as well.
        x0, y0 = draws.between(-1, 1) * min(room_x / 2, JITTER), draws.between(-1, 1) * min(room_y / 4, JITTER)
        layout[i] = [
            (
                x + x0 + draws.between(-1, 1) * min(room_x / 4, ROW_JITTER),
                middle + y0 + draws.between(-1, 1) * min(room_y / 4, ROW_JITTER),
                radii[i],
            )
            for x in places
        ]
    return tuple(where for i in range(len(groups)) for where in layout[i])


def _even(radii: list[float]) -> tuple[list[float], float]:
    """Circles in a line => their centres with equal spaces between and around them, and that space beyond the least."""
    free = 1 - 2 * MARGIN - 2 * sum(radii) - GAP * (len(radii) - 1)
    space = max(free, 0) / (len(radii) + 1)
    centres, edge = [], MARGIN + space
    for radius in radii:
        centres.append(edge + radius)
        edge += 2 * radius + GAP + space
    return centres, space
