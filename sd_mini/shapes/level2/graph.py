"""The scene graph of level 2: its vocabulary, held-out combinations and rules.

Colours, places and relations are level 1's, and so is the frame: fractions of the picture's side, y down.
"""

import math
from dataclasses import asdict, dataclass, fields
from typing import ClassVar

from sd_mini.config import check_choice
from sd_mini.errors import UserError
from sd_mini.shapes.graph import COLOURS, INVERSE, MARGIN, MAX_SLANT, PLACES, RELATIONS
from sd_mini.shapes.level2.outlines import SHAPES, extent, safe_depth

# radius ranges, with gaps between them that the judge reads as none; three medium objects fit side by side
SIZES = {"small": (0.092, 0.102), "medium": (0.130, 0.140), "large": (0.180, 0.195)}
PATTERNS = ("plain", "striped", "dotted")
PLAIN_ONLY = "small"  # the size whose objects are too small for a pattern
KINDS = ("one_object", "two_objects", "groups", "chain")
RELATED = ("two_objects", "chain")  # have relations
KIND_SIZES = {
    "one_object": ("small", "medium", "large"),
    "two_objects": ("small", "medium", "large"),
    "groups": ("small", "medium"),
    "chain": ("small", "medium"),
}
COUNTS = (1, 2, 3)  # of a group in a scene of groups
GROUPS = (2, 3)
MOST_OBJECTS = 6

BACKGROUNDS = ("plain", "gradient", "noisy")
# tones of the paper, all of L* 90 or more, so that a pale band of any colour lies at least 20 units of CIELAB away
TONES = {
    "white": (245, 245, 245),
    "grey": (228, 228, 228),
    "blue": (222, 232, 246),
    "green": (224, 240, 224),
    "rose": (246, 228, 230),
    "cream": (246, 238, 220),
}

GAP = 0.05  # least distance between two objects' circles, where they do not overlap

# each colour once, so that a colour has five shapes to be trained with; the first six are level 1's
HELDOUT_PAIRS = frozenset({
    ("red", "cross"), ("yellow", "triangle"), ("green", "circle"), ("blue", "square"),
    ("pink", "triangle"), ("black", "cross"), ("orange", "diamond"), ("brown", "bar"),
})  # fmt: skip
# each spelt with "left of" or "above"; the first six are level 1's
HELDOUT_RELATIONS = frozenset({
    ("circle", "left of", "triangle"), ("square", "left of", "circle"), ("cross", "left of", "square"),
    ("triangle", "above", "circle"), ("square", "above", "cross"), ("cross", "above", "triangle"),
    ("diamond", "left of", "bar"), ("bar", "left of", "cross"), ("triangle", "left of", "diamond"),
    ("bar", "above", "diamond"), ("circle", "above", "bar"), ("diamond", "above", "square"),
})  # fmt: skip

_TOLERANCE = 1e-9  # for layouts that went through JSON or a float sum


@dataclass(frozen=True, slots=True)
class Group:
    """`count` like objects. `place` is set in `one_object` scenes only."""

    shape: str
    colour: str
    size: str = "medium"
    pattern: str = "plain"
    count: int = 1
    place: str | None = None


@dataclass(frozen=True, slots=True)
class Background:
    """What lies behind the objects; captions do not name it.

    tone: the paper's, and in a gradient the one at its start; second: the one at its end, `angle` in radians from the
    x axis. grain: the seed of a noisy background's grain.
    """

    kind: str = "plain"
    tone: str = "white"
    second: str = "white"
    angle: float = 0.0
    grain: int = 0


