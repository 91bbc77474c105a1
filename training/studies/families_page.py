"""The page of the families' study: scores with their spread over seeds, speed, the same prompts by each, and words."""

from __future__ import annotations

import base64
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import torch

from sd_mini import images
from sd_mini.files import atomic_text
from sd_mini.pipelines.text_to_image import Pipeline
from sd_mini.timing import Case, Spread

PAGE = "families.html"
BATCH, ROUNDS = 32, 5
# one of each kind, none of them in any report
PROMPTS = (
    "a large red circle at the top left",
    "a small blue square in the center",
    "a green triangle",
    "a yellow square to the left of a purple circle",
    "three orange triangles",
    "four blue circles",
)
# Student's t, two-sided, by the number of values
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}

Row = Mapping[str, Any]


class Score(NamedTuple):
    """The mean over seeds, and half of its 95 % interval where there are at least two."""

    mean: float
    half: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Score:
        n = len(values)
        half = T_95.get(n, 2.26) * statistics.stdev(values) / math.sqrt(n) if n > 1 else None
        return cls(statistics.mean(values), half)

    def shown(self, digits: int = 1) -> str:
        return f"{self.mean:.{digits}f}" + ("" if self.half is None else f" ± {self.half:.{digits}f}")


# column => (a row's value, digits)
COLUMNS: dict[str, tuple[Any, int]] = {
    "one object, %": (lambda row: 100 * row["exact"]["test"]["one_object"], 1),
    "two objects, %": (lambda row: 100 * row["exact"]["test"]["two_objects"], 1),
    "count, %": (lambda row: 100 * row["exact"]["test"]["count"], 1),
    "test, all, %": (lambda row: 100 * row["exact"]["test"]["all"], 1),
    "held-out pairs, %": (lambda row: 100 * row["exact"]["heldout_pairs"]["all"], 1),
    "held-out relations, %": (lambda row: 100 * row["exact"]["heldout_relations"]["all"], 1),
    "ceiling of the autoencoder, %": (lambda row: 100 * row["ceiling"], 1),
    "FD-mini": (lambda row: row["fd_mini"], 3),
    "recall": (lambda row: row["recall"], 3),
    "coverage": (lambda row: row["coverage"], 3),
    "diversity within a prompt": (lambda row: row["diversity"], 2),
    "bits a dimension": (lambda row: row["bits"], 2),
    "parameters, M": (lambda row: row["parameters"] / 1e6, 2),
    "seconds of training": (lambda row: row["seconds"], 0),
}


def by_family(rows: Mapping[str, Row]) -> dict[str, dict[str, Score]]:
    """NAME/SEED => row, as the study keeps them, to NAME => column => score, where there is one."""
    seeds: dict[str, list[Row]] = {}
    for key, row in rows.items():
        seeds.setdefault(key.rsplit("/", 1)[0], []).append(row)
    scores: dict[str, dict[str, Score]] = {}
    for name, own in seeds.items():
        values = {
            column: [value(row) for row in own if row["bits"] is not None or column != "bits a dimension"]
            for column, (value, _) in COLUMNS.items()
        }
        scores[name] = {column: Score.of(found) for column, found in values.items() if found}
    return scores


