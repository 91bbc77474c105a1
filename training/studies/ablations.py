"""What each part of a stage 3 recipe is worth: the recipe with one thing changed at a time, over several seeds.

python -m training.studies.ablations ARMS.yaml --config FILE --run RUN --out FOLDER [--seeds N N] [--jobs 2] [--field V]

RUN is a finished run on shapes, whose stages 1 and 2 the arms share. ARMS.yaml maps an arm's name to what it changes;
gains are over the one called `base`. All make as many updates of as many samples. `--jobs` trainings run side by side,
each on its own share of the cores. Killed, the same command goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from pydantic import Field

from sd_mini.cli.arguments import Parser, whole_number
from sd_mini.config import Config, check, command, read, read_yaml
from sd_mini.errors import UserError
from sd_mini.files import atomic_text, check_writable, read_json
from sd_mini.progress import progress
from sd_mini.stages.contract import read_contract
from training.autoencoder.task import AutoencoderConfig
from training.engine.launch import parse
from training.noise_predictor.config import PredictorConfig
from training.studies import judged

RESULTS = "ablations.json"
SCENES = "1000"  # the seed of the scenes that arms are judged on: others than the report's
COLUMNS = {
    "one": ("test", "one_object"),
    "two": ("test", "two_objects"),
    "pairs, one": ("heldout_pairs", "one_object"),
    "pairs, two": ("heldout_pairs", "two_objects"),
    "relations": ("heldout_relations", "all"),
}


class Arm(Config):
    """What one arm changes."""

    noise_predictor: dict[str, Any] = Field(default_factory=dict)
    """fields of stage 3"""
    autoencoder: dict[str, Any] = Field(default_factory=dict)
    """fields of a stage 2 of its own, trained by autoencoder.yaml beside stage 3's config"""
    eval: list[str] = Field(default_factory=list)
    """options of `python -m eval`"""
    guide: int | None = Field(None, ge=1)
    """the update whose averages autoguidance leads away from"""


def main(argv: Sequence[str]) -> None:
    options, overrides = _parser().parse_known_args(argv)
    if options.steps is not None:
        overrides += ["--train.steps", str(options.steps)]
    check_writable(options.out / RESULTS)
    arms = arms_of(options.arms)
    kept = _kept(arms)
    recipe = _recipe(options, overrides, arms)
    if unknown := set(options.only or []) - set(arms):
        raise UserError(f"--only {min(unknown)!r}: expected arms of {options.arms}: {', '.join(arms)}")
    shares = _shares(options.jobs)
    arms = {name: arm for name, arm in arms.items() if options.only is None or name in options.only}
    found = _found(options.out / RESULTS, recipe, arms)
    jobs = [
        job
        for seed in dict.fromkeys(options.seeds)
        for job in trainings(arms, seed)
        if any(f"{name}/{seed}" not in found["rows"] for name in job[1])
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.run / "cache").mkdir(exist_ok=True)
    atomic_text(options.out / RESULTS, json.dumps(found, indent=2) + "\n")
    given = options, [*overrides, *kept], arms, shares
    with ThreadPoolExecutor(options.jobs) as pool, progress(total=len(jobs), desc="trainings") as bar:
        running = [pool.submit(_measured, *given, job) for job in jobs]
        try:
            for done in as_completed(running):
                found["rows"] |= done.result()
                atomic_text(options.out / RESULTS, json.dumps(found, indent=2) + "\n")
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # those that run are waited for
            raise
    print(table(found["rows"]))
    print(options.out / RESULTS)


def arms_of(path: Path) -> dict[str, Arm]:
    """Raises ValueError for a file without arms, and for names that are no text or too much alike."""
    arms = {name: check(Arm, changes, f"{path}: {name}") for name, changes in read_yaml(path).items()}
    slugs = [_slug(name) for name in arms if isinstance(name, str)]
    if not arms or len(set(slugs)) < len(arms):
        raise UserError(f"{path}: expected arms, by names that differ in more than punctuation; got {list(arms)}")
    return arms


