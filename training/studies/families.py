"""The ways from text to a picture side by side: each trained over one run's text stage in the same seconds, and judged.

python -m training.studies.families --run RUN --out FOLDER [--seconds 150] [--seeds 3] [--only NAME ...]

RUN is a finished run on shapes, whose stages 1 and 2 all share; a family that needs another autoencoder (codes, small
pictures) has one trained by its own recipe first. How many updates fit into the seconds is measured before the first
training of each family. Killed, the same command goes on where it stopped. The page is FOLDER/families.html.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_mini.cli.arguments import Parser, whole_number
from sd_mini.config import check_choice, command, read_yaml
from sd_mini.errors import UserError
from sd_mini.files import atomic_text, check_writable, combined_hash, file_hash, read_json
from sd_mini.progress import progress
from sd_mini.stages.contract import kind_of, program_of, read_contract
from training.studies import families_page, judged

RESULTS = "families.json"
PACE = 40, 20  # updates of the training that the pace is taken from, of which the first are not timed


@dataclass(frozen=True)
class Family:
    """One way: the stage that trains it, and the recipe of the autoencoder that it needs, if not the run's own."""

    stage: str
    autoencoder: str | None = None


FAMILIES = {
    "noise_predictor": Family("noise_predictor"),
    "autoregressive": Family("autoregressive", "vq"),
    "normalizing_flow": Family("normalizing_flow"),
    "gan": Family("gan"),
    "vae": Family("vae"),
    "regression": Family("regression"),
    "prior": Family("prior"),
    "pixels": Family("autoregressive", "small_picture"),
}


def main(argv: Sequence[str]) -> None:
    options = _parser().parse_args(argv)
    for name in options.only:
        check_choice("--only", name, FAMILIES)
    stages = {
        kind: read_contract(options.run / kind / "final", kind)["hash"] for kind in ("text_encoder", "autoencoder")
    }
    check_writable(options.out / RESULTS)
    recipes = {name: _recipe_hash(options, name) for name in options.only}
    found = _found(options.out / RESULTS, {"stages": stages, "seconds": options.seconds})
    for name, digest in recipes.items():
        if found["recipes"].setdefault(name, digest) != digest:
            raise UserError(
                f"{options.out / RESULTS}: holds {name} by another recipe; give another --out, or delete it"
            )
    # one seed of all before the next: what is there at any time compares
    jobs = [(name, seed) for seed in range(options.seeds) for name in options.only]
    jobs = [(name, seed) for name, seed in jobs if f"{name}/{seed}" not in found["rows"]]
    options.out.mkdir(parents=True, exist_ok=True)
    for name, seed in progress(jobs, desc="trainings"):
        if name not in found["steps"]:
            found["steps"][name] = _steps(options, name)
            _save(options, found)
        found["rows"][f"{name}/{seed}"] = _measured(options, name, seed, found["steps"][name])
        _save(options, found)
    folders = {name: options.out / f"{name}-0" / "pipeline" for name in options.only}
    families_page.write(found["rows"], folders, options.out, options.seconds)
    print(families_page.table(found["rows"]))
    print(options.out / families_page.PAGE)


def _found(results: Path, what: dict[str, Any]) -> dict[str, Any]:
    """What is measured already. Raises UserError where that is over other stages, or in other seconds."""
    found: Any = read_json(results) if results.is_file() else what | {"recipes": {}, "steps": {}, "rows": {}}
    if (measured := {name: found[name] for name in what}) != what:
        raise UserError(f"{results}: holds families of {measured}, asked for {what}; give another --out, or delete it")
    return found


def _recipe_hash(options: Any, name: str) -> str:
    """Of the files that say how a family is trained. Raises UserError where one is missing."""
    files = [options.recipes / f"{one}.yaml" for one in (name, FAMILIES[name].autoencoder) if one is not None]
    for file in files:
        read_yaml(file)
    return combined_hash([file_hash(file) for file in files])


def _save(options: Any, found: dict[str, Any]) -> None:
    atomic_text(options.out / RESULTS, json.dumps(found, indent=2) + "\n")


