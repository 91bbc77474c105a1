"""Captions of level 2: a scene graph => English in several phrasings. "medium" and "plain" are not named."""

from sd_mini.shapes.caption import PHRASINGS as PHRASINGS_1
from sd_mini.shapes.caption import SPOKEN
from sd_mini.shapes.graph import INVERSE
from sd_mini.shapes.level2.graph import Group, Scene

# {a}, {b}, {c}: "a small striped red circle"; {rel}, {rel2}: "to the left of"; {inv}, {inv2}: their inverses;
# {place}: "top left"; {list}: "two red circles and one blue square"; {tsil}: the same from its end
PHRASINGS: dict[str, tuple[str, ...]] = {
    "one_object": PHRASINGS_1["one_object"],
    "two_objects": PHRASINGS_1["two_objects"],
    "groups": (
        "{list}",
        "a drawing with {tsil}",
        "a picture of {list}",
        "exactly {tsil}",
    ),
    "chain": (
        "{a} {rel} {b}, which is {rel2} {c}",
        "{c} {inv2} {b}, which is {inv} {a}",
        "{b} is {inv} {a} and {rel2} {c}",
        "there is {b} {rel2} {c} and {inv} {a}",
    ),
}
_NUMBERS = {1: "one", 2: "two", 3: "three"}
_PLURALS = {"cross": "crosses"}


def captions(scene: Scene) -> list[str]:
    """The scene's caption, lower case, in every phrasing, in the order of PHRASINGS (four of each kind)."""
    words: dict[str, str | None] = {}
    if scene.kind == "groups":
        counted = [f"{_NUMBERS[group.count]} {_noun(group)}" for group in scene.groups]
        words |= {"list": _joined(counted), "tsil": _joined(counted[::-1])}
    else:
        words |= dict(zip("abc", map(_one, scene.groups), strict=False)) | {"place": scene.groups[0].place}
    for number, relation in zip(("", "2"), scene.relations, strict=False):
        words |= {f"rel{number}": SPOKEN[relation], f"inv{number}": SPOKEN[INVERSE[relation]]}
    return [template.format(**words) for template in PHRASINGS[scene.kind]]


def _noun(group: Group) -> str:
    """ "small striped red circles"."""
    named = [group.size] if group.size != "medium" else []
    named += [group.pattern] if group.pattern != "plain" else []
    shape = group.shape if group.count == 1 else _PLURALS.get(group.shape, f"{group.shape}s")
    return " ".join([*named, group.colour, shape])


def _one(group: Group) -> str:
    noun = _noun(group)
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _joined(items: list[str]) -> str:
    return f"{', '.join(items[:-1])} and {items[-1]}"
