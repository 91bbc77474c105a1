"""Captions: a scene graph => English in several phrasings, every attribute of the graph named."""

from sd_mini.shapes.graph import INVERSE, Group, Scene

# {a}, {b}: "a small red circle"; {rel}: "to the left of"; {inv}: its inverse; {place}: "top left";
# {n}: "three"; {many}: "small red circles"
PHRASINGS: dict[str, tuple[str, ...]] = {
    "one_object": (
        "{a} in the {place}",
        "in the {place} is {a}",
        "there is {a} in the {place}",
        "a picture of {a} in the {place}",
    ),
    "two_objects": (
        "{a} {rel} {b}",
        "{b} {inv} {a}",
        "{rel} {b} is {a}",
        "there is {a} {rel} {b}",
    ),
    "count": (
        "{n} {many}",
        "there are {n} {many}",
        "a picture of {n} {many}",
        "exactly {n} {many}",
    ),
}
SPOKEN = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}
_NUMBERS = {2: "two", 3: "three", 4: "four"}
_PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}


def captions(scene: Scene) -> list[str]:
    """The scene's caption, lower case, in every phrasing, in the order of PHRASINGS (four of each kind)."""
    return [_caption(scene, template) for template in PHRASINGS[scene.kind]]


def _caption(scene: Scene, template: str) -> str:
    group = scene.groups[0]
    if scene.kind == "one_object":
        return template.format(a=_one(group), place=group.place)
    if scene.kind == "count":
        many = f"{group.size} {group.colour} {_PLURALS[group.shape]}"
        return template.format(n=_NUMBERS[group.count], many=many)
    relation = scene.relation
    assert relation is not None  # of two objects, by check_scene
    return template.format(a=_one(group), b=_one(scene.groups[1]), rel=SPOKEN[relation], inv=SPOKEN[INVERSE[relation]])


def _one(group: Group) -> str:
    return f"a {group.size} {group.colour} {group.shape}"  # the size leads, so the article is always "a"
