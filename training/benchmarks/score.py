"""How long a recipe takes to a given judged score: ours, the classical one and a SiT-style one."""

from __future__ import annotations

import shlex
import shutil
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sd_mini.errors import UserError
from sd_mini.pipelines.text_to_image import Pipeline
from sd_mini.timing import Case
from training.benchmarks.loops import processes
from training.benchmarks.predictor import our_loop, parsed
from training.noise_predictor import task as noise_predictor
from training.storage import export
from training.studies.judged import link, report

PLAIN = shlex.split(
    "--train.lr 1e-4 --train.muon_lr null --train.schedule constant --train.warmup_steps 0 --train.weight_decay 0.01 "
    "--train.betas '[0.9, 0.999]' --train.ema_width 0.05 --objective.direction 0 --objective.noise_draws 1 "
    "--objective.repa.weight 0 --objective.weighting none --objective.density uniform --objective.shift 1 "
    "--sampling.interval '[0, 1]'"
)
RECIPES = {
    "ours": [],
    "sit": PLAIN,
    "classical": [*PLAIN, "--objective.kind", "epsilon", "--objective.schedule", "scaled_linear"],
}
AT_LEAST = {"sit": 3, "classical": 10}  # times our time, up to which a recipe is trained on
CATEGORY = "one_object"


def time_to_score(argv: Sequence[str], updates: int = 500, prompts: int = 200) -> dict[str, Any]:
    """Our recipe is trained for `updates` updates and judged; the others are trained until they reach its score.

    Time is the number of updates times the seconds of one, which are measured in turn. The others have AdamW 1e-4 at a
    constant rate and uniform t. The classical recipe's average, EMA 0.9999, still holds 0.9999^n of its random start
    after n updates; both are judged by our short one, in their favour. They are judged after every multiple of our
    time, up to AT_LEAST of them; one that has not reached the score then takes longer.
    """
    launched = parsed(argv)
    if launched.config.data.source != "shapes":
        raise UserError(f"time_to_score: data {launched.config.data.source} has no judge; expected a config of shapes")
    loops = {name: partial(our_loop, [*argv, *options]) for name, options in RECIPES.items()}
    with processes(loops, block=10, warm_up=5) as (contestants, _):
        turns = Case("time_to_score", contestants, rounds=5, figures={}).run()
    seconds = {name: turns.figure(name, lambda seconds: seconds / 10).median for name in RECIPES}  # of one update
    with tempfile.TemporaryDirectory(prefix="time_to_score-") as home:
        root = Path(home)
        run = _trained(launched.run, root / "ours", argv, "ours", updates, updates)
        target = judged(Pipeline.from_run(run), root, prompts)
        budget = updates * seconds["ours"]
        print(f"ours: {updates} updates, {budget:.0f} s: {100 * target:.1f} % of {CATEGORY} exact")
        result: dict[str, Any] = {"score": target, "seconds": round(budget, 1), "updates": updates, "prompts": prompts}
        for name, most in AT_LEAST.items():
            each = max(1, round(budget / seconds[name]))  # updates in our time
            run = _trained(launched.run, root / name, argv, name, most * each, each)
            scores: list[float] = []
            while len(scores) < most and (not scores or scores[-1] < target):
                scores.append(_judged_at(run, root, (len(scores) + 1) * each, prompts))
                print(f"{name}: {len(scores) * each} updates, {len(scores)} x our time: {100 * scores[-1]:.1f} %")
            # the score was reached between the last two judgements, or takes longer than all of them
            low, high = (len(scores) - 1, len(scores)) if scores[-1] >= target else (most, None)
            result[f"ratio_to_{name}"] = {"low": low, "high": high, "median": low, "scores": scores}
    return result


def _judged_at(run: Path, root: Path, updates: int, prompts: int) -> float:
    """The score of the checkpoint after so many updates."""
    stage = root / f"{run.name}-{updates}"
    export.export(run / "noise_predictor", stage, updates)
    text_encoder, autoencoder = (run / kind / "final" for kind in ("text_encoder", "autoencoder"))
    return judged(Pipeline.from_stages(text_encoder, autoencoder, stage), root, prompts)


def _trained(source: Path, run: Path, argv: Sequence[str], name: str, updates: int, every: int) -> Path:
    """A run over the same stages 1 and 2, trained by that recipe, with a checkpoint after every so many updates."""
    link(run, {part: source / part for part in ("text_encoder/final", "autoencoder/final", "cache")})
    options = [*argv, *RECIPES[name], "--steps", str(updates)]
    options[options.index("--run") + 1] = str(run)
    never = ["--train.valid_every", str(updates), "--train.preview_every", str(updates)]
    kept = ["--train.checkpoint_every", str(every), "--train.keep_every", str(every)]
    noise_predictor.main([*options, *never, *kept])
    return run


def judged(pipeline: Pipeline, root: Path, prompts: int) -> float:
    """`exact` of CATEGORY over the test prompts."""
    shutil.rmtree(root / "pipeline", ignore_errors=True)
    pipeline.save(root / "pipeline")
    out = root / f"report-{time.monotonic_ns()}"
    scores = report(root / "pipeline", out, "--prompts", str(prompts), log=root / "eval.log")
    return scores["composition"]["test"][CATEGORY]["exact"]
