"""How long a recipe takes to a given judged score: ours against the classical one and a SiT-style one, in one house."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sd_mini.errors import UserError
from sd_mini.pipelines.text_to_image import Pipeline
from training.benchmarks.interleaved import Spread, measure
from training.benchmarks.predictor import parsed, this_loop
from training.noise_predictor import task as noise_predictor
from training.storage import export
from training.studies.judged import link, report

PLAIN = ["--train.lr", "1e-4", "--train.muon_lr", "null", "--train.schedule", "constant", "--train.warmup_steps", "0"]
PLAIN += ["--objective.direction", "0", "--objective.noise_draws", "1", "--objective.repa.weight", "0"]
PLAIN += [
    "--objective.weighting",
    "none",
    "--objective.density",
    "uniform",
    "--objective.shift",
    "1",
    "--sampling.interval",
    "[0, 1]",
]
PLAIN += ["--train.weight_decay", "0.01", "--train.betas", "[0.9, 0.999]", "--train.ema_width", "0.05"]
RECIPES = {
    "ours": [],
    "sit": PLAIN,
    "classical": [*PLAIN, "--objective.kind", "epsilon", "--objective.schedule", "scaled_linear"],
}
AT_LEAST = {"sit": 3, "classical": 10}  # times our time, up to which a recipe is trained on
CATEGORY = "one_object"


def time_to_score(argv: Sequence[str], updates: int = 500, prompts: int = 200) -> dict[str, Any]:
    """Our recipe is trained for `updates` updates and judged; the others go on until they are judged as well.

    Time is the number of updates times what one takes, which is measured in turn, so that a slow spell meets all alike.
    The others have AdamW 1e-4 at a constant rate and uniform t. The classical recipe's average, EMA 0.9999, still
    holds 0.9999^n of its random start after n updates; both are judged by our short one, in their favour. They are
    looked at after every time that ours took, up to AT_LEAST of them; one that has not arrived then takes longer.
    """
    launched = parsed(argv)
    if launched.config.data.source != "shapes":
        raise UserError(f"time_to_score: data {launched.config.data.source} has no judge; expected a config of shapes")
    costs = _costs(argv)
    with tempfile.TemporaryDirectory(prefix="time_to_score-") as home:
        root = Path(home)
        run = _trained(launched.run, root / "ours", argv, "ours", updates, updates)
        wanted = judged(Pipeline.from_run(run), root, prompts)
        budget = updates * costs["ours"].median
        print(f"ours: {updates} updates, {budget:.0f} s: {100 * wanted:.1f} % of {CATEGORY} exact")
        found: dict[str, Any] = {"score": wanted, "seconds": round(budget, 1), "updates": updates, "prompts": prompts}
        for name, most in AT_LEAST.items():
            each = max(1, round(budget / costs[name].median))
            run = _trained(launched.run, root / name, argv, name, most * each, each)
            scores = _until(wanted, run, root, name, most, each, prompts)
            # between two looks nothing is known: it arrived after the last but one, or takes longer than all of them
            low, high = (len(scores) - 1, len(scores)) if scores[-1] >= wanted else (most, None)
            found[f"ratio_to_{name}"] = {"low": low, "high": high, "median": low, "scores": scores}
    return found


def _until(wanted: float, run: Path, root: Path, name: str, most: int, each: int, prompts: int) -> list[float]:
    """The scores after each of at most `most` times `each` updates, up to the first that is `wanted`."""
    scores: list[float] = []
    while len(scores) < most and (not scores or scores[-1] < wanted):
        updates = (len(scores) + 1) * each
        stage = root / f"{name}-{updates}"
        export.export(run / "noise_predictor", stage, updates)
        parts = (run / kind / "final" for kind in ("text_encoder", "autoencoder"))
        scores.append(judged(Pipeline.from_stages(*parts, stage), root, prompts))
        print(f"{name}: {updates} updates, {len(scores)} x our time: {100 * scores[-1]:.1f} %")
    return scores


def _costs(argv: Sequence[str]) -> dict[str, Spread]:
    """Seconds an update takes by each recipe, measured in turn."""
    loops = {name: partial(_updates, name) for name in RECIPES}
    _, seconds = measure(loops, argv, block=10, rounds=5, warm_up=5)
    return {name: Spread.of([value / 10 for value in values]) for name, values in seconds.items()}


def _updates(recipe: str, argv: Sequence[str]) -> Iterator[float]:
    yield from this_loop([*argv, *RECIPES[recipe]])


def _trained(source: Path, run: Path, argv: Sequence[str], name: str, updates: int, every: int) -> Path:
    """A run over the same stages 1 and 2, trained by that recipe, with a checkpoint after every so many updates."""
    link(run, {part: source / part for part in ("text_encoder/final", "autoencoder/final", "cache")})
    own = [*argv, *RECIPES[name], "--steps", str(updates)]
    own[own.index("--run") + 1] = str(run)
    never = ["--train.valid_every", str(updates), "--train.preview_every", str(updates)]
    kept = ["--train.checkpoint_every", str(every), "--train.keep_every", str(every)]
    noise_predictor.main([*own, *never, *kept])
    return run


def judged(pipeline: Pipeline, root: Path, prompts: int) -> float:
    """`exact` of CATEGORY over the test prompts."""
    shutil.rmtree(root / "pipeline", ignore_errors=True)
    pipeline.save(root / "pipeline")
    out = root / f"report-{time.monotonic_ns()}"
    found = report(root / "pipeline", out, "--prompts", str(prompts), log=root / "eval.log")
    return found["composition"]["test"][CATEGORY]["exact"]
