"""Sampling scenes: (seed, split, index) => scene, a pure function of the three; and scenes changed in one thing.

Each scene's random numbers are a row of a counter-based table, so a range of scenes is a few array operations
and any scene can be had without those before it. Layouts are constructed, never rejected.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from sd_mini.config import check_choice
from sd_mini.errors import UserError
from sd_mini.shapes.graph import (
    COLOURS,
    COUNTS,
    INVERSE,
    KINDS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    SPLITS,
    Group,
    Scene,
    heldout_split,
)
from sd_mini.shapes.layout import count_layouts, one_object_layouts, radii, two_object_layouts
from sd_mini.shapes.uniforms import uniforms

KIND_WEIGHTS = {"one_object": 0.35, "two_objects": 0.40, "count": 0.25}
CHANGES = (
    "colour", "shape", "size", "place", "count", "relation", "colour swap", "shape swap", "size swap",
)  # fmt: skip

_COLOUR_NAMES, _SIZE_NAMES, _PLACE_NAMES = tuple(COLOURS), tuple(SIZES), tuple(PLACES)
_SWAP_STREAM = len(SPLITS)  # beside the splits' own streams
_REDRAWN_STREAM = len(SPLITS) + 1
# columns of a scene's row of uniforms
_KIND, _GRAPH, _SIZE_A, _SIZE_B, _EXTRA, _RADIUS_A, _RADIUS_B = range(7)
_LAYOUT = slice(7, 19)
_COLUMNS = 19


def _pick(u: np.ndarray, n: int) -> np.ndarray:
    """Uniforms in [0, 1) => indices in 0 .. n - 1."""
    return (u * n).astype(np.int64)


@lru_cache
def _graphs(split: str, kind: str) -> np.ndarray:
    """The combinations a split allows: (n, 2) [shape, colour], or for two objects (n, 5) [.., .., relation, .., ..]."""
    pairs = [(s, c) for s in range(len(SHAPES)) for c in range(len(COLOURS))]
    if kind == "two_objects":
        rows = [
            (*a, relation, *b)
            for a in pairs for relation in range(len(RELATIONS)) for b in pairs if a[1] != b[1]
        ]  # fmt: skip
    else:
        rows = pairs
    wanted = None if split in ("train", "test") else split
    return np.array([row for row in rows if heldout_split(*_words(row)) == wanted], dtype=np.int64)


def _words(row: tuple[int, ...]) -> tuple[tuple[Group, ...], str | None]:
    """A row of `_graphs` => groups of yet unknown size, and the relation."""
    pairs = [row[:2], row[3:]] if len(row) == 5 else [row]
    groups = tuple(Group(SHAPES[s], _COLOUR_NAMES[c], "small") for s, c in pairs)
    return groups, RELATIONS[row[2]] if len(row) == 5 else None


def allowed_kinds(
    split: str, kinds: Sequence[str] | None, every: tuple[str, ...], related: tuple[str, ...]
) -> tuple[str, ...]:
    """The kinds of scenes of a split, or those of `kinds`; of a level that has `every`, of which `related` ones have
    relations. Raises UserError for a split or a kind that is not one."""
    check_choice("split", split, SPLITS)
    possible = related if split == "heldout_relations" else every
    if kinds is None:
        return possible
    if not kinds:
        raise UserError(f"kinds: got none, expected some of {possible}: name at least one")
    for kind in kinds:
        check_choice(f"kinds of split {split!r}", kind, possible)
    return tuple(kind for kind in possible if kind in kinds)


def sample_scenes(
    n: int, split: str = "train", seed: int = 0, start: int = 0, kinds: Sequence[str] | None = None
) -> list[Scene]:
    """Scenes start to start + n - 1: a pure function of the arguments, on any machine."""
    allowed = allowed_kinds(split, kinds, KINDS, ("two_objects",))
    if n < 0 or start < 0:
        raise UserError(f"n and start: got {n} and {start}, expected both at least 0: pass larger ones")
    u = uniforms(seed, SPLITS.index(split), np.arange(start, start + n, dtype=np.uint64), _COLUMNS)
    weights = np.cumsum([KIND_WEIGHTS[kind] for kind in allowed])
    kind_index = np.searchsorted(weights / weights[-1], u[:, _KIND], side="right")
    scenes: dict[int, Scene] = {}
    builders = {"one_object": _one_object_scenes, "two_objects": _two_object_scenes, "count": _count_scenes}
    for i, kind in enumerate(allowed):
        rows = np.flatnonzero(kind_index == i)
        graphs = _graphs(split, kind)
        chosen = graphs[_pick(u[rows, _GRAPH], len(graphs))]
        for row, scene in zip(rows.tolist(), builders[kind](chosen, u[rows]), strict=True):
            scenes[row] = scene
    return [scenes[row] for row in range(n)]


def _sizes(u: np.ndarray) -> np.ndarray:
    return _pick(u, len(_SIZE_NAMES))


def _one_object_scenes(chosen: np.ndarray, u: np.ndarray) -> list[Scene]:
    size, place = _sizes(u[:, _SIZE_A]), _pick(u[:, _EXTRA], len(PLACES))
    layouts = one_object_layouts(place, radii(size, u[:, _RADIUS_A]), u[:, _LAYOUT])
    columns = zip(chosen.tolist(), size.tolist(), place.tolist(), layouts.tolist(), strict=True)
    return [
        Scene(
            "one_object",
            (Group(SHAPES[shape], _COLOUR_NAMES[colour], _SIZE_NAMES[s], 1, _PLACE_NAMES[p]),),
            None,
            (tuple(where),),
        )
        for (shape, colour), s, p, where in columns
    ]


def _two_object_scenes(chosen: np.ndarray, u: np.ndarray) -> list[Scene]:
    size_a, size_b = _sizes(u[:, _SIZE_A]), _sizes(u[:, _SIZE_B])
    radius_a, radius_b = radii(size_a, u[:, _RADIUS_A]), radii(size_b, u[:, _RADIUS_B])
    layouts = two_object_layouts(chosen[:, 2], radius_a, radius_b, u[:, _LAYOUT])
    columns = zip(chosen.tolist(), size_a.tolist(), size_b.tolist(), layouts.tolist(), strict=True)
    return [
        Scene(
            "two_objects",
            (
                Group(SHAPES[shape_a], _COLOUR_NAMES[colour_a], _SIZE_NAMES[sa]),
                Group(SHAPES[shape_b], _COLOUR_NAMES[colour_b], _SIZE_NAMES[sb]),
            ),
            RELATIONS[relation],
            (tuple(where[0]), tuple(where[1])),
        )
        for (shape_a, colour_a, relation, shape_b, colour_b), sa, sb, where in columns
    ]


def _count_scenes(chosen: np.ndarray, u: np.ndarray) -> list[Scene]:
    size, count = _sizes(u[:, _SIZE_A]), _pick(u[:, _EXTRA], len(COUNTS)) + COUNTS[0]
    layouts = count_layouts(radii(size, u[:, _RADIUS_A]), u[:, _LAYOUT])
    columns = zip(chosen.tolist(), size.tolist(), count.tolist(), layouts.tolist(), strict=True)
    return [
        Scene(
            "count",
            (Group(SHAPES[shape], _COLOUR_NAMES[colour], _SIZE_NAMES[s], n),),
            None,
            tuple((x, y, radius) for x, y, radius in where[:n]),
        )
        for (shape, colour), s, n, where in columns
    ]


def swapped(scene: Scene, rng_index: int, change: str | None = None) -> tuple[Scene, str]:
    """A scene that differs in one thing, with a new layout, and what was changed: a name of CHANGES.

    A pure function of its arguments, for hard negatives and for testing the judge. Without `change` one of those
    that apply is drawn. A scene free of held-out combinations is never changed into one that has them. Raises
    ValueError where `change` does not apply to the scene.
    """
    variants = _variants(scene)
    if change is None:
        names = [name for name in CHANGES if name in variants]
    elif change in variants:
        names = [change]
    else:
        raise UserError(f"change: got {change!r}, expected one of {tuple(variants)} for this scene: use one of these")
    u = uniforms(rng_index, _SWAP_STREAM, np.arange(1), _COLUMNS)
    name = names[int(u[0, _KIND] * len(names))]
    options = variants[name]
    groups, relation = options[int(u[0, _GRAPH] * len(options))]
    return Scene(scene.kind, groups, relation, _new_layout(scene.kind, groups, relation, u)), name


def redrawn(scenes: Sequence[Scene], seed: int) -> list[Scene]:
    """The same graphs, each with a fresh layout: a pure function of (scene, seed, its place in `scenes`)."""
    every = uniforms(seed, _REDRAWN_STREAM, np.arange(len(scenes), dtype=np.uint64), _COLUMNS)
    return [
        replace(scene, layout=_new_layout(scene.kind, scene.groups, scene.relation, row[None]))
        for scene, row in zip(scenes, every, strict=True)
    ]


def _new_layout(kind: str, groups: tuple[Group, ...], relation: str | None, u: np.ndarray) -> tuple:
    """A layout for one graph from a (1, _COLUMNS) row of uniforms."""
    sizes = np.array([[_SIZE_NAMES.index(group.size)] for group in groups])  # (groups, 1)
    radius = radii(sizes[0], u[:, _RADIUS_A])
    if kind == "one_object":
        layouts = one_object_layouts(np.array([_PLACE_NAMES.index(groups[0].place)]), radius, u[:, _LAYOUT])[:, None]
    elif kind == "two_objects":
        radius_b = radii(sizes[1], u[:, _RADIUS_B])
        layouts = two_object_layouts(np.array([RELATIONS.index(relation)]), radius, radius_b, u[:, _LAYOUT])
    else:
        layouts = count_layouts(radius, u[:, _LAYOUT])[:, : groups[0].count]
    return tuple(map(tuple, layouts[0].tolist()))


def _variants(scene: Scene) -> dict[str, list[tuple[tuple[Group, ...], str | None]]]:
    """What may be changed => the changed graphs, (groups, relation), without those held out from the scene's split."""
    groups, relation = scene.groups, scene.relation
    found: dict[str, list] = {name: [] for name in CHANGES}
    alternatives = {"colour": _COLOUR_NAMES, "shape": SHAPES, "size": _SIZE_NAMES}
    if scene.kind == "one_object":
        alternatives["place"] = _PLACE_NAMES
    elif scene.kind == "count":
        alternatives["count"] = COUNTS
    for i, group in enumerate(groups):
        for field, values in alternatives.items():
            others = [replace(group, **{field: value}) for value in values if value != getattr(group, field)]
            found[field] += [((*groups[:i], other, *groups[i + 1 :]), relation) for other in others]
    if relation is not None:
        _add_exchanges(found, groups, relation)
    source = heldout_split(groups, relation)
    kept = {name: [option for option in options if _may_follow(source, option)] for name, options in found.items()}
    return {name: options for name, options in kept.items() if options}


def _add_exchanges(found: dict[str, list], groups: tuple[Group, ...], relation: str) -> None:
    """Add the changes of two objects: the relation inverted, or one attribute exchanged between the two."""
    a, b = groups
    found["relation"].append((groups, INVERSE[relation]))
    for field in ("colour", "shape", "size"):
        # exchanging one of two differing attributes would only exchange the objects: that is the relation's change
        rest = [other for other in ("colour", "shape") if other != field]
        differs = getattr(a, field) != getattr(b, field) and any(getattr(a, r) != getattr(b, r) for r in rest)
        if differs:
            swap = (replace(a, **{field: getattr(b, field)}), replace(b, **{field: getattr(a, field)}))
            found[f"{field} swap"].append((swap, relation))


def _may_follow(source: str | None, option: tuple[tuple[Group, ...], str | None]) -> bool:
    groups, relation = option
    if len(groups) == 2 and groups[0].colour == groups[1].colour:
        return False
    return heldout_split(groups, relation) in (None, source)