@dataclass(frozen=True, slots=True)
class Scene:
    """A scene graph of level 2, and how it is drawn.

    relations[i] reads groups[i] RELATION groups[i + 1]: one in `two_objects`, two in `chain`, else none. `layout` holds
    (x, y, radius) of each object, groups in order. `top`: the object that lies over its neighbour, where two overlap.
    """

    level: ClassVar[int] = 2

    kind: str
    groups: tuple[Group, ...]
    relations: tuple[str, ...]
    layout: tuple[tuple[float, float, float], ...]
    background: Background = Background()
    top: int | None = None

    def members(self) -> list[Group]:
        """Each object's group, in the order of `layout`."""
        return [group for group in self.groups for _ in range(group.count)]

    def canonical(self) -> tuple:
        """The graph alone: one value for every order of groups, and for both directions of a chain of relations."""
        if self.kind == "groups":
            return self.kind, tuple(sorted(self.groups, key=repr)), ()
        turned = self.groups[::-1], tuple(INVERSE[relation] for relation in self.relations[::-1])
        return self.kind, *min((self.groups, self.relations), turned, key=repr)

    def to_dict(self) -> dict:
        """Plain JSON types; `from_dict` gives the scene back."""
        return {
            "level": self.level,
            "kind": self.kind,
            "groups": [asdict(group) for group in self.groups],
            "relations": list(self.relations),
            "layout": [list(where) for where in self.layout],
            "background": asdict(self.background),
            "top": self.top,
        }

    @classmethod
    def from_dict(cls, values: dict) -> "Scene":
        """The inverse of `to_dict`. Raises UserError for other keys and for a scene against the rules."""
        names = {"level", *(field.name for field in fields(cls))}
        if not isinstance(values, dict) or set(values) != names or values["level"] != cls.level:
            raise UserError(f"scene: got {values!r:.80}, expected level 2 and the keys {sorted(names)}: mend the keys")
        try:
            groups = tuple(Group(**group) for group in values["groups"])
            layout = tuple((float(x), float(y), float(radius)) for x, y, radius in values["layout"])
            background = Background(**values["background"])
        except (TypeError, ValueError) as error:
            raise UserError(f"scene: {error}; expected groups, layout and background as of Scene.to_dict") from error
        scene = cls(values["kind"], groups, tuple(values["relations"]), layout, background, values["top"])
        check_scene(scene)
        return scene


def heldout_split(groups: tuple[Group, ...], relations: tuple[str, ...]) -> str | None:
    """The held-out split a graph belongs to, "both" where it has an unseen pair and an unseen relation, or None."""
    pair = any((group.colour, group.shape) in HELDOUT_PAIRS for group in groups)
    fact = any(
        is_heldout(a.shape, relation, b.shape) for a, relation, b in zip(groups, relations, groups[1:], strict=False)
    )
    if pair and fact:
        return "both"
    return "heldout_pairs" if pair else "heldout_relations" if fact else None


def is_heldout(shape_a: str, relation: str, shape_b: str) -> bool:
    """Whether "shape_a RELATION shape_b" is a held-out fact, in either spelling."""
    spellings = {(shape_a, relation, shape_b), (shape_b, INVERSE[relation], shape_a)}
    return not spellings.isdisjoint(HELDOUT_RELATIONS)


def check_scene(scene: Scene) -> None:
    """Raises UserError where a scene breaks the world's rules: an unknown word, or a layout that belies its graph."""
    check_choice("kind", scene.kind, KINDS)
    numbers = {"one_object": (1,), "two_objects": (2,), "groups": GROUPS, "chain": (3,)}[scene.kind]
    check_choice(f"number of groups of a {scene.kind} scene", len(scene.groups), numbers)
    for group in scene.groups:
        check_choice("shape", group.shape, SHAPES)
        check_choice("colour", group.colour, COLOURS)
        check_choice(f"size of a {scene.kind} scene", group.size, KIND_SIZES[scene.kind])
        check_choice(f"pattern of a {group.size} object", group.pattern, patterns_of(group.size))
        check_choice(f"count of a {scene.kind} scene", group.count, COUNTS if scene.kind == "groups" else (1,))
        check_choice(f"place of a {scene.kind} scene", group.place, PLACES if scene.kind == "one_object" else (None,))
    if len({group.colour for group in scene.groups}) < len(scene.groups):
        raise UserError(f"colours: got {[g.colour for g in scene.groups]}, groups differ in colour: change one")
    count = len(scene.members())
    if scene.kind == "groups" and not len(scene.groups) < count <= MOST_OBJECTS:
        raise UserError(
            f"objects: got {count}, expected more than the {len(scene.groups)} groups and at most {MOST_OBJECTS}: "
            "change the counts"
        )
    _check_relations(scene)
    check_choice("background", scene.background.kind, BACKGROUNDS)
    for tone in (scene.background.tone, scene.background.second):
        check_choice("tone of the background", tone, TONES)
    _check_layout(scene)


def patterns_of(size: str) -> tuple[str, ...]:
    """The patterns that an object of a size may have."""
    return PATTERNS[:1] if size == PLAIN_ONLY else PATTERNS


