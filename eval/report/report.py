"""What was measured => report.json, report.html, grid.png, and the table on the terminal."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from eval.judge.judge import CATEGORIES
from eval.metrics.all import METRICS
from eval.report.figures import part_name
from eval.report.gallery import Gallery
from eval.report.page import render
from sd_mini import images, png
from sd_mini.errors import UserError
from sd_mini.files import CONTRACT, PIPELINE_MARK, atomic_folder, read_json, written_to
from sd_mini.png import MAX_PROMPT, Settings
from sd_mini.sampling import samplers
from sd_mini.stages.contract import KINDS, STAGES, drawer_of, kind_of, lineage, read_contract

REPORT, PAGE, GRID = "report.json", "report.html", "grid.png"
_GRID_COLUMNS = 6
_GRID_SCALE = 2


def run_of(pipeline: Path) -> Path:
    """The run that a folder belongs to: itself, or what it lies in."""
    is_run = any((pipeline / kind / "final").is_dir() for kind in KINDS)
    return pipeline if is_run else pipeline.resolve().parent


def stages_beside(pipeline: Path, stages: dict[str, str]) -> dict[str, Path]:
    """The exported stages that a pipeline was joined from, by name, of those that still lie in its run.

    `pipeline` is the folder that was measured: a run, or a run's `pipeline/`; `stages` its hashes by name. Of a
    tuned noise predictor those that it was tuned from are among them.
    """
    run = run_of(pipeline)
    folders = {kind: run / kind / "final" for kind in KINDS[:2] if (run / kind / "final" / CONTRACT).is_file()}
    joined = {k: f for k, f in folders.items() if k in stages and read_contract(f, k).get("hash") == stages[k]}
    return joined | {stage: run / stage / "final" for stage in lineage(run, drawer_of(stages))}


def drawer_folder(pipeline: Path) -> Path:
    """The folder, RUN/STAGE, of the stage that draws the latents of a run or a pipeline in it, and by whose data it is
    measured; of a tuned noise predictor stage 3."""
    run = run_of(pipeline)
    index = next(filter(None, (read_json(f / PIPELINE_MARK) for f in (pipeline, run / "pipeline"))), {})
    return run / (lineage(run, drawer_of(index.get("stages", {}))) or ["noise_predictor"])[0]


def seconds(stages: dict[str, Path], evaluation: float) -> dict[str, float]:
    """Seconds each of the exported stages was trained for, the evaluation, and `total`, their sum."""
    contracts = {stage: read_contract(folder, kind_of(stage)) for stage, folder in stages.items()}
    spent = {kind: contract["seconds"] for kind, contract in contracts.items() if "seconds" in contract}
    spent["evaluation"] = round(evaluation, 1)
    return {**spent, "total": round(sum(spent.values()), 1)}


def training_curves(run: Path, stages: Iterable[str]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """By stage, its loss and its first held-out score, (step, value) each, of those whose metrics.jsonl is there."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for stage in STAGES:
        path = run / stage / "metrics.jsonl"
        if stage not in stages or not path.is_file():
            continue
        series: dict[str, list[tuple[int, float]]] = {}
        # a kill leaves half a line at the end
        whole = [line for line in path.read_text(encoding="utf-8").split("\n") if line.endswith("}")]
        for line in map(json.loads, whole):
            held_out = next((name for name in line if name.startswith("valid/")), None)
            for name in ("loss", held_out):
                if name is not None and name in line:
                    series.setdefault(name, []).append((line["step"], line[name]))
        if series:
            found[stage] = series
    return found


def reward_looks(stages: Mapping[str, Path]) -> list[dict[str, float]]:
    """What the guards of a training by rewards found, a look each, with its step; none of another training."""
    path = stages["reward"].parent / "metrics.jsonl" if "reward" in stages else None
    if path is None or not path.is_file():
        return []
    whole = [line for line in path.read_text(encoding="utf-8").split("\n") if line.endswith("}")]
    lines = [line for line in map(json.loads, whole) if "eval/score" in line]
    return [{name.removeprefix("eval/"): value for name, value in line.items()} for line in lines]


def training_facts(stages: Mapping[str, Path]) -> dict[str, str]:
    """By stage, which weights were exported: the step, and the average's width where there is one."""
    facts = {}
    for stage, folder in stages.items():
        contract = read_contract(folder, kind_of(stage))
        width = contract.get("ema_width")
        average = "the trained weights" if width is None else f"their average of width {width:g}"
        best = contract.get("best")
        if best is not None:
            average += f", the best by {best['score']} ({best['value']:.4g})"
        step = best["step"] if best is not None else contract.get("steps")
        facts[stage] = f"{average} at step {step}" if step is not None else average
    return facts


