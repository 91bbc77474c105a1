"""Sampling scenes of level 2: (seed, split, index) => scene, a pure function of the three.

Shapes are drawn first, then relations and colours among those that the split allows; nothing is rejected.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise, product

import numpy as np

from sd_mini.errors import UserError
from sd_mini.shapes.graph import COLOURS, INVERSE, PLACES, RELATIONS, SPLITS
from sd_mini.shapes.level2.graph import (
    COUNTS,
    GROUPS,
    HELDOUT_PAIRS,
    HELDOUT_RELATIONS,
    KIND_SIZES,
    KINDS,
    MOST_OBJECTS,
    PATTERNS,
    RELATED,
    TONES,
    Background,
    Group,
    Scene,
    is_heldout,
    patterns_of,
)
from sd_mini.shapes.level2.layout import Draws, new_layout
from sd_mini.shapes.level2.outlines import SHAPES
from sd_mini.shapes.sample import allowed_kinds
from sd_mini.shapes.uniforms import uniforms

KIND_WEIGHTS = {"one_object": 0.25, "two_objects": 0.30, "groups": 0.25, "chain": 0.20}
OVERLAP_SHARE = 0.5  # of the scenes of two objects that are not small
COLUMNS = 64  # uniforms a scene has; the longest takes fewer

_STREAM = 16  # the first of level 2's streams, one a split; level 1's are below
_REDRAWN_STREAM = 24
_COLOURS, _PLACES, _TONES = tuple(COLOURS), tuple(PLACES), tuple(TONES)
_UNSEEN_PAIRS, _UNSEEN_RELATIONS = sorted(HELDOUT_PAIRS), sorted(HELDOUT_RELATIONS)  # of a set's order nothing is sure
_PATTERN_DRAWS = ("plain", *PATTERNS)  # half of what may have a pattern is plain
_BACKGROUND_DRAWS = ("plain", "plain", "gradient", "noisy")


def sample_scenes(
    n: int, split: str = "train", seed: int = 0, start: int = 0, kinds: Sequence[str] | None = None
) -> list[Scene]:
    """Scenes start to start + n - 1 of a split's endless stream: the same for the same arguments, on any machine.

    `kinds` restricts the mix to some of KINDS; heldout_relations has two_objects and chain only. Raises UserError for a
    split or kind that is not one, a negative n or start, and a seed outside [0, 2**63).
    """
    allowed = allowed_kinds(split, kinds, KINDS, RELATED)
    if n < 0 or start < 0:
        raise UserError(f"n and start: got {n} and {start}, expected both at least 0: pass larger ones")
    indices = np.arange(start, start + n, dtype=np.uint64)
    rows = uniforms(seed, _STREAM + SPLITS.index(split), indices, COLUMNS)
    ends = np.cumsum([KIND_WEIGHTS[kind] for kind in allowed])
    drawn = np.searchsorted(ends / ends[-1], rows[:, 0], side="right").tolist()
    return [_scene(allowed[i], split, Draws(row[1:])) for i, row in zip(drawn, rows, strict=True)]


def _scene(kind: str, split: str, draws: Draws) -> Scene:
    number = {"one_object": 1, "two_objects": 2, "chain": 3}.get(kind) or draws.pick(GROUPS)
    shapes, colours = [draws.pick(SHAPES) for _ in range(number)], [""] * number
    if split == "heldout_pairs":
        i = draws.below(number)
        colours[i], shapes[i] = draws.pick(_UNSEEN_PAIRS)
    relations: tuple[str, ...] = ()
    if split == "heldout_relations":
        shapes, relations = _with_unseen_relation(shapes, draws)
    elif kind in RELATED:
        relations = _seen_relations(shapes, (), draws)
    colours = _filled(colours, shapes, draws)
    counts = draws.pick(_counts(number)) if kind == "groups" else (1,) * number
    groups = []
    for shape, colour, count in zip(shapes, colours, counts, strict=True):
        size = draws.pick(KIND_SIZES[kind])
        pattern = draws.pick([one for one in _PATTERN_DRAWS if one in patterns_of(size)])
        place = draws.pick(_PLACES) if kind == "one_object" else None
        groups.append(Group(shape, colour, size, pattern, count, place))
    return arranged(kind, tuple(groups), relations, draws)


def redrawn(scenes: Sequence[Scene], seed: int) -> list[Scene]:
    """The same graphs, each with a fresh layout and background: a function of (scene, seed, its place in `scenes`)."""
    rows = uniforms(seed, _REDRAWN_STREAM, np.arange(len(scenes), dtype=np.uint64), COLUMNS)
    return [arranged(s.kind, s.groups, s.relations, Draws(row)) for s, row in zip(scenes, rows, strict=True)]


def arranged(kind: str, groups: tuple[Group, ...], relations: tuple[str, ...], draws: Draws) -> Scene:
    """A graph with a new layout and background."""
    overlaps = kind == "two_objects" and draws.between(0, 1) < OVERLAP_SHARE and all(g.size != "small" for g in groups)
    top = draws.below(2) if overlaps else None
    layout = new_layout(kind, groups, relations, top, draws)
    return Scene(kind, groups, relations, layout, _background(draws), top)


def _with_unseen_relation(shapes: list[str], draws: Draws) -> tuple[list[str], tuple[str, ...]]:
    """Two shapes replaced by those of a held-out fact, and the relations, that fact among them."""
    a, relation, b = draws.pick(_UNSEEN_RELATIONS)
    if draws.below(2):
        a, relation, b = b, INVERSE[relation], a
    first = draws.below(len(shapes) - 1)  # the place of the fact in the chain
    shapes = [*shapes[:first], a, b, *shapes[first + 2 :]]
    if first == 0:
        return shapes, _seen_relations(shapes, (relation,), draws)
    # the chain read backwards begins with the fact
    turned = _seen_relations(shapes[::-1], (INVERSE[relation],), draws)
    return shapes, (INVERSE[turned[1]], relation)


def _seen_relations(shapes: list[str], relations: tuple[str, ...], draws: Draws) -> tuple[str, ...]:
    """`relations` continued to the chain's end, without held-out facts and without turning back."""
    for a, b in list(pairwise(shapes))[len(relations) :]:
        before = relations[-1] if relations else None
        relations = (*relations, draws.pick(_followers(a, b, before)))
    return relations


@lru_cache
def _followers(a: str, b: str, before: str | None) -> tuple[str, ...]:
    """The relations of shape a to shape b that are not held out and do not turn back from the one before."""
    return tuple(r for r in RELATIONS if not is_heldout(a, r, b) and (before is None or r != INVERSE[before]))


def _filled(colours: list[str], shapes: list[str], draws: Draws) -> list[str]:
    """Different colours, those that are there kept, and none of the others of a held-out pair."""
    filled = list(colours)
    for i, shape in enumerate(shapes):
        if not filled[i]:
            filled[i] = draws.pick([c for c in _COLOURS if c not in filled and (c, shape) not in HELDOUT_PAIRS])
    return filled


@lru_cache
def _counts(number: int) -> tuple[tuple[int, ...], ...]:
    return tuple(c for c in product(COUNTS, repeat=number) if number < sum(c) <= MOST_OBJECTS)


def _background(draws: Draws) -> Background:
    kind, tone = draws.pick(_BACKGROUND_DRAWS), draws.pick(_TONES)
    if kind == "gradient":
        second = draws.pick([other for other in _TONES if other != tone])
        return Background(kind, tone, second, draws.between(0, 2 * math.pi))
    return Background(kind, tone, tone, 0.0, draws.below(2**31) if kind == "noisy" else 0)
