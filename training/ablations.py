"""What each part of a stage 3 recipe is worth: the recipe with one thing changed at a time, over several seeds.

python -m training.ablations ARMS.yaml --config FILE --run RUN --out FOLDER [--seeds 0 1 2] [--jobs 2] [--field value]

RUN is a finished run on shapes, whose stages 1 and 2 all arms share. ARMS.yaml maps an arm's name to what it changes;
`base`, which changes nothing, is among them. All make as many updates of as many samples. `--jobs` trainings run side
by side, each on its own share of the cores. Killed, the same command goes on where it stopped.
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
from tqdm.auto import tqdm

from sd_mini.cli import Parser, whole
from sd_mini.config import Config, check, command, read, read_yaml
from sd_mini.stages import atomic_text, read_contract
from training import autoencoder, judged, noise_predictor
from training.launch import parse

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
    options, overrides = _parser().parse_known_args(["--train.steps" if word == "--steps" else word for word in argv])
    arms = arms_of(options.arms)
    if options.only:
        unknown = set(options.only) - set(arms)
        if unknown:
            raise ValueError(f"--only {min(unknown)!r}: expected arms of {options.arms}: {', '.join(arms)}")
        arms = {name: arm for name, arm in arms.items() if name in options.only}
    found = _found(options, _recipe(options, overrides, arms), arms)
    jobs = [
        job
        for seed in options.seeds
        for job in trainings(arms, seed)
        if any(f"{name}/{seed}" not in found["rows"] for name in job[1])
    ]
    if jobs:
        _encode(options, overrides, arms)
    cores: SimpleQueue[list[int] | None] = SimpleQueue()
    everything = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    for number in range(options.jobs):
        cores.put(everything[number :: options.jobs] or None)
    with ThreadPoolExecutor(options.jobs) as pool, tqdm(total=len(jobs), desc="trainings") as bar:
        running = [pool.submit(_measured, options, overrides, arms, cores, job) for job in jobs]
        try:
            for done in as_completed(running):
                found["rows"] |= done.result()
                atomic_text(options.out / RESULTS, json.dumps(found, indent=2) + "\n")
                bar.update()
        except ValueError:
            pool.shutdown(cancel_futures=True)  # those that run are waited for
            raise
    print(table(found["rows"]))
    print(options.out / RESULTS)


def _recipe(options: Any, overrides: Sequence[str], arms: dict[str, Arm]) -> dict[str, Any]:
    """What all arms change one thing of. Raises ValueError for an arm or a stage that cannot be, before any trains."""
    given = ["--config", str(options.config), "--run", str(options.out), *overrides]
    for arm in arms.values():
        parse(noise_predictor.PredictorConfig, "noise_predictor", [*given, *_words(arm.noise_predictor)])
        if arm.autoencoder:
            read(autoencoder.AutoencoderConfig, _beside(options.config), _words(arm.autoencoder))
    kinds = ("text_encoder", "autoencoder")
    stages = {kind: read_contract(options.run / kind / "final", kind)["hash"] for kind in kinds}
    config = parse(noise_predictor.PredictorConfig, "noise_predictor", given).config
    return {**stages, "noise_predictor": config.model_dump(mode="json")}


def _found(options: Any, recipe: dict[str, Any], arms: dict[str, Arm]) -> dict[str, Any]:
    """What is measured already. Raises ValueError where that is of another recipe, or of another arm of that name."""
    results = options.out / RESULTS
    if not results.is_file():
        return {"recipe": recipe, "rows": {}}
    found = json.loads(results.read_text(encoding="utf-8"))
    if found["recipe"] != recipe:
        raise ValueError(f"{results}: holds arms of another recipe or other stages; give another --out, or delete it")
    for key, row in found["rows"].items():
        name = key.rsplit("/", 1)[0]
        if name in arms and row["arm"] != arms[name].model_dump():
            raise ValueError(
                f"{results}: {name!r} changed something else there; give it another name, or another --out"
            )
    return found


def arms_of(path: Path) -> dict[str, Arm]:
    return {name: check(Arm, changes, f"{path}: {name}") for name, changes in read_yaml(path).items()}


def trainings(arms: dict[str, Arm], seed: int) -> list[tuple[int, list[str]]]:
    """(seed, the arms that one training serves): those that differ only in how its pictures are made."""
    alike: dict[str, list[str]] = {}
    for name, arm in arms.items():
        alike.setdefault(json.dumps([arm.autoencoder, arm.noise_predictor]), []).append(name)
    return [(seed, names) for names in alike.values()]


def _encode(options: Any, overrides: Sequence[str], arms: dict[str, Arm]) -> None:
    """Fill the caches by a training of one update, so that no two trainings do it at once."""
    repa = {name: value for arm in arms.values() for name, value in arm.noise_predictor.items() if ".repa." in name}
    run = options.out / "encoding"
    (options.run / "cache").mkdir(exist_ok=True)
    _link(options.run, run, ("text_encoder", "autoencoder", "cache"))
    own = ["--config", str(options.config), "--run", str(run), "--log_with", "none", *overrides, *_words(repa)]
    judged.run([["training.noise_predictor", *own, "--train.steps", "1"]], run / "log")


def _link(source: Path, run: Path, parts: Sequence[str]) -> None:
    """A run over another's exported stages and caches."""
    for part in parts:
        inner = "" if part == "cache" else "final"
        (link := run / part / inner).parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to((source / part / inner).absolute(), target_is_directory=True)


