"""What is asked of a pipeline, and what its pictures are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from eval.data_options import SHAPES, recorded_data
from eval.makers.repeated import Repeated, of_captions, of_scenes, repeated_captions, repeated_shapes, several_of_each
from eval.metrics.reconstruction import FIRST_SCENE_SEED, PROMPTS
from sd_mini import shapes
from sd_mini.data.arrays import Pictures, taken
from sd_mini.data.captioned import CaptionedPictures, DataConfig, load
from sd_mini.errors import UserError
from sd_mini.files import CONTRACT
from sd_mini.stages.contract import kind_of, read_contract
from sd_mini.texts import shown

REFERENCE = 1000  # true drawings of other scenes, which the pictures of the test split are compared with
_FURTHER_SCENES = 500_000_000  # added to the scenes' seed, for those of the reference
_GOLDEN = (5**0.5 - 1) / 2
MOST = 500  # captions of other data that are asked for when nothing else is said


@dataclass(frozen=True, eq=False)
class PromptSet:
    """N prompts of a split, and what is known of them: the true pictures (N, 3, R, R) uint8, their scenes, and which
    rows of the data they are, or which pictures of a folder."""

    split: str
    captions: list[str]
    pictures: np.ndarray | None = None
    scenes: list[shapes.AnyScene] | None = None
    rows: list[int] | None = None


@dataclass(frozen=True, eq=False)
class Question:
    """All that is asked. The first split's pictures are compared with `reference`, (M, 3, R, R) uint8.

    is_apart: whether the reference holds none of the asked rows, so that those say how far real sets lie apart.
    name, fingerprint: of the data that the reference comes from. reference_captions: of each of its pictures the first
    one, where data other than shapes have them. repeated: several pictures of each of some prompts.
    """

    splits: list[PromptSet]
    reference: Pictures
    is_apart: bool
    name: str
    fingerprint: str
    reference_captions: list[str] | None = None
    repeated: Repeated | None = None


def shapes_question(
    prompts: int | None, seed: int, resolution: int, most: int | None = None, level: shapes.Level = 1
) -> Question:
    """The three splits training has not seen: PROMPTS each, or `prompts`; each phrasing in turn. `most`: pictures of
    the reference, REFERENCE if not given."""
    splits = [
        PromptSet(split, captions, shapes.draw_batch(scenes, resolution), scenes)
        for split, captions, scenes in shapes_prompts(prompts, seed, level)
    ]
    further = DataConfig(
        split=splits[0].split,
        count=REFERENCE if most is None else most,
        seed=FIRST_SCENE_SEED + seed + _FURTHER_SCENES,
        resolution=resolution,
        level=level,
    )
    reference = load(further)
    repeated = repeated_shapes(FIRST_SCENE_SEED + seed, resolution, prompts, level)
    return Question(splits, reference.pictures, True, reference.name, reference.fingerprint, repeated=repeated)


def shapes_prompts(prompts: int | None, seed: int, level: int) -> list[tuple[str, list[str], list[shapes.AnyScene]]]:
    """Name, captions and scenes of each of the three splits."""
    found = []
    for split, usual in PROMPTS.items():
        count = usual if prompts is None else prompts
        scenes = shapes.sample_scenes(count, split, FIRST_SCENE_SEED + seed, level=level)
        every = [shapes.captions(scene) for scene in scenes]
        found.append((split, [own[i % len(own)] for i, own in enumerate(every)], scenes))
    return found


def captions_question(
    data: DataConfig, prompts: int | None, most: int | None = None, folder: Path | None = None
) -> Question:
    """Captions of other data, and true pictures to compare with, both from all of its rows, however those are sorted.

    PromptSet are the captions of half of the rows, MOST at most, or of `prompts`: one row of each of so many equal
    stretches, always the same, in an order whose first few (a sweep's, a gallery's) are of the whole, too. The
    reference is the other rows, or `most` of them, chosen alike; where fewer than two are left, it is chosen from all
    rows.

    `folder` takes the cache of decoded pictures. Raises UserError for what `data` cannot be read as, pictures without
    captions, and fewer rows than `prompts`.
    """
    rows = load(data, folder=folder)
    captions = [several[0] for several in rows.captions if several]
    if not captions:
        raise UserError(f"--data {data.source}: its pictures have no captions; give --text_column")
    if prompts is not None and prompts > len(captions):
        raise UserError(f"--prompts {prompts}: {data.source} has {len(captions)} in split {data.split}; ask for fewer")
    count = min(max(len(captions) // 2, 1), MOST) if prompts is None else prompts
    chosen = _spread(len(captions), count)
    chosen = [chosen[i] for i in sorted(range(count), key=lambda i: (i * _GOLDEN) % 1)]
    asked = PromptSet(data.split, [captions[row] for row in chosen], rows.pictures[chosen], rows=chosen)
    is_apart = len(captions) - count >= 2
    others = sorted(set(range(len(captions))) - set(chosen)) if is_apart else range(len(captions))
    compared = _compared(others, most)
    pictures = rows.pictures if len(compared) == len(rows) else taken(rows.pictures, compared)
    names = [captions[row] for row in compared]
    repeated = repeated_captions(chosen, captions, rows.pictures)
    return Question([asked], pictures, is_apart, rows.name, rows.fingerprint, names, repeated)


def folder_question(
    data: DataConfig, prompts: list[str], seed: int, most: int | None = None, folder: Path | None = None
) -> Question:
    """Pictures that lie there, compared with all of `data`, or `most` of it, evenly spread. Where they are asked what
    the shapes' test split asks, the judge knows their scenes. Prompts with several pictures are `repeated`."""
    if data.source == SHAPES:
        return _shapes_folder(data, prompts, seed, most)
    rows = load(data, pictures_only=True, folder=folder)
    reference = taken(rows.pictures, _compared(range(len(rows)), most))
    captions = [several[0] for several in rows.captions if several]
    several = several_of_each(prompts)
    has_both = several and len(captions) == len(rows)
    repeated = of_captions([prompts[row] for row in several], captions, rows.pictures) if has_both else None
    return Question([PromptSet(data.split, prompts)], reference, True, rows.name, rows.fingerprint, repeated=repeated)


