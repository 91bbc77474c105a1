"""One door to both levels: a scene is drawn, captioned and changed by the functions of its `level`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sd_mini.config import check_choice
from sd_mini.errors import UserError
from sd_mini.shapes.caption import captions as captions_1
from sd_mini.shapes.draw import draw_batch as draw_batch_1
from sd_mini.shapes.graph import Scene as Scene1
from sd_mini.shapes.level2.caption import captions as captions_2
from sd_mini.shapes.level2.changes import swapped as swapped_2
from sd_mini.shapes.level2.draw import draw_batch as draw_batch_2
from sd_mini.shapes.level2.graph import Scene as Scene2
from sd_mini.shapes.level2.sample import redrawn as redrawn_2
from sd_mini.shapes.level2.sample import sample_scenes as sample_scenes_2
from sd_mini.shapes.sample import redrawn as redrawn_1
from sd_mini.shapes.sample import sample_scenes as sample_scenes_1
from sd_mini.shapes.sample import swapped as swapped_1

AnyScene = Scene1 | Scene2
Level = Literal[1, 2]


@dataclass(frozen=True)
class World:
    """The functions of one level, with the signatures of those below."""

    sample_scenes: Callable
    draw_batch: Callable
    captions: Callable
    swapped: Callable
    redrawn: Callable


WORLDS = {
    1: World(sample_scenes_1, draw_batch_1, captions_1, swapped_1, redrawn_1),
    2: World(sample_scenes_2, draw_batch_2, captions_2, swapped_2, redrawn_2),
}
LEVELS = tuple(WORLDS)


def sample_scenes(
    n: int, split: str = "train", seed: int = 0, start: int = 0, kinds: Sequence[str] | None = None, level: int = 1
) -> list:
    """Scenes start to start + n - 1 of a split's endless stream: equal to `sample_scene(seed, i, ...)` for each i.

    `kinds` restricts the mix to some of the level's; heldout_relations has those with relations only. Raises UserError
    for a split, kind or level that is not one, a negative n or start, and a seed outside [0, 2**63).
    """
    check_choice("level", level, LEVELS)
    return WORLDS[level].sample_scenes(n, split, seed, start, kinds)


def sample_scene(seed: int, index: int, split: str = "train", kinds: Sequence[str] | None = None, level: int = 1):
    """Scene `index` of a split's endless stream: the same for the same arguments, on any machine."""
    return sample_scenes(1, split, seed, index, kinds, level)[0]


def draw(scene: AnyScene, resolution: int = 64) -> np.ndarray:
    """A scene => its picture, (3, resolution, resolution) uint8 sRGB; the same bits as the row of `draw_batch`."""
    return draw_batch([scene], resolution)[0]


def draw_batch(scenes: Sequence[AnyScene], resolution: int = 64) -> np.ndarray:
    """N scenes of one level => (N, 3, resolution, resolution) uint8 sRGB pictures.

    Raises UserError below 24 px and for scenes of several levels. Memory beside the result does not grow with N.
    """
    return _world_of(scenes).draw_batch(scenes, resolution)


def redrawn(scenes: Sequence[AnyScene], seed: int) -> list:
    """The graphs of one level, each with a fresh layout: a pure function of (scene, seed, its place in `scenes`)."""
    return _world_of(scenes).redrawn(scenes, seed)


def _world_of(scenes: Sequence[AnyScene]) -> World:
    levels = {scene.level for scene in scenes} or {1}
    if len(levels) > 1:
        raise UserError(f"scenes: got levels {sorted(levels)}, expected one: pass each level's apart")
    return WORLDS[levels.pop()]


def captions(scene: AnyScene) -> list[str]:
    """The scene's caption in every phrasing."""
    return WORLDS[scene.level].captions(scene)


def caption(scene: AnyScene, phrasing: int) -> str:
    """The scene's caption, lower case, in phrasing 0 to 3. Raises UserError for another phrasing.

    Scenes with the same caption have the same `canonical` graph.
    """
    every = captions(scene)
    if not 0 <= phrasing < len(every):
        raise UserError(f"phrasing: got {phrasing}, expected 0 to {len(every) - 1}: pick one of these")
    return every[phrasing]


def swapped(scene: AnyScene, rng_index: int, change: str | None = None) -> tuple:
    """A scene that differs in one thing, with a new layout, and the name of what was changed.

    A pure function of its arguments, for hard negatives and for testing the judge. Without `change` one of those that
    apply is drawn. A scene free of held-out combinations is never changed into one that has them. Raises UserError
    where `change` does not apply to the scene.
    """
    return WORLDS[scene.level].swapped(scene, rng_index, change)
