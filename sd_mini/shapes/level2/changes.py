"""Scenes of level 2 changed in one thing: hard negatives, and what the judge is tested with."""

from dataclasses import replace
from itertools import combinations

import numpy as np

from sd_mini.errors import UserError
from sd_mini.shapes.graph import COLOURS, INVERSE, PLACES, RELATIONS, SPLITS
from sd_mini.shapes.level2.graph import COUNTS, KIND_SIZES, MOST_OBJECTS, Group, Scene, heldout_split, patterns_of
from sd_mini.shapes.level2.layout import Draws
from sd_mini.shapes.level2.outlines import SHAPES
from sd_mini.shapes.level2.sample import COLUMNS, arranged
from sd_mini.shapes.uniforms import uniforms

SWAPPED_FIELDS = ("colour", "shape", "size", "pattern", "count")
CHANGES = (
    "colour", "shape", "size", "pattern", "place", "count", "relation", *(f"{name} swap" for name in SWAPPED_FIELDS),
)  # fmt: skip

_STREAM = 16 + len(SPLITS)  # beside the splits' own
Option = tuple[tuple[Group, ...], tuple[str, ...]]


def swapped(scene: Scene, rng_index: int, change: str | None = None) -> tuple[Scene, str]:
    """A scene that differs in one thing, with a new layout and background, and what was changed: a name of CHANGES.

    A pure function of its arguments. Without `change` one of those that apply is drawn. A scene free of held-out
    combinations is never changed into one that has them. Raises UserError where `change` does not apply to the scene.
    """
    variants = _variants(scene)
    if change is not None and change not in variants:
        raise UserError(f"change: got {change!r}, expected one of {tuple(variants)} for this scene: use one of these")
    draws = Draws(uniforms(rng_index, _STREAM, np.arange(1), COLUMNS)[0])
    name = draws.pick(list(variants)) if change is None else change
    groups, relations = draws.pick(variants[name])
    return arranged(scene.kind, groups, relations, draws), name


def _variants(scene: Scene) -> dict[str, list[Option]]:
    """What may be changed => the changed graphs, in the order of CHANGES."""
    options: dict[str, list[Option]] = {name: [] for name in CHANGES}
    for i, group in enumerate(scene.groups):
        for name, values in _alternatives(scene.kind, group).items():
            others = [replace(group, **{name: value}) for value in values if value != getattr(group, name)]
            options[name] += [((*scene.groups[:i], other, *scene.groups[i + 1 :]), scene.relations) for other in others]
    for i, relation in enumerate(scene.relations):
        others = [other for other in RELATIONS if other != relation]
        options["relation"] += [
            (scene.groups, (*scene.relations[:i], other, *scene.relations[i + 1 :])) for other in others
        ]
    for i, j in combinations(range(len(scene.groups)), 2):
        for name in SWAPPED_FIELDS:
            option = _exchanged(scene, i, j, name)
            options[f"{name} swap"] += [option] if option is not None else []
    source = heldout_split(scene.groups, scene.relations)
    kept = {name: [one for one in several if _is_allowed(source, one)] for name, several in options.items()}
    return {name: several for name, several in kept.items() if several}


def _alternatives(kind: str, group: Group) -> dict[str, tuple]:
    """The values that each attribute of a group may take, all others kept."""
    sizes = tuple(size for size in KIND_SIZES[kind] if group.pattern in patterns_of(size))
    values: dict[str, tuple] = {
        "colour": tuple(COLOURS), "shape": SHAPES, "size": sizes, "pattern": patterns_of(group.size),
    }  # fmt: skip
    if kind == "one_object":
        values["place"] = tuple(PLACES)
    elif kind == "groups":
        values["count"] = COUNTS
    return values


def _exchanged(scene: Scene, i: int, j: int, name: str) -> Option | None:
    """Groups i and j with one attribute exchanged; None where that changes nothing, or only which object is which."""
    a, b = scene.groups[i], scene.groups[j]
    rest = {"colour": "shape"}.get(name, "colour")
    if getattr(a, name) == getattr(b, name) or getattr(a, rest) == getattr(b, rest):
        return None
    groups = list(scene.groups)
    groups[i], groups[j] = replace(a, **{name: getattr(b, name)}), replace(b, **{name: getattr(a, name)})
    if any(group.pattern not in patterns_of(group.size) for group in groups):
        return None
    return tuple(groups), scene.relations


def _is_allowed(source: str | None, option: Option) -> bool:
    groups, relations = option
    if len({group.colour for group in groups}) < len(groups):
        return False
    count = sum(group.count for group in groups)
    if groups[0].place is None and not relations and not len(groups) < count <= MOST_OBJECTS:
        return False
    if len(relations) == 2 and relations[1] == INVERSE[relations[0]]:
        return False
    return heldout_split(groups, relations) in (None, source)