def trainings(arms: dict[str, Arm], seed: int) -> list[tuple[int, list[str]]]:
    """(seed, the arms that one training serves): those that differ only in how its pictures are made."""
    alike: dict[str, list[str]] = {}
    for name, arm in arms.items():
        alike.setdefault(json.dumps([arm.autoencoder, arm.noise_predictor]), []).append(name)
    return [(seed, names) for names in alike.values()]


def _kept(arms: dict[str, Arm]) -> list[str]:
    """Options by which every training keeps what an arm is guided by."""
    for name, arm in arms.items():
        if (arm.guide is not None) != ("--autoguidance" in arm.eval):
            raise UserError(
                f"arm {name!r}: expected guide and eval: [--autoguidance, ...] together; it has one of them"
            )
    guides = {arm.guide for arm in arms.values() if arm.guide is not None}
    if len(guides) > 1:
        raise UserError(f"guide: expected one update for all arms, whose averages are kept; got {sorted(guides)}")
    return [
        word for step in guides for word in ("--train.checkpoint_every", str(step), "--train.keep_every", str(step))
    ]


def _recipe(options: Any, overrides: Sequence[str], arms: dict[str, Arm]) -> dict[str, Any]:
    """What all arms change one thing of. Raises ValueError for an arm's fields or a stage that cannot be."""
    given = ["--config", str(options.config), "--run", str(options.out), *overrides]
    of_autoencoder = None
    for name, arm in arms.items():
        steps = _parsed([*given, *_words(arm.noise_predictor)]).train.steps
        if arm.guide is not None and arm.guide > steps:
            raise UserError(f"arm {name!r}: guide {arm.guide}: expected at most {steps}, the updates of a training")
        if arm.autoencoder:
            read(AutoencoderConfig, _beside(options.config), _words(arm.autoencoder))
            of_autoencoder = read(AutoencoderConfig, _beside(options.config)).model_dump(mode="json")
    kinds = ("text_encoder", "autoencoder")
    stages = {kind: read_contract(options.run / kind / "final", kind)["hash"] for kind in kinds}
    config = _parsed(given).model_dump(mode="json")
    return {"stages": stages, "noise_predictor": config, "autoencoder": of_autoencoder}


def _parsed(words: Sequence[str]) -> PredictorConfig:
    launched = parse(PredictorConfig, "noise_predictor", words)
    assert launched is not None  # as no help was asked for
    return launched.config


def _shares(jobs: int) -> SimpleQueue[list[int] | None]:
    """The cores of each job; none where the system does not let them be chosen."""
    everything: list[Any] = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [None] * jobs
    if jobs > len(everything):
        raise UserError(f"--jobs {jobs}: expected at most one for each of {len(everything)} cores")
    shares: SimpleQueue[list[int] | None] = SimpleQueue()
    for number in range(jobs):
        shares.put(None if everything[0] is None else everything[number::jobs])
    return shares


def _found(results: Path, recipe: dict[str, Any], arms: dict[str, Arm]) -> dict[str, Any]:
    """What is measured already. Raises ValueError where that is of another recipe, or of another arm of that name."""
    if not results.is_file():
        return {"recipe": recipe, "rows": {}}
    found: Any = read_json(results)
    if found["recipe"] != recipe:
        raise UserError(f"{results}: holds arms of another recipe or other stages; give another --out, or delete it")
    for key, row in found["rows"].items():
        name = key.rsplit("/", 1)[0]
        if name in arms and row["arm"] != arms[name].model_dump():
            raise UserError(f"{results}: {name!r} changed something else there; rename it, or give another --out")
    return found


def _measured(
    options: Any, overrides: Sequence[str], arms: dict[str, Arm], shares: SimpleQueue, job: tuple[int, list[str]]
) -> dict[str, dict[str, Any]]:
    """Train once and judge each of the arms it serves: NAME/SEED => scores."""
    cores = shares.get()
    try:
        (seed, names), arm = job, arms[job[1][0]]
        run = options.out / f"{_slug(names[0])}-{seed}"
        # latents of its own go into a cache of its own
        parts = ["text_encoder/final"] + ["autoencoder/final", "cache"] * (not arm.autoencoder)
        judged.link(run, {part: options.run / part for part in parts})
        own = ["--run", str(run), "--log_with", "none", "--train.seed", str(seed)]
        stages = [["training.noise_predictor", "--config", str(options.config), *own, *overrides]]
        stages[0] += _words(arm.noise_predictor)
        if arm.autoencoder:
            beside = str(_beside(options.config))
            stages.insert(0, ["training.autoencoder", "--config", beside, *own, *_words(arm.autoencoder)])
        judged.run(stages, run / "log", cores)
        return {f"{name}/{seed}": _judged(run, name, arms[name], cores) for name in names}
    finally:
        shares.put(cores)