def device_name() -> str:
    """The GPU's name, or the processor's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def write(folder: Path, report: dict[str, Any], galleries: Sequence[Gallery], curves: Mapping[str, Any]) -> None:
    """The report folder, in one go: a folder that is there is only replaced by a complete one.

    Raises ValueError for NaN and infinity, which JSON does not have.
    """
    check_finite(report)
    with written_to(folder), atomic_folder(folder, keep=True) as partial:
        (partial / REPORT).write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        (partial / PAGE).write_text(render(report, galleries, curves), encoding="utf-8")
        tiles = galleries[0].tiles
        labels = [tile.prompt for tile in tiles]
        grid = images.grid([t.picture for t in tiles], _GRID_COLUMNS, labels, _GRID_SCALE)
        png.save(grid, partial / GRID, *_settings(report["protocol"], labels))


def _settings(protocol: Mapping[str, Any], prompts: Sequence[str]) -> list[Settings]:
    """What the pictures of the grid were made with; none of pictures that another program has made."""
    if "stages" not in protocol:
        return []
    shared: dict[str, Any] = {
        "num_inference_steps": protocol.get("steps"),
        "guidance_scale": protocol.get("guidance"),
        "guidance_rescale": protocol.get("guidance_rescale", 0.0),
        "guidance_interval": protocol.get("guidance_interval"),
        "autoguidance": protocol.get("autoguidance", False),
        "sampler": protocol.get("sampler") or samplers.name_of_class(protocol["scheduler"]),
        "height": protocol["resolution"],
        "width": protocol["resolution"],
        "stages": protocol["stages"],
    }
    return [Settings(prompt=prompt[:MAX_PROMPT], seed=seed, **shared) for seed, prompt in enumerate(prompts)]


def check_finite(part: Any, place: str = REPORT) -> None:
    """Raises ValueError, the place named, for the first number in a nest of mappings and lists that is not finite."""
    if isinstance(part, float) and not math.isfinite(part):
        raise UserError(f"{place}: is {part}, expected a finite number; the pictures or the network are broken")
    named = part.items() if isinstance(part, Mapping) else enumerate(part) if isinstance(part, list | tuple) else ()
    for name, inner in named:
        check_finite(inner, f"{place}, {name}")


def table(report: dict[str, Any]) -> str:
    """report.json => the lines for a terminal: exact % [95 % interval] n and the ceiling's exact % by split, then the
    distances, reconstruction and seconds. A category that a split does not have is a dash."""
    splits = report.get("composition", {})
    lines = []
    if splits:
        lines.append("exact % [95 % interval] of n, ceiling %")
        lines.append(f"{'':13}" + "".join(f"{split:>32}" for split in splits))
    present = {category for scores in splits.values() for category in scores}
    for category in (category for category in CATEGORIES if category in present):
        cells = [
            _cell(scores.get(category), report.get("ceiling", {}).get(split, {}).get(category))
            for split, scores in splits.items()
        ]
        lines.append(f"{category.replace('_', ' '):13}" + "".join(f"{cell:>32}" for cell in cells))
    if report.get("text"):
        lines.append("text stage: " + "; ".join(_text_line(*entry) for entry in report["text"].items()))
    if "different_captions" in report:
        lines.append(f"only {report['different_captions']} different captions")
    lines += [line for name, metric in METRICS.items() if name in report for line in metric.line(report[name])]
    for split, measures in report.get("blame", {}).items():
        lines += [f"blame, {split}, {name}: {_blame_line(name, entry)}" for name, entry in measures.items()]
    spent = ", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in report["seconds"].items())
    lines.append(f"seconds: {spent}")
    return "\n".join(lines)


def _text_line(split: str, scores: dict[str, float]) -> str:
    shares = {name: f"{100 * value:.1f}" for name, value in scores.items()}
    recall = f"recall@1 {shares['recall_at_1']} % of {scores['n']}"
    if "binding" not in scores:  # of too few different captions
        return f"{split}: {recall}"
    return f"{split}: binding {shares['binding']} % (plain projection {shares['binding_projection']} %), {recall}"


def _blame_line(measure: str, entry: dict[str, Any]) -> str:
    factor = 100 if measure == "not exact" else 1
    return ", ".join(f"{part_name(part)} {factor * one['share']:.3g}" for part, one in entry["shares"].items())


def _cell(score: dict[str, float] | None, ceiling: dict[str, float] | None) -> str:
    if score is None:
        return "-"
    interval = f"[{100 * score['low']:.1f}-{100 * score['high']:.1f}]"
    return f"{100 * score['exact']:.1f} {interval} {score['n']:.0f} " + (
        f"{100 * ceiling['exact']:6.1f}" if ceiling is not None else "     -"
    )
