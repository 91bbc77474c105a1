"""Grids of pictures in which one thing changes: the guidance scale, the seed, the run, or the step of its training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from sd_mini.app.drawing import Task
from sd_mini.app.inputs import LAST_SEED, MAX_PICTURES, Values, numbers_of, settings_of, sources_of, whole_number
from sd_mini.app.runs import Run
from sd_mini.errors import UserError

if TYPE_CHECKING:
    from sd_mini.pipelines.text_to_image import Pipeline

GUIDANCE, SEEDS, RUNS, CHECKPOINTS = KINDS = ("guidance scales", "seeds", "runs", "checkpoints")


class Column(NamedTuple):
    """What the pictures of a column have in common: how their pipeline is opened, and which settings change."""

    label: str
    open: Callable[[], Pipeline]
    changes: dict[str, Any]


def pictures(values: Values, runs: Mapping[str, Run]) -> list[Task]:
    """The fields => as many pictures as they ask for, of seeds SEED, SEED + 1, ..."""
    settings, (image, mask) = settings_of(values), sources_of(values)
    pipeline = runs[values["run"]].pipeline
    return [
        Task(pipeline, settings.model_copy(update={"seed": seed}), f"seed {seed}", image, mask)
        for seed in _seeds(values)
    ]


def grid(values: Values, runs: Mapping[str, Run]) -> tuple[list[Task], int]:
    """The fields => pictures row by row, and the number of columns: a column for each value, a row for each seed.

    Raises UserError for values that are none, and for more than MAX_PICTURES pictures.
    """
    settings, (image, mask), run = settings_of(values), sources_of(values), runs[values["run"]]
    kind, seeds = values["kind"], _seeds(values)
    columns: list[Column]
    if kind == GUIDANCE:
        scales = numbers_of(values["numbers"], kind)
        columns = [Column(f"guidance {scale:g}", run.pipeline, {"guidance_scale": scale}) for scale in scales]
    elif kind == RUNS:
        columns = [Column(name, runs[name].pipeline, {}) for name in _chosen(values["runs"], kind)]
    elif kind == CHECKPOINTS:
        steps = sorted(map(int, _chosen(values["checkpoints"], kind)))
        columns = [Column(f"step {step:,}", partial(run.at_checkpoint, step), {}) for step in steps]
    else:
        numbers = [whole_number(seed, kind, 0, LAST_SEED) for seed in numbers_of(values["numbers"], kind)]
        seeds, columns = numbers, [Column("", run.pipeline, {})]
    if len(seeds) * len(columns) > MAX_PICTURES:
        raise UserError(
            f"{kind}: {len(columns)} of {len(seeds)} seeds each are more than {MAX_PICTURES} pictures; choose fewer"
        )
    tasks = []
    for seed in seeds:
        for column in columns:
            own = settings.model_copy(update={**column.changes, "seed": seed})
            label = ", ".join(filter(None, [column.label, f"seed {seed}"]))
            tasks.append(Task(column.open, own, label, image, mask))
    return tasks, math.ceil(math.sqrt(len(seeds))) if kind == SEEDS else len(columns)


def spread(steps: Sequence[int], most: int = 5) -> list[int]:
    """At most so many of the steps, evenly spread, the first and the last among them."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def _seeds(values: Values) -> list[int]:
    first, count = settings_of(values).seed, whole_number(values["count"], "count", 1, MAX_PICTURES)
    return [first + i for i in range(count)]


def _chosen(names: Sequence[str] | None, kind: str) -> Sequence[str]:
    if not names:
        raise UserError(f"{kind}: none are chosen; choose two or more")
    return names