def _autoencoder(options: Any, family: Family) -> Path:
    """The run that holds the autoencoder of a family and the caches over it; its own is trained first."""
    if family.autoencoder is None:
        return options.run
    run = options.out / family.autoencoder
    if not (run / "autoencoder" / "final").exists():
        own = ["--config", str(options.recipes / f"{family.autoencoder}.yaml"), "--run", str(run), "--log_with", "none"]
        run.mkdir(parents=True, exist_ok=True)
        judged.run([["training.autoencoder", *own]], run / "log")
    return run


def _trained(options: Any, name: str, run: Path, *more: str) -> Path:
    """Train a family in `run`, over the stages that it needs. Returns its stage's folder."""
    family = FAMILIES[name]
    under = _autoencoder(options, family)
    (under / "cache").mkdir(exist_ok=True)
    judged.link(run, {"text_encoder/final": options.run / "text_encoder" / "final"})
    judged.link(run, {part: under / part for part in ("autoencoder/final", "cache")})
    own = ["--config", str(options.recipes / f"{name}.yaml"), "--run", str(run), "--log_with", "none", *more]
    judged.run([[program_of(family.stage), *own]], run / "log")
    return run / family.stage


def _steps(options: Any, name: str) -> int:
    """Updates that fit into the seconds, by the pace of short trainings: of an adversary that begins later with it and
    without."""
    adversary = read_yaml(options.recipes / f"{name}.yaml").get("adversary") or {}
    start, pace = adversary.get("start", 0), _pace(options, name, "pace")
    if not start or start * pace >= options.seconds:
        return max(1, round(options.seconds / pace))
    later = _pace(options, name, "pace-with-adversary", "--adversary.start", "0")
    return round(start + (options.seconds - start * pace) / later)


def _pace(options: Any, name: str, folder: str, *more: str) -> float:
    """Seconds an update."""
    steps, first = PACE
    words = ["--train.steps", str(steps), "--train.log_every", str(first), "--train.seed", "1000", *more]
    stage = _trained(options, name, options.out / f"{name}-{folder}", *words)
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    at = {row["step"]: row["seconds"] for row in rows if "seconds" in row}
    return (at[steps] - at[first]) / (steps - first)


def _measured(options: Any, name: str, seed: int, steps: int) -> dict[str, Any]:
    """Train and judge one family by one seed."""
    run, stage = options.out / f"{name}-{seed}", FAMILIES[name].stage
    _trained(options, name, run, "--train.steps", str(steps), "--train.seed", str(seed))
    judged.run([["sd_mini", "export", str(run), "--predictor", stage]], run / "export.log")
    report = judged.report(run / "pipeline", run / "report", log=run / "eval.log")
    contract = read_contract(run / stage / "final", kind_of(stage))
    distance = report["distances"]["FD-mini"]
    return {
        "exact": {
            split: {category: score["exact"] for category, score in scores.items()}
            for split, scores in report["composition"].items()
        },
        "ceiling": report["ceiling"]["test"]["all"]["exact"],
        "fd_mini": distance["fd"],
        "recall": distance["recall"],
        "coverage": distance["coverage"],
        "diversity": report["diversity"]["mini"]["vendi"]["share"],
        "bits": contract["scores"].get("bits_per_dimension", contract["scores"].get("bits")),
        "parameters": contract["parameters"],
        "seconds": contract["seconds"],
        "steps": steps,
    }


def _parser() -> Parser:
    parser = Parser(prog="python -m training.studies.families", description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, type=Path, help="whose stages 1 and 2 are trained")
    parser.add_argument("--out", required=True, type=Path, help="folder of the runs; the same command goes on in it")
    parser.add_argument("--seconds", type=whole_number(1), default=150, help="of each training (%(default)s)")
    parser.add_argument("--seeds", type=whole_number(1), default=3, help="trainings of each family (%(default)s)")
    shapes = Path(__file__).parent.parent / "configs" / "shapes"
    parser.add_argument("--recipes", type=Path, default=shapes, help="folder of NAME.yaml (%(default)s)")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[*FAMILIES], help="some of the families")
    return parser


if __name__ == "__main__":
    sys.exit(command(main))