def _measured(
    options: Any, overrides: Sequence[str], arms: dict[str, Arm], cores: SimpleQueue, job: tuple[int, list[str]]
) -> dict[str, dict[str, Any]]:
    """Train once and judge each of the arms it serves: NAME/SEED => scores."""
    seed, names = job
    own, run = cores.get(), options.out / f"{_slug(names[0])}-{seed}"
    arm, stages = arms[names[0]], [f"{run}", "--log_with", "none"]
    _link(options.run, run, ("text_encoder", "cache") if arm.autoencoder else ("text_encoder", "autoencoder", "cache"))
    programs = []
    if arm.autoencoder:
        own_stage = ["--config", str(_beside(options.config)), "--run", *stages, *_words(arm.autoencoder)]
        programs.append(["training.autoencoder", *own_stage])
    guides = [arms[name].guide for name in names if arms[name].guide is not None]
    kept = [word for step in guides for word in ("--train.checkpoint_every", step, "--train.keep_every", step)]
    changed = [*overrides, *_words(arm.noise_predictor), *map(str, kept), "--train.seed", str(seed)]
    programs.append(["training.noise_predictor", "--config", str(options.config), "--run", *stages, *changed])
    rows = {}
    try:
        judged.run(programs, run / "log", own)
        for name in names:
            rows[f"{name}/{seed}"] = _judged(run, arms[name], _slug(name), own)
    finally:
        cores.put(own)
    return rows


def _judged(run: Path, arm: Arm, name: str, cores: Sequence[int] | None) -> dict[str, Any]:
    joined = [["sd_mini", "export", str(run), "--out", str(run / name)]]
    if arm.guide is not None:
        early = str(run / f"early-{arm.guide}")
        stage = str(run / "noise_predictor")
        joined = [["training.export", stage, "--out", early, "--step", str(arm.guide)], [*joined[0], "--guide", early]]
    judged.run(joined, run / f"{name}-export.log", cores)
    asked, log = ["--seed", SCENES, *arm.eval], run / f"{name}-report.log"
    report = judged.report(run / name, run / f"{name}-report", *asked, log=log, cores=cores)
    contract = read_contract(run / "noise_predictor" / "final", "noise_predictor")
    composition = report["composition"]
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
    parser = Parser(prog="python -m training.ablations", description=__doc__.splitlines()[0])
    parser.add_argument("arms", metavar="ARMS.yaml", type=Path, help="name: {noise_predictor: {field: value}}, ...")
    parser.add_argument("--config", required=True, type=Path, help="of stage 3")
    parser.add_argument("--run", required=True, type=Path, help="whose stages 1 and 2 are trained")
    parser.add_argument("--out", required=True, type=Path, help="folder of the runs; the same command goes on in it")
    parser.add_argument("--seeds", nargs="+", type=whole(0), default=[0, 1, 2], help="of stage 3 (0 1 2)")
    parser.add_argument("--jobs", type=whole(1), default=1, help="trainings side by side (%(default)s)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of the arms")
    return parser


if __name__ == "__main__":
    sys.exit(command(main))
