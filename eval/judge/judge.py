"""The judge: does a picture of the shapes world show what its scene graph asks for?

It reads the scene graph and never the caption. `objects` and, of level 2, `level2.objects` find the objects; here they
are assigned to the wanted ones and each fact of the graph is checked: every object's shape, colour, size and pattern,
its place, the number of objects, the relations. Their dead zone is GenEval's (Ghosh et al. 2023, `evaluate_images.py`).
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from eval.judge import level2, objects
from eval.judge.objects import FoundObject, check_picture
from sd_mini.shapes import AnyScene
from sd_mini.shapes.level2.graph import Scene as Scene2

# in the order of reports; a kind of scenes scores all facts of the scenes of that kind, a type of fact that type alone
KINDS = ("one_object", "two_objects", "count", "groups", "chain")
CATEGORIES = (*KINDS, "number", "shape", "colour", "pattern", "size", "place", "relation", "binding", "all")
FACT_CATEGORIES = {
    1: ("colour", "size", "place", "relation"),
    2: ("number", "shape", "colour", "pattern", "size", "place", "relation"),
}
BOUND_KINDS = ("two_objects", "groups", "chain")  # of several unlike objects

# The price of a mismatch when found objects are assigned to asked ones. Where colours were exchanged the shape
# says which object is which, and where sizes were, the colour does; hence the small differences.
_MISMATCH = {"shape": 1.02, "colour": 1.01, "size": 1.0, "pattern": 0.99}
_UNLIKE = 100.0  # shares neither shape nor colour: another object, never assigned

RELATION_DEAD_ZONE = 0.1  # of the two objects' summed extents, GenEval's POSITION_THRESHOLD
RELATION_THRESHOLD = 0.5  # of the distance between the centres
PLACE_SIDES = (0.40, 0.60)  # a corner's centre lies outside these, in x and in y
PLACE_MIDDLE = (0.42, 0.58)  # the centre's lies inside these


@dataclass(frozen=True, slots=True)
class CategoryVerdict:
    """exact: every fact holds; soft: the share of facts that hold, in [0, 1]."""

    exact: bool
    soft: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """One picture's verdict.

    exact: every attribute, the exact count, nothing extra. soft: share of the facts that hold, in [0, 1].
    abstain: the picture could not be read; then nothing holds. categories: those of CATEGORIES that apply.
    """

    exact: bool
    soft: float
    abstain: bool
    categories: dict[str, CategoryVerdict]


def judge(picture: np.ndarray, scene: AnyScene) -> Verdict:
    """(3, S, S) uint8 sRGB with S >= 32, and what was asked => the verdict. Raises ValueError for other pictures."""
    return judge_found(read_picture(picture, scene.level), scene)


def read_picture(picture: np.ndarray, level: int = 1) -> list[FoundObject] | None:
    """(3, S, S) uint8 sRGB with S >= 32 => its objects, none where it cannot be read; of the scene that was asked for
    only the level is known. Raises ValueError for other pictures."""
    check_picture(picture)
    return objects.find_objects(picture) if level == 1 else level2.objects.find_objects(picture)


def judge_found(found: list[FoundObject] | None, scene: AnyScene) -> Verdict:
    """`judge` of a picture that was looked at before."""
    pairs = _assign(found, scene) if found is not None else {}
    abstain = found is None or any(not other.shape_is_clear for other in pairs.values())
    facts = _facts(scene, [] if abstain else found, {} if abstain else pairs)
    categories = {"all": _score(facts), scene.kind: _score(facts)}
    for category in FACT_CATEGORIES[scene.level]:
        chosen = [fact for fact in facts if fact[0] == category]
        if chosen:
            categories[category] = _score(chosen)
    if scene.kind in BOUND_KINDS:
        bound = not abstain and _is_bound(scene, found)
        categories["binding"] = CategoryVerdict(bound, float(bound))
    total = categories["all"]
    return Verdict(total.exact, total.soft, abstain, categories)


def _wanted(scene: AnyScene) -> list[dict[str, str]]:
    """The attributes of each object that is asked for, by name."""
    if isinstance(scene, Scene2):
        return [{"shape": g.shape, "colour": g.colour, "size": g.size, "pattern": g.pattern} for g in scene.members()]
    return [{"shape": shape, "colour": colour, "size": size} for shape, colour, size, *_ in scene.objects()]


def _assign(found: list[FoundObject], scene: AnyScene) -> dict[int, FoundObject]:
    """Index of an asked object => the found one taken for it, by the least mismatch over all (Hungarian method)."""
    if not found:
        return {}
    cost = np.array([[_mismatch(other, wanted) for other in found] for wanted in _wanted(scene)])  # (wanted, found)
    chosen = zip(*linear_sum_assignment(cost), strict=True)
    return {int(i): found[j] for i, j in chosen if cost[i, j] < _UNLIKE}


def _mismatch(other: FoundObject, wanted: dict[str, str]) -> float:
    if other.shape != wanted["shape"] and other.colour != wanted["colour"]:
        return _UNLIKE
    return sum(_MISMATCH[name] for name, value in wanted.items() if getattr(other, name) != value)


def _facts(scene: AnyScene, found: list[FoundObject], pairs: dict[int, FoundObject]) -> list[tuple[str, bool]]:
    """(type, holds) of each fact of the graph; a fact of an object that was not found does not hold."""
    # nothing missing, nothing extra; unlike objects in the right number are both
    facts = [("number", len(pairs) == len(found) == len(scene.layout))]
    for i, wanted in enumerate(_wanted(scene)):
        facts += [(name, i in pairs and getattr(pairs[i], name) == value) for name, value in wanted.items()]
    if scene.kind == "one_object":
        facts.append(("place", 0 in pairs and place_of(pairs[0]) == scene.groups[0].place))
    for i, relation in enumerate(_relations(scene)):
        both = i in pairs and i + 1 in pairs
        facts.append(("relation", both and relations_of(pairs[i], pairs[i + 1]) == {relation}))
    return facts


def _relations(scene: AnyScene) -> tuple[str, ...]:
    """Of objects 0 and 1, and of 1 and 2, as far as the graph says."""
    if isinstance(scene, Scene2):
        return scene.relations
    return () if scene.relation is None else (scene.relation,)


def _score(facts: list[tuple[str, bool]]) -> CategoryVerdict:
    holding = sum(holds for _, holds in facts)
    return CategoryVerdict(holding == len(facts), holding / len(facts))


def _is_bound(scene: AnyScene, found: list[FoundObject]) -> bool:
    wanted = _wanted(scene)
    return Counter(tuple(one.values()) for one in wanted) == Counter(
        tuple(getattr(other, name) for name in wanted[0]) for other in found
    )


def place_of(found: FoundObject) -> str | None:
    """The place of an object's centre, None in the dead zones between places."""
    low, high = PLACE_MIDDLE
    if low < found.x < high and low < found.y < high:
        return "centre"
    left, right = PLACE_SIDES
    across = "left" if found.x < left else "right" if found.x > right else None
    down = "top" if found.y < left else "bottom" if found.y > right else None
    return None if across is None or down is None else f"{down} {across}"


