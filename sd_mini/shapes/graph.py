"""The scene graph of the shapes world: its vocabulary, palette, rules and held-out combinations.

Coordinates are fractions of the picture's side: x to the right, y down, (0, 0) the top left corner.
A layout's radius is that of the circle an object's outline fits in; `shapes_draw` documents each outline.
"""

import math
from dataclasses import asdict, dataclass, fields
from typing import ClassVar

import numpy as np

from sd_mini.config import check_choice
from sd_mini.errors import UserError

SHAPES = ("circle", "square", "triangle", "cross")
# Chosen so that no mixture of a colour with the background, which is what an anti-aliased edge is,
# comes within 37 units of CIELAB of a third colour: an edge cannot be taken for another object.
COLOURS = {
    "red": (215, 30, 35),
    "orange": (250, 140, 0),
    "yellow": (250, 220, 0),
    "green": (20, 150, 50),
    "blue": (30, 70, 215),
    "pink": (255, 105, 190),
    "brown": (115, 65, 25),
    "black": (15, 15, 15),
}
BACKGROUND = (245, 245, 245)
# radius ranges; the smallest large outline (a triangle) still covers more than the largest small one (a circle)
SIZES = {"small": (0.095, 0.115), "large": (0.17, 0.20)}
# range of the centre's (x, y), before the object is moved inside the margin
PLACES = {
    "top left": ((0.0, 0.33), (0.0, 0.33)),
    "top right": ((0.67, 1.0), (0.0, 0.33)),
    "bottom left": ((0.0, 0.33), (0.67, 1.0)),
    "bottom right": ((0.67, 1.0), (0.67, 1.0)),
    "centre": ((0.46, 0.54), (0.46, 0.54)),
}
RELATIONS = ("left of", "right of", "above", "below")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
KINDS = ("one_object", "two_objects", "count")
COUNTS = (2, 3, 4)
SPLITS = ("train", "test", "heldout_pairs", "heldout_relations")

MARGIN = 0.03  # least distance from an object's circle to the picture's edge
GAP = 0.05  # least distance between two objects' circles: more than a pixel from 24 px up
MAX_SLANT = 0.35  # of two related objects: offset across the relation's axis / offset along it

HELDOUT_PAIRS = frozenset({
    ("red", "cross"), ("yellow", "triangle"), ("green", "circle"),
    ("blue", "square"), ("pink", "triangle"), ("black", "cross"),
})  # fmt: skip
# each spelt with "left of" or "above"; the inverse spelling is the same fact
HELDOUT_RELATIONS = frozenset({
    ("circle", "left of", "triangle"), ("square", "left of", "circle"), ("cross", "left of", "square"),
    ("triangle", "above", "circle"), ("square", "above", "cross"), ("cross", "above", "triangle"),
})  # fmt: skip

_LAYOUT_TOLERANCE = 1e-9  # for layouts that went through JSON or a float sum


def lab(rgb: np.ndarray) -> np.ndarray:
    """(..., 3) sRGB in [0, 255] => (..., 3) float64 CIELAB, white point D65: L* in [0, 100], a*, b* near [-128, 128].

    IEC 61966-2-1 for sRGB => XYZ, CIE 15:2004 for XYZ => L*a*b*. A unit of distance is about a just visible difference.
    """
    srgb = np.asarray(rgb, dtype=np.float64) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
                       [0.0193339, 0.1191920, 0.9503041]])  # fmt: skip
    xyz = linear @ (to_xyz / to_xyz.sum(axis=1, keepdims=True)).T  # relative to the white point
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


@dataclass(frozen=True, slots=True)
class Group:
    """`count` like objects: what a caption says of them. `place` is set in `one_object` scenes only."""

    shape: str
    colour: str
    size: str
    count: int = 1
    place: str | None = None


@dataclass(frozen=True, slots=True)
class Scene:
    """A scene graph and where its objects are.

    `relation` reads groups[0] RELATION groups[1]. `layout` holds (x, y, radius) of each object in fractions
    of the picture's side, groups in order. The constructor does not check; `check_scene` and `from_dict` do.
    """

    level: ClassVar[int] = 1

    kind: str
    groups: tuple[Group, ...]
    relation: str | None
    layout: tuple[tuple[float, float, float], ...]

    def objects(self) -> list[tuple[str, str, str, float, float, float]]:
        """(shape, colour, size, x, y, radius) of each object, in the order of `layout`."""
        members = [group for group in self.groups for _ in range(group.count)]
        return [(g.shape, g.colour, g.size, *where) for g, where in zip(members, self.layout, strict=True)]

    def canonical(self) -> tuple:
        """The graph without its layout, one value for both spellings of a relation ("a above b", "b below a")."""
        if self.relation in ("right of", "below"):
            return self.kind, self.groups[::-1], INVERSE[self.relation]
        return self.kind, self.groups, self.relation

    def to_dict(self) -> dict:
        """Plain JSON types; `from_dict` gives the scene back."""
        groups = [asdict(group) for group in self.groups]
        layout = [list(where) for where in self.layout]
        return {"kind": self.kind, "groups": groups, "relation": self.relation, "layout": layout}

    @classmethod
    def from_dict(cls, values: dict) -> "Scene":
        """The inverse of `to_dict`. Raises ValueError for unknown or missing keys and for a scene against the rules."""
        _check_keys(values, cls, "scene")
        for name in ("groups", "layout"):
            if not isinstance(values[name], list | tuple):
                raise UserError(f"{name}: got {values[name]!r}, expected a list: see Scene.to_dict")
        for group in values["groups"]:
            _check_keys(group, Group, "group")
        groups = tuple(Group(**group) for group in values["groups"])
        layout = tuple(tuple(where) if isinstance(where, list) else where for where in values["layout"])
        scene = cls(values["kind"], groups, values["relation"], layout)
        check_scene(scene)
        return scene