def _shapes_folder(data: DataConfig, prompts: list[str], seed: int, most: int | None) -> Question:
    """Of prompts of the three splits, in any order and each any number of times, or of none of them, which no scenes
    are known of. Raises UserError for a mixture."""
    different = list(dict.fromkeys(prompts))
    whole = shapes_question(max(len(different), *PROMPTS.values()), seed, data.resolution, most, data.level)
    places = {
        caption: (asked, i) for asked in whole.splits[::-1] for i, caption in reversed(list(enumerate(asked.captions)))
    }
    unknown = [prompt for prompt in different if prompt not in places]
    if len(unknown) == len(different):
        return replace(whole, splits=[PromptSet(whole.splits[0].split, prompts)], repeated=None)
    if unknown:
        raise UserError(
            f"{len(unknown)} of {len(different)} prompts are not those of shapes, level {data.level}, seed {seed}, "
            f"such as {shown(unknown[0])}; expected prompts that `python -m eval.prompts` writes, or none of them"
        )
    splits, is_repeated = [], bool(several_of_each(prompts))
    for asked in whole.splits:
        rows = [row for row, prompt in enumerate(prompts) if places[prompt][0] is asked]
        if rows:
            numbers = [places[prompts[row]][1] for row in rows]
            assert asked.pictures is not None and asked.scenes is not None  # of shapes
            # a prompt's one true picture, several times, would not be as various as real pictures are
            pictures = asked.pictures[numbers] if not is_repeated else None
            scenes = [asked.scenes[number] for number in numbers]
            splits.append(PromptSet(asked.split, [prompts[row] for row in rows], pictures, scenes, rows))
    several = [prompts[row] for row in several_of_each(prompts)]
    known = {prompt: asked.scenes[i] for prompt, (asked, i) in places.items() if asked.scenes is not None}
    repeated = of_scenes(several, known, FIRST_SCENE_SEED + seed, data.resolution) if several else None
    return replace(whole, splits=splits, repeated=repeated)


def _spread(count: int, most: int) -> list[int]:
    """`most` of `count` rows, in order: one of each of `most` equal stretches.

    Where in its stretch a row is taken from follows the multiples of the golden ratio, which are spread evenly, too:
    every second row might all be of one kind, in data whose rows take turns.
    """
    edges = [i * count // most for i in range(most + 1)]
    return [low + int((i * _GOLDEN) % 1 * (high - low)) for i, (low, high) in enumerate(pairwise(edges))]


def _compared(rows: Sequence[int], most: int | None) -> Sequence[int]:
    """These rows, or `most` of them, evenly spread."""
    return rows if most is None or most >= len(rows) else [rows[i] for i in _spread(len(rows), most)]


def training_data(folder: Path | None, cache: Path | None = None) -> CaptionedPictures | None:
    """What the stage in `folder`, RUN/STAGE, was trained on, read by its config; none where that is not there.

    Raises ValueError where it cannot be read, or is no longer what was trained on.
    """
    if folder is None or not (folder / "config.yaml").is_file() or not (folder / "final" / CONTRACT).is_file():
        return None
    try:
        config = recorded_data(folder, squares=False)["data"]
        data = load(config, folder=cache)
    except UserError as error:
        raise UserError(
            f"{error}; or give --training none, and no copies of what {folder} was trained on are looked for"
        ) from None
    trained_on = read_contract(folder / "final", kind_of(folder.name))["data"]["fingerprint"]
    if data.fingerprint != trained_on:
        raise UserError(
            f"{data.name}: is not what {folder} was trained on ({data.fingerprint[:12]}, {trained_on[:12]}); give it "
            "back its data, or --training none"
        )
    return data if config.max_aspect == 1 else load(config.squares, folder=cache)