def table(rows: Mapping[str, Row]) -> str:
    """A line a column, a value a family."""
    scores = by_family(rows)
    lines = [f"{'':<30}" + "".join(f"{name:>18}" for name in scores)]
    for column, (_, digits) in COLUMNS.items():
        cells = [one[column].shown(digits) if column in one else "-" for one in scores.values()]
        lines.append(f"{column:<30}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def write(rows: Mapping[str, Row], folders: Mapping[str, Path], out: Path, seconds: float) -> None:
    """families.html in `out`; `folders`: the pipelines that are timed, and that draw the prompts."""
    pipelines = {name: _opened(folder) for name, folder in folders.items()}
    speed, scores = _timed(pipelines), by_family(rows)
    passes = {name: passes_of(pipeline) for name, pipeline in pipelines.items()}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template(f"{PAGE}.j2").render(
        scores=scores,
        columns={column: digits for column, (_, digits) in COLUMNS.items()},
        speed=speed,
        passes=passes,
        words={name: words(name, scores, speed) for name in scores},
        grids={name: _grid(pipeline) for name, pipeline in pipelines.items()},
        prompts=PROMPTS,
        seconds=seconds,
        seeds=min(sum(key.rsplit("/", 1)[0] == name for key in rows) for name in scores),
        batch=BATCH,
    )
    atomic_text(out / PAGE, page)


def _opened(folder: Path) -> Pipeline:
    pipeline = Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.accelerate()
    return pipeline


def _timed(pipelines: Mapping[str, Pipeline]) -> dict[str, Spread]:
    """Milliseconds a picture, latents and decoding, in batches; in turns."""

    def call(pipeline: Pipeline) -> Any:
        prompts = [PROMPTS[i % len(PROMPTS)] for i in range(BATCH)]
        return lambda: pipeline(prompts, generator=torch.Generator().manual_seed(0), output_type="np")

    turns = Case("speed", {name: call(pipeline) for name, pipeline in pipelines.items()}, ROUNDS, 1, {}).run()
    return {name: turns.figure(name, lambda seconds: 1000 * seconds / BATCH) for name in pipelines}


def passes_of(pipeline: Pipeline) -> int:
    """Calls of the network a picture, a guided one counted twice."""
    config, generator = pipeline.config, pipeline.latent_generator
    if generator is not None:
        return generator.passes(config.default_guidance)
    calls = 0

    def count(network: Any, arguments: Any, keywords: Any) -> None:
        nonlocal calls
        calls += len(next(iter([*arguments, *keywords.values()])))

    handle = pipeline.noise_predictor.register_forward_pre_hook(count, with_kwargs=True)
    pipeline(PROMPTS[0], output_type="latent")
    handle.remove()
    return calls


def words(name: str, scores: Mapping[str, Mapping[str, Score]], speed: Mapping[str, Spread]) -> str:
    """What a family is good and bad at, from the numbers alone."""
    own, all_exact = scores[name], "test, all, %"
    place = sorted(scores, key=lambda other: -scores[other][all_exact].mean).index(name) + 1
    kinds = {kind: own[f"{kind}, %"].mean for kind in ("one object", "two objects", "count")}
    best, worst = max(kinds, key=kinds.__getitem__), min(kinds, key=kinds.__getitem__)
    lost = own[all_exact].mean - own["held-out pairs, %"].mean
    said = [
        f"{own[all_exact].shown()} % of the test prompts are drawn right, number {place} of {len(scores)}:",
        f"{best} best ({kinds[best]:.1f} %), {worst} worst ({kinds[worst]:.1f} %)."
        if kinds[best] > kinds[worst]
        else f"every kind alike ({kinds[best]:.1f} %).",
        f"Pairs that were never shown in training cost it {max(lost, 0.0):.1f} points.",
        f"Within a prompt it varies {own['diversity within a prompt'].shown(2)} as much as the data do;"
        f" FD-mini is {own['FD-mini'].shown(3)}.",
    ]
    first = next(iter(speed), None)
    if first is not None and name in speed and name != first:
        ratio = speed[first].median / speed[name].median
        said.append(f"It draws {ratio:.2g} times as many pictures a second as the {first.replace('_', ' ')}.")
    return " ".join(said)


def _grid(pipeline: Pipeline) -> str:
    """Four pictures of each prompt, of the seeds 0 to 3, as a PNG in base64."""
    prompts = [prompt for prompt in PROMPTS for _ in range(4)]
    seeds = [torch.Generator().manual_seed(i % 4) for i in range(len(prompts))]
    made = pipeline(prompts, generator=seeds).images
    data = io.BytesIO()
    images.grid(made, columns=4).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()