def relations_of(a: FoundObject, b: FoundObject) -> set[str]:
    """Which of RELATIONS hold between a and b (read: a RELATION b), as in GenEval's `relative_position`."""
    offset = np.array([a.x - b.x, a.y - b.y])
    extents = np.array([a.width + b.width, a.height + b.height])
    revised = np.maximum(np.abs(offset) - RELATION_DEAD_ZONE * extents, 0) * np.sign(offset)
    if np.all(np.abs(revised) < 1e-3):
        return set()
    dx, dy = revised / np.linalg.norm(offset)
    holds = {
        "left of": dx < -RELATION_THRESHOLD,
        "right of": dx > RELATION_THRESHOLD,
        "above": dy < -RELATION_THRESHOLD,
        "below": dy > RELATION_THRESHOLD,
    }
    return {name for name, value in holds.items() if value}


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion, Wilson 1927. Raises ValueError unless 0 <= successes <= n, n > 0."""
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"wilson: got {successes} of {n}, expected 0 <= successes <= n and n > 0: recount")
    z = 1.959963984540054
    p, z2 = successes / n, z * z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # at 0 and n one end is that proportion itself, which the sum meets only up to rounding
    return 0.0 if successes == 0 else middle - half, 1.0 if successes == n else middle + half


def summarise(verdicts: Iterable[Verdict]) -> dict[str, dict[str, float]]:
    """Verdicts => by category (those with n > 0): exact, soft, abstain in [0, 1], n pictures, and low, high.

    low and high are the 95 % Wilson interval of exact. An abstention counts as wrong.
    """
    verdicts = list(verdicts)
    summary = {}
    for category in CATEGORIES:
        of_category = [(v.categories[category], v.abstain) for v in verdicts if category in v.categories]
        n = len(of_category)
        if n == 0:
            continue
        n_exact = sum(verdict.exact for verdict, _ in of_category)
        low, high = wilson(n_exact, n)
        summary[category] = {
            "exact": n_exact / n,
            "soft": sum(verdict.soft for verdict, _ in of_category) / n,
            "abstain": sum(abstained for _, abstained in of_category) / n,
            "n": n,
            "low": low,
            "high": high,
        }
    return summary