def _check_relations(scene: Scene) -> None:
    expected = len(scene.groups) - 1 if scene.kind in RELATED else 0
    if len(scene.relations) != expected:
        raise UserError(f"relations: got {scene.relations}, a {scene.kind} scene has {expected}: mend the list")
    for relation in scene.relations:
        check_choice("relation", relation, RELATIONS)
    if len(scene.relations) == 2 and scene.relations[1] == INVERSE[scene.relations[0]]:
        raise UserError(f"relations: got {scene.relations}, which leave two objects on one side: change one")


def _check_layout(scene: Scene) -> None:
    """Each object inside the picture and of its size, gaps between them, the place or relations true with a margin."""
    members = scene.members()
    if len(scene.layout) != len(members) or not all(math.isfinite(value) for where in scene.layout for value in where):
        raise UserError(f"layout: got {scene.layout}, expected {len(members)} finite (x, y, radius): one an object")
    for group, (x, y, radius) in zip(members, scene.layout, strict=True):
        low, high = SIZES[group.size]
        if not low - _TOLERANCE <= radius <= high + _TOLERANCE:
            raise UserError(f"layout: got radius {radius} for a {group.size} object, expected {low} to {high}: resize")
        if min(x, y, 1 - x, 1 - y) < MARGIN + radius - _TOLERANCE:
            raise UserError(f"layout: got ({x}, {y}, {radius}), expected {MARGIN} free to each edge: move it inwards")
    for i, (xa, ya, ra) in enumerate(scene.layout):
        for xb, yb, rb in scene.layout[:i]:
            if scene.top is None and math.hypot(xa - xb, ya - yb) < ra + rb + GAP - _TOLERANCE:
                raise UserError(f"layout: objects at {(xb, yb)} and {(xa, ya)} lack a gap of {GAP}: move them apart")
    if scene.top is not None:
        _check_overlap(scene)
    for i, relation in enumerate(scene.relations):
        if not _relation_is_clear(relation, scene.layout[i], scene.layout[i + 1]):
            raise UserError(f"layout: {scene.layout} does not clearly show {relation!r}: move them or restate")
    if scene.kind == "one_object":
        ranges = PLACES[scene.groups[0].place or ""]
        values = zip(scene.layout[0][:2], ranges, strict=True)
        if not all(low - _TOLERANCE <= value <= high + _TOLERANCE for value, (low, high) in values):
            raise UserError(
                f"layout: {scene.layout[0][:2]} is not {scene.groups[0].place!r}: move the object or restate"
            )


def _check_overlap(scene: Scene) -> None:
    if scene.kind != "two_objects" or scene.top not in (0, 1) or any(g.size == "small" for g in scene.groups):
        raise UserError(
            f"top: got {scene.top}, expected None, or 0 or 1 of two objects that are not small: leave it out"
        )
    a, b = scene.groups
    depth = overlap_depth(a.shape, b.shape, scene.relations[0], scene.layout)
    lower, side = covered_side(scene.groups, scene.relations[0], scene.top)
    radius = scene.layout[1 - scene.top][2]
    if depth > safe_depth(lower.shape, side) * radius + _TOLERANCE:
        raise UserError(f"layout: {scene.layout} hides more than a fifth of the lower object: move them apart")


def covered_side(groups: tuple[Group, ...], relation: str, top: int) -> tuple[Group, str]:
    """Of two groups, groups[0] RELATION groups[1], the one that lies below, and its side that the other covers."""
    return (groups[1], relation) if top == 0 else (groups[0], INVERSE[relation])


def overlap_depth(shape_a: str, shape_b: str, relation: str, layout: tuple) -> float:
    """How far two outlines' extents reach into each other along the axis of `relation` (a RELATION b); below 0 none."""
    (xa, ya, ra), (xb, yb, rb) = layout
    distance = abs(xa - xb) if relation in ("left of", "right of") else abs(ya - yb)
    return extent(shape_a, INVERSE[relation]) * ra + extent(shape_b, relation) * rb - distance


def _relation_is_clear(relation: str, a: tuple[float, float, float], b: tuple[float, float, float]) -> bool:
    along, across = (b[0] - a[0], b[1] - a[1]) if relation in ("left of", "right of") else (b[1] - a[1], b[0] - a[0])
    if relation in ("right of", "below"):
        along = -along
    return along > 0 and abs(across) <= MAX_SLANT * along + _TOLERANCE