def _judged(run: Path, name: str, arm: Arm, cores: Sequence[int] | None) -> dict[str, Any]:
    out = run / "arms" / _slug(name)
    out.mkdir(parents=True, exist_ok=True)
    joined = [["sd_mini", "export", str(run), "--out", str(out / "pipeline")]]
    if arm.guide is not None:
        early = ["--out", str(out / "early"), "--step", str(arm.guide)]
        joined = [
            ["training.storage.export", str(run / "noise_predictor"), *early],
            [*joined[0], "--guide", str(out / "early")],
        ]
    judged.run(joined, out / "export.log", cores)
    asked, log = ["--seed", SCENES, *arm.eval], out / "eval.log"
    composition = judged.report(out / "pipeline", out / "report", *asked, log=log, cores=cores)["composition"]
    contract = read_contract(run / "noise_predictor" / "final", "noise_predictor")
    scores = {column: composition[split][category]["exact"] for column, (split, category) in COLUMNS.items()}
    return {"arm": arm.model_dump(), **scores, "loss": contract["scores"]["loss"], "seconds": contract["seconds"]}


def table(found: dict[str, dict[str, Any]]) -> str:
    """Mean +- standard deviation over the seeds, in per cent, and the mean of what each seed gained over its base."""
    by_arm: dict[str, dict[str, dict[str, Any]]] = {}
    for key, row in found.items():
        name, seed = key.rsplit("/", 1)
        by_arm.setdefault(name, {})[seed] = row
    base = by_arm.get("base", {})
    lines = [f"{'arm':<20} {'seeds':>5}" + "".join(f" {column:>20}" for column in COLUMNS) + f" {'loss':>7}"]
    for name, rows in by_arm.items():
        cells = []
        for column in COLUMNS:
            values = [100 * row[column] for row in rows.values()]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            gains = [100 * (row[column] - base[seed][column]) for seed, row in rows.items() if seed in base]
            gained = f"({statistics.mean(gains):+.1f})" if gains else ""
            cells.append(f" {statistics.mean(values):5.1f} +- {spread:4.1f} {gained:>7}")
        loss = statistics.mean(row["loss"] for row in rows.values())
        lines.append(f"{name:<20} {len(rows):>5}" + "".join(cells) + f" {loss:7.4f}")
    return "\n".join(lines)


def _words(fields: dict[str, Any]) -> list[str]:
    return [word for name, value in fields.items() for word in (f"--{name}", json.dumps(value))]


def _beside(config: Path) -> Path:
    return config.parent / "autoencoder.yaml"


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def _parser() -> Parser:
    parser = Parser(prog="python -m training.studies.ablations", description=__doc__.splitlines()[0])
    parser.add_argument("arms", metavar="ARMS.yaml", type=Path, help="name: {noise_predictor: {field: value}}, ...")
    parser.add_argument("--config", required=True, type=Path, help="of stage 3")
    parser.add_argument("--run", required=True, type=Path, help="whose stages 1 and 2 are trained")
    parser.add_argument("--out", required=True, type=Path, help="folder of the runs; the same command goes on in it")
    parser.add_argument("--seeds", nargs="+", type=whole_number(0), default=[0, 1, 2], help="of stage 3 (0 1 2)")
    parser.add_argument("--jobs", type=whole_number(1), default=1, help="trainings side by side (%(default)s)")
    parser.add_argument("--steps", type=whole_number(1), help="updates of a training; the config's own if left out")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of the arms")
    return parser


if __name__ == "__main__":
    sys.exit(command(main))
