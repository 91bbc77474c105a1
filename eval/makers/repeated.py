"""Several pictures of each prompt, beside real pictures of the same caption: what diversity is measured on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sd_mini import shapes
from sd_mini.data.arrays import Pictures, taken

REPEATED = "several"  # the name of their pictures
PROMPTS, EACH = 32, 8
_KINDS = {  # of the shapes' scenes, in turn, by level
    1: ("count", "one_object", "count", "two_objects"),
    2: ("groups", "one_object", "chain", "two_objects"),
}
_MOST_ROWS = 100_000  # of other data, among which pictures of the same or the nearest captions are looked for
_FEWEST = 4  # pictures of one prompt in a folder
_SEED = 700_000_000  # added to the scenes' seed, for the drawings of the same captions


@dataclass(frozen=True, eq=False)
class Repeated:
    """N pictures in all. `captions`: each prompt as often as there are pictures of it, side by side; `real` (N, 3, R,
    R) uint8: as many real pictures of the same, `source` says which; `scenes`: of shapes, what is asked for."""

    captions: list[str]
    real: Pictures
    source: str
    scenes: list[shapes.AnyScene] | None = None


def repeated_shapes(seed: int, resolution: int, prompts: int | None = None, level: int = 1) -> Repeated:
    """PROMPTS captions of the test split, or `prompts` where that is less, EACH times, beside fresh drawings of the
    same scene graphs. Of level 1 half of them ask for two or three like objects, of level 2 a quarter for groups: their
    layouts are counted."""
    kinds = {kind: iter(_scenes_of(kind, seed, level)) for kind in sorted(set(_KINDS[level]))}
    asked: dict[str, shapes.AnyScene] = {}
    while len(asked) < min(PROMPTS, prompts or PROMPTS):
        caption, scene = next(kinds[_KINDS[level][len(asked) % len(_KINDS[level])]])
        asked.setdefault(caption, scene)
    return of_scenes([caption for caption in asked for _ in range(EACH)], asked, seed, resolution)


def _scenes_of(kind: str, seed: int, level: int) -> Iterator[tuple[str, shapes.AnyScene]]:
    for i, scene in enumerate(shapes.sample_scenes(8 * PROMPTS, "test", seed, kinds=[kind], level=level)):
        if kind != "count" or scene.groups[0].count < 4:  # four fill the four quarters in one way alone
            every = shapes.captions(scene)
            yield every[i % len(every)], scene


def of_scenes(captions: list[str], scenes: dict[str, shapes.AnyScene], seed: int, resolution: int) -> Repeated:
    """`captions`, side by side where they repeat, each with its scene."""
    rows = [scenes[caption] for caption in captions]
    real = shapes.draw_batch(shapes.redrawn(rows, seed + _SEED), resolution)
    return Repeated(captions, real, "fresh drawings of the same captions", rows)


def repeated_captions(
    rows: Iterable[int], captions: Sequence[str], pictures: Pictures, prompts: int = PROMPTS
) -> Repeated | None:
    """The first `prompts` different captions of `rows`, EACH times, beside as many pictures of the same caption, or,
    where a caption has fewer, of those nearest to it in words. None of fewer than EACH pictures."""
    asked = list(dict.fromkeys(captions[row] for row in rows))[:prompts]
    return of_captions([caption for caption in asked for _ in range(EACH)], captions, pictures)


def of_captions(asked: list[str], captions: Sequence[str], pictures: Pictures) -> Repeated | None:
    """`asked`, side by side where they repeat, beside the pictures of the nearest of the first `captions`. None where
    there are fewer than one prompt has pictures."""
    if len(captions) < max(Counter(asked).values()):
        return None
    words = [set(caption.lower().split()) for caption in captions[:_MOST_ROWS]]
    chosen, is_same = [], True
    for caption, count in Counter(asked).items():
        own = set(caption.lower().split())
        # Jaccard's similarity of the sets of words; of equal ones the first row
        near = np.array([len(own & other) / max(len(own | other), 1) for other in words])
        rows = np.argsort(-near, kind="stable")[:count].tolist()
        is_same &= all(captions[row] == caption for row in rows)
        chosen += rows
    source = "pictures of the same captions" if is_same else "pictures of the same or the nearest captions, by words"
    return Repeated(asked, taken(pictures, chosen), source)


def several_of_each(prompts: Sequence[str]) -> list[int]:
    """Which pictures of a folder are compared with each other: of each of the first prompts that have at least _FEWEST,
    as two scenes may have one caption by chance, the first EACH, side by side; of PROMPTS prompts at most."""
    rows: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    several = [own[:EACH] for own in rows.values() if len(own) >= _FEWEST]
    return [row for own in several[:PROMPTS] for row in own]
