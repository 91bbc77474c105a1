"""What a better text encoder is worth beside a larger noise predictor: finished runs in one figure (Imagen, fig. 4).

python -m eval.analysis.study RUN RUN ... --out FOLDER

Reads each run's report/report.json and its stages' contracts; nothing is made or measured anew. One line a text stage,
over the noise predictor's parameters. Runs are comparable where their reports asked the same of the same data, by the
same networks.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sd_mini.cli.arguments import Parser, check_target
from sd_mini.config import command, read_yaml
from sd_mini.errors import UserError
from sd_mini.files import atomic_folder, read_json, written_to
from sd_mini.stages.contract import drawer_of, lineage, read_contract

SCORES, FIGURE = "study.json", "study.svg"
# what has to be alike for two reports to be compared
_ALIKE = ("data", "prompts", "reference_hash", "resolution", "scene_seed")


def main(argv: Sequence[str] | None = None) -> int:
    return command(_main, argv)


def _main(argv: Sequence[str]) -> None:
    options = _parser().parse_args(argv)
    check_target(options.out, SCORES)
    rows = [read_run(run) for run in options.runs]
    check_alike(rows)
    rows.sort(key=lambda row: (row["text_encoder"], row["parameters"]))
    with written_to(options.out), atomic_folder(options.out, keep=True) as partial:
        (partial / SCORES).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        draw(rows, partial / FIGURE)
    print(table(rows))
    print(options.out / FIGURE)


def read_run(run: Path) -> dict[str, Any]:
    """=> its text stage's name, its noise predictor's parameters, and every score that a study compares.

    Raises ValueError for a run that is not finished: a stage or the report is missing, or the report is of others.
    """
    path = run / "report" / "report.json"
    report = read_json(path)
    if report is None:
        raise UserError(f"{run}: no report yet; measure it: python -m eval {run} --data ... --out {path.parent}")
    measured = report["protocol"].get("stages", {})
    predictor = (lineage(run, drawer_of(measured)) or ["noise_predictor"])[-1]
    finals = {"text_encoder": run / "text_encoder" / "final", "noise_predictor": run / predictor / "final"}
    contracts = {kind: read_contract(final, kind) for kind, final in finals.items()}
    for kind, contract in contracts.items():
        if measured.get(kind) != contract["hash"]:
            raise UserError(f"{path}: measures another {kind} than {finals[kind]}; measure the run again")
    found: dict[str, dict[str, float]] = {}
    for split, judged in report.get("composition", {}).items():
        found[f"exact, {split}, %"] = {k: 100 * judged["all"][n] for k, n in _ENDS.items()}
    for name, one in report["distances"].items():
        found[name] = {k: one[n] for k, n in _FD_ENDS.items() if n in one}
    for name, one in report.get("diversity", {}).items():
        if name != "compared_with":
            what = "layouts" if name == "layouts" else f"diversity within a prompt, {name}"
            found[f"{what}, %"] = {k: 100 * one.get("vendi", one)[n] for k, n in _SHARE_ENDS.items()}
    networks = dict(report["protocol"].get("extractors", {}))
    if "clip" in report:
        networks["CLIP score"] = report["clip"]["hash"]
        found["CLIP score"] = {k: report["clip"]["x100"][n] for k, n in _MEAN_ENDS.items()}
    return {
        "run": str(run),
        "text_encoder": text_name(run, contracts["text_encoder"]),
        "text_hash": contracts["text_encoder"]["hash"],
        "parameters": contracts["noise_predictor"]["parameters"],
        "steps": contracts["noise_predictor"].get("steps"),
        "scores": found,
        "networks": networks,
        "protocol": {name: report["protocol"].get(name) for name in _ALIKE},
    }


_ENDS = {"value": "exact", "low": "low", "high": "high"}
_FD_ENDS = {"value": "fd", "low": "low", "high": "high"}
_SHARE_ENDS = {"value": "share", "low": "low", "high": "high"}
_MEAN_ENDS = {"value": "mean", "low": "low", "high": "high"}


def text_name(run: Path, contract: Mapping[str, Any]) -> str:
    """What a reader knows a text stage by: its encoder's name and its hash's beginning."""
    path = run / "text_encoder" / "config.yaml"
    values = read_yaml(path) if path.is_file() else {}
    name = (values.get("encoder") or {}).get("name") or "trained from nothing"
    return f"{Path(name).name} ({contract['hash'][:6]})"


def check_alike(rows: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError for fewer than two runs, for reports that do not ask the same or look by other networks that go
    by the same name, and for no score that all of them have."""
    if len(rows) < 2:
        raise UserError("expected at least two runs to compare")
    for row in rows[1:]:
        for name, value in row["protocol"].items():
            if value != rows[0]["protocol"][name]:
                raise UserError(
                    f"{row['run']}: measured with {name} {value}, {rows[0]['run']} with {rows[0]['protocol'][name]}; "
                    "measure both alike"
                )
        for name, value in row["networks"].items():
            if rows[0]["networks"].get(name, value) != value:
                raise UserError(f"{row['run']}: its {name} is by another network than {rows[0]['run']}'s; use one")
    if not in_common(rows):
        each = "; ".join(f"{row['run']} has {', '.join(row['scores'])}" for row in rows)
        raise UserError(f"no score that all runs have ({each}); measure them by the same --features")


def in_common(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The scores that all have."""
    return [name for name in rows[0]["scores"] if all(name in row["scores"] for row in rows)]


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A panel a score, a line a text stage, over the noise predictor's parameters."""
    from matplotlib.figure import Figure  # a second

    names = in_common(rows)
    figure = Figure(figsize=(3.6 * len(names), 3.4), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        for stage in dict.fromkeys(row["text_encoder"] for row in rows):
            own = [row for row in rows if row["text_encoder"] == stage]
            scores = [row["scores"][name] for row in own]
            ends = [[s["value"] - s.get("low", s["value"]) for s in scores]]
            ends.append([s.get("high", s["value"]) - s["value"] for s in scores])
            sizes = [row["parameters"] / 1e6 for row in own]
            axes.errorbar(sizes, [s["value"] for s in scores], yerr=ends, marker="o", ms=4, capsize=2, label=stage)
        axes.set(xscale="log", xlabel="noise predictor, million parameters", title=name)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize="small")
    figure.savefig(path)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for row in rows:
        scores = ", ".join(f"{name} {_shown(one)}" for name, one in row["scores"].items())
        lines.append(f"{row['text_encoder']}, {row['parameters'] / 1e6:.2f} M: {scores}  ({row['run']})")
    return "\n".join(lines)


def _shown(score: Mapping[str, float]) -> str:
    ends = f" [{score['low']:.3g}, {score['high']:.3g}]" if "low" in score else ""
    return f"{score['value']:.3g}{ends}"


def _parser() -> Parser:
    parser = Parser(
        prog="python -m eval.analysis.study", description="Text stages against noise predictors, of finished runs."
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run folders with report/report.json")
    parser.add_argument("--out", required=True, type=Path, help="folder for study.json and study.svg")
    return parser


if __name__ == "__main__":
    sys.exit(main())
