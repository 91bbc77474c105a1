"""A pipeline and what to ask of it => scores, and the pictures the page shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from eval.composition import Verdict, judge, summarise
from eval.composition_objects import MIN_SIDE
from eval.generate import Sampling, generate
from eval.reconstruction import FIRST_SCENE_SEED, PROMPTS, reconstruct, reconstruction_scores
from eval.text import TextProbe, blame
from sd_mini import shapes
from sd_mini.data import CaptionedPictures, DataConfig, load
from sd_mini.pipeline import Pipeline

SHOWN, FAILURES_SHOWN = 24, 12  # pictures on the page
PICTURES_OF_OTHER_DATA = 48


@dataclass(frozen=True)
class Tile:
    """One picture of the page, (3, H, W) uint8, what was asked for, and what the judge said of it."""

    picture: np.ndarray
    prompt: str
    note: str = ""


@dataclass(frozen=True)
class Gallery:
    """Pictures of the page, and the rule by which they were picked."""

    title: str
    rule: str
    tiles: list[Tile]


@dataclass(frozen=True)
class Measured:
    """`scores` are report.json's measured parts, `prompts` the number asked a split, galleries[0] the saved grid."""

    scores: dict[str, Any]
    prompts: dict[str, int]
    galleries: list[Gallery]


def measure_shapes(
    pipeline: Pipeline, prompts: int | None, seed: int, sampling: Sampling, probe: TextProbe | None = None
) -> Measured:
    """The three splits training has not seen, judged; beside each the ceiling, true drawings through the autoencoder,
    and, with `probe`, what the text stage alone knows of the same scenes.

    `prompts` asks for so many a split instead of PROMPTS. Raises ValueError if the pictures are too small to be read.
    """
    resolution = pipeline.config.resolution
    if resolution < MIN_SIDE:
        raise ValueError(f"the pipeline makes {resolution} px pictures; the judge reads {MIN_SIDE} px or more")
    counts = {split: n if prompts is None else prompts for split, n in PROMPTS.items()}
    scores: dict[str, Any] = {"composition": {}, "ceiling": {}}
    galleries = []
    with tqdm(total=sum(counts.values()), desc="pictures", delay=1) as bar:
        for split, count in counts.items():
            scenes = shapes.sample_scenes(count, split, FIRST_SCENE_SEED + seed)
            captions = [_caption(scene, i) for i, scene in enumerate(scenes)]
            made = generate(pipeline, captions, sampling, bar)
            drawn = shapes.draw_batch(scenes, resolution)
            reconstructed = reconstruct(pipeline.autoencoder, drawn, sampling.batch)
            verdicts = _judge_all(made, scenes)
            scores["composition"][split] = summarise(verdicts)
            scores["ceiling"][split] = summarise(_judge_all(reconstructed, scenes))
            if probe is not None:
                config = DataConfig(split=split, count=count, seed=FIRST_SCENE_SEED + seed, resolution=probe.resolution)
                _add_text(scores, split, probe, load(config))
                binding = scores.get("text", {}).get(split, {}).get("binding")
                if binding is not None:
                    both = (scores[part][split]["all"]["exact"] for part in ("composition", "ceiling"))
                    scores.setdefault("blame", {})[split] = blame(*both, binding)
            if split == "test":
                scores["reconstruction"] = reconstruction_scores(drawn, reconstructed)
                galleries = pick_galleries(made, captions, verdicts)
    return Measured(scores, counts, galleries)


def _add_text(scores: dict[str, Any], split: str, probe: TextProbe, data: CaptionedPictures) -> None:
    entry = probe.scores(data) if probe.sees_pixels else probe.recorded(data.name)
    if entry is not None:
        scores.setdefault("text", {})[split] = entry


def _caption(scene: shapes.Scene, index: int) -> str:
    return shapes.caption(scene, index % len(shapes.PHRASINGS[scene.kind]))


def _judge_all(pictures: np.ndarray, scenes: list[shapes.Scene]) -> list[Verdict]:
    return [judge(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]


def pick_galleries(made: np.ndarray, captions: list[str], verdicts: list[Verdict]) -> list[Gallery]:
    """Pictures (N, 3, R, R) uint8 of the test split => its first SHOWN and, if any failed, its first failures."""
    tiles = [Tile(*row[:2], _note(row[2])) for row in zip(made, captions, verdicts, strict=True)]
    failed = [tile for tile, verdict in zip(tiles, verdicts, strict=True) if not verdict.exact]
    first = Gallery(
        "Pictures of the test split", f"The first {SHOWN} prompts in order, whatever came of them.", tiles[:SHOWN]
    )
    rule = f"The first {FAILURES_SHOWN} of the {len(failed)} test pictures, of {len(tiles)}, in which a fact is wrong."
    return [first, Gallery("Failures", rule, failed[:FAILURES_SHOWN])] if failed else [first]


def _note(verdict: Verdict) -> str:
    """A verdict => "exact", or what is wrong, in words."""
    if verdict.exact:
        return "exact"
    return "cannot be read" if verdict.abstain else f"{verdict.soft:.0%} of the facts hold"


def measure_captions(
    pipeline: Pipeline, data: DataConfig, prompts: int | None, sampling: Sampling, probe: TextProbe | None = None
) -> Measured:
    """Captions of any other data, of which only the autoencoder and, with `probe`, the text stage can be scored:
    nothing here judges their pictures.

    Raises ValueError for what `data` cannot be read as, pictures without captions, and fewer rows than `prompts`.
    """
    rows = load(data)
    captions = [several[0] for several in rows.captions if several]
    if not captions:
        raise ValueError(f"--data {data.source}: its pictures have no captions; expected a column 'text'")
    if prompts is not None and prompts > len(captions):
        raise ValueError(f"--prompts {prompts}: {data.source} has {len(captions)} in split {data.split}; ask for fewer")
    chosen = captions[: PICTURES_OF_OTHER_DATA if prompts is None else prompts]
    with tqdm(total=len(chosen), desc="pictures", delay=1) as bar:
        made = generate(pipeline, chosen, sampling, bar)
    psnr = reconstruction_scores(rows.pictures, reconstruct(pipeline.autoencoder, rows.pictures, sampling.batch))
    scores: dict[str, Any] = {"reconstruction": psnr}
    if probe is not None and all(rows.captions):
        _add_text(scores, data.split, probe, load(data.model_copy(update={"resolution": probe.resolution})))
    shown = [Tile(*row) for row in zip(made, chosen, strict=True)][:PICTURES_OF_OTHER_DATA]
    rule = f"The first {len(shown)} captions in order, whatever came of them."
    gallery = Gallery(f"Pictures of the {data.split} split", rule, shown)
    return Measured(scores, {data.split: len(chosen)}, [gallery])
