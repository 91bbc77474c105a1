"""What was measured => report.json, report.html, grid.png, and the table on the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eval.composition import CATEGORIES
from eval.measure import Gallery
from eval.page import render
from sd_mini import images
from sd_mini.stages import CONTRACT, KINDS, atomic_folder, read_contract

REPORT, PAGE, GRID = "report.json", "report.html", "grid.png"
_GRID_COLUMNS = 6
_GRID_SCALE = 2


def stages_beside(pipeline: Path, stages: dict[str, str]) -> dict[str, Path]:
    """The exported stages that a pipeline was joined from, by name, of those that still lie in its run.

    `pipeline` is the folder that was measured: a run, or a run's `pipeline/`; `stages` its hashes by name.
    """
    is_run = any((pipeline / kind / "final").is_dir() for kind in KINDS)
    run = pipeline if is_run else pipeline.resolve().parent
    folders = {kind: run / kind / "final" for kind in KINDS if (run / kind / "final" / CONTRACT).is_file()}
    return {k: f for k, f in folders.items() if k in stages and read_contract(f, k).get("hash") == stages[k]}


def seconds(stages: dict[str, Path], evaluation: float) -> dict[str, float]:
    """Seconds each of the exported stages was trained for, the evaluation, and `total`, their sum."""
    contracts = {kind: read_contract(folder, kind) for kind, folder in stages.items()}
    spent = {kind: contract["seconds"] for kind, contract in contracts.items() if "seconds" in contract}
    spent["evaluation"] = round(evaluation, 1)
    return {**spent, "total": round(sum(spent.values()), 1)}


def write(folder: Path, report: dict[str, Any], galleries: list[Gallery]) -> None:
    """The report folder, in one go: a folder that is there is only replaced by a complete one."""
    with atomic_folder(folder) as partial:
        (partial / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        (partial / PAGE).write_text(render(report, galleries), encoding="utf-8")
        tiles = galleries[0].tiles
        labels = [tile.prompt for tile in tiles]
        images.grid([t.picture for t in tiles], _GRID_COLUMNS, labels, _GRID_SCALE).save(partial / GRID)


def table(report: dict[str, Any]) -> str:
    """report.json => the lines for a terminal: exact % [95 % interval] n and the ceiling's exact % by split, then
    reconstruction and seconds. A category that a split does not have is a dash."""
    splits = report.get("composition", {})
    lines = []
    if splits:
        lines.append("exact % [95 % interval] of n, ceiling %")
        lines.append(f"{'':13}" + "".join(f"{split:>32}" for split in splits))
    for category in CATEGORIES if splits else ():
        cells = [
            _cell(scores.get(category), report["ceiling"][split].get(category)) for split, scores in splits.items()
        ]
        lines.append(f"{category.replace('_', ' '):13}" + "".join(f"{cell:>32}" for cell in cells))
    if report.get("text"):
        lines.append("text stage: " + "; ".join(_text_line(*entry) for entry in report["text"].items()))
    reconstruction = report["reconstruction"]
    lines.append(f"reconstruction: {reconstruction['psnr']:.2f} dB PSNR over {reconstruction['n']} pictures")
    spent = ", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in report["seconds"].items())
    lines.append(f"seconds: {spent}")
    return "\n".join(lines)


def _text_line(split: str, scores: dict[str, float]) -> str:
    shares = {name: f"{100 * scores[name]:.1f}" for name in ("binding", "binding_projection", "recall_at_1")}
    return (
        f"{split}: binding {shares['binding']} % (plain projection {shares['binding_projection']} %), "
        f"recall@1 {shares['recall_at_1']} % of {scores['n']}"
    )


def _cell(score: dict[str, float] | None, ceiling: dict[str, float] | None) -> str:
    if score is None or ceiling is None:
        return "-"
    interval = f"[{100 * score['low']:.1f}-{100 * score['high']:.1f}]"
    return f"{100 * score['exact']:.1f} {interval} {score['n']:.0f} {100 * ceiling['exact']:6.1f}"