def _check_keys(values: dict, of: type[Scene] | type[Group], name: str) -> None:
    expected = {field.name for field in fields(of)}
    if not isinstance(values, dict) or set(values) != expected:
        given = sorted(values) if isinstance(values, dict) else type(values).__name__
        raise UserError(f"{name}: got {given}, expected the keys {sorted(expected)}: add or remove keys to match")


def check_scene(scene: Scene) -> None:
    """Raises ValueError where a scene breaks the world's rules: an unknown word, or a layout that belies its graph."""
    check_choice("kind", scene.kind, KINDS)
    expected_groups = 2 if scene.kind == "two_objects" else 1
    if len(scene.groups) != expected_groups:
        raise UserError(f"groups: got {len(scene.groups)}, a {scene.kind} scene has {expected_groups}: mend the list")
    for group in scene.groups:
        check_choice("shape", group.shape, SHAPES)
        check_choice("colour", group.colour, COLOURS)
        check_choice("size", group.size, SIZES)
        check_choice(f"count of a {scene.kind} scene", group.count, COUNTS if scene.kind == "count" else (1,))
        check_choice(f"place of a {scene.kind} scene", group.place, PLACES if scene.kind == "one_object" else (None,))
    allowed_relations = RELATIONS if scene.kind == "two_objects" else (None,)
    check_choice(f"relation of a {scene.kind} scene", scene.relation, allowed_relations)
    if scene.kind == "two_objects" and scene.groups[0].colour == scene.groups[1].colour:
        raise UserError(f"colours: got {scene.groups[0].colour!r} twice, two objects differ in colour: change one")
    _check_layout(scene)


def _check_layout(scene: Scene) -> None:
    """Each object inside the picture and of its size, gaps between them, the place or relation true with a margin."""
    n_objects = sum(group.count for group in scene.groups)
    if len(scene.layout) != n_objects or not all(map(_is_finite_triple, scene.layout)):
        raise UserError(f"layout: got {scene.layout}, expected {n_objects} finite (x, y, radius): one for each object")
    for _, _, size, x, y, radius in scene.objects():
        low, high = SIZES[size]
        if not low - _LAYOUT_TOLERANCE <= radius <= high + _LAYOUT_TOLERANCE:
            raise UserError(f"layout: got radius {radius} for a {size} object, expected {low} to {high}: resize it")
        if min(x, y, 1 - x, 1 - y) < MARGIN + radius - _LAYOUT_TOLERANCE:
            raise UserError(f"layout: got ({x}, {y}, {radius}), expected {MARGIN} free to each edge: move it inwards")
    for i, (xa, ya, ra) in enumerate(scene.layout):
        for xb, yb, rb in scene.layout[:i]:
            if math.hypot(xa - xb, ya - yb) < ra + rb + GAP - _LAYOUT_TOLERANCE:
                raise UserError(f"layout: objects at {(xb, yb)} and {(xa, ya)} lack a gap of {GAP}: move them apart")
    if scene.relation is not None and not _relation_is_clear(scene):
        raise UserError(f"layout: {scene.layout} does not clearly show {scene.relation!r}: move them or restate")
    if scene.kind == "one_object" and not _place_is_clear(scene):
        raise UserError(f"layout: {scene.layout[0][:2]} is not {scene.groups[0].place!r}: move the object or restate")


def _is_finite_triple(where: object) -> bool:
    is_triple = isinstance(where, tuple) and len(where) == 3
    return is_triple and all(isinstance(value, int | float) and math.isfinite(value) for value in where)


def _relation_is_clear(scene: Scene) -> bool:
    (xa, ya, _), (xb, yb, _) = scene.layout
    along, across = (xb - xa, yb - ya) if scene.relation in ("left of", "right of") else (yb - ya, xb - xa)
    if scene.relation in ("right of", "below"):
        along = -along
    return along > 0 and abs(across) <= MAX_SLANT * along + _LAYOUT_TOLERANCE


def _place_is_clear(scene: Scene) -> bool:
    place = scene.groups[0].place
    assert place is not None  # of one object
    ranges = PLACES[place]
    return all(
        low - _LAYOUT_TOLERANCE <= value <= high + _LAYOUT_TOLERANCE
        for value, (low, high) in zip(scene.layout[0][:2], ranges, strict=True)
    )


def heldout_split(groups: tuple[Group, ...], relation: str | None) -> str | None:
    """The held-out split a graph belongs to, "both" where it has an unseen pair and an unseen relation, or None."""
    pair = any((group.colour, group.shape) in HELDOUT_PAIRS for group in groups)
    fact = False
    if relation is not None:
        shape_a, shape_b = groups[0].shape, groups[1].shape
        spellings = {(shape_a, relation, shape_b), (shape_b, INVERSE[relation], shape_a)}
        fact = not spellings.isdisjoint(HELDOUT_RELATIONS)
    if pair and fact:
        return "both"
    return "heldout_pairs" if pair else "heldout_relations" if fact else None
