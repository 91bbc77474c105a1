"""`sd-mini inspect`: what a run folder or a picture holds, in lines a person reads."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sd_mini.errors import UserError
from sd_mini.files import CONTRACT, PIPELINE_MARK, read_json
from sd_mini.stages.contract import (
    DRAWERS,
    FAMILIES,
    GENERATOR,
    KINDS,
    STAGES,
    TUNED,
    check_belonging,
    drawer_of,
    kind_of,
    read_contract,
)
from sd_mini.texts import printable


def add_command(commands: Any) -> None:
    parser = commands.add_parser("inspect", help="print what a run holds, or what a picture was made with")
    parser.set_defaults(run_command=run)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder, or a PNG that sd-mini made")


def run(options: argparse.Namespace) -> None:
    print(*(settings_in(options.run) if options.run.is_file() else inspect(options.run)), sep="\n")


def settings_in(picture: Path) -> list[str]:
    """Lines: what a PNG was made with. Raises UserError for one without."""
    from sd_mini import png

    found = png.read_all(picture)
    lines = [str(picture)]
    for number, settings in enumerate(found):
        lines += [f"picture {number} of {len(found)}"] if len(found) > 1 else []
        lines += [f"  {printable(name):23}{printable(str(value))}" for name, value in png.described(settings).items()]
    return lines


def inspect(run: Path) -> list[str]:
    """Lines: the stages, whether they belong together, the pipeline, the report. Raises ValueError for none."""
    finals = {stage: run / stage / "final" for stage in STAGES}
    contracts = {s: read_contract(final, kind_of(s)) for s, final in finals.items() if (final / CONTRACT).is_file()}
    index = read_json(run / "pipeline" / PIPELINE_MARK)
    report = read_json(run / "report" / "report.json")
    if not contracts and index is None and report is None:
        raise UserError(
            f"{run}: no exported stage, pipeline or report here; expected a run folder, such as runs/shapes"
        )
    rows = {kind: _stage_facts(contracts[kind]) if kind in contracts else ["not trained yet"] for kind in KINDS}
    rows |= {stage: _stage_facts(contracts[stage]) for stage in (*TUNED, *FAMILIES) if stage in contracts}
    rows["stages"] = _belonging(contracts)
    rows["pipeline"] = [
        f"not there; join the stages: sd-mini export {run}" if index is None else _joined(index, contracts)
    ]
    rows["report"] = ["not there"] if report is None else _report_facts(report)
    lines = [f"  {'' if i else name:17}{fact}" for name, facts in rows.items() for i, fact in enumerate(facts)]
    return [str(run), *lines]


_EFFORT = {"steps": "{:,} steps", "seconds": "{:,.0f} s", "parameters": "{:,} parameters"}


def _stage_facts(contract: dict[str, Any]) -> list[str]:
    """A stage's contract => lines: effort, shapes, data, scores. What its training did not record is left out."""
    effort = [text.format(contract[name]) for name, text in _EFFORT.items() if name in contract]
    facts = [", ".join([contract["hash"][:12], *effort])]
    for name, what in (("latent_shape", "latents"), ("conditioning", "prompt embeddings")):
        if name in contract:
            facts.append(f"{what} {' x '.join(str(side) for side in contract[name])}")
    if "data" in contract:
        facts.append(f"data {contract['data']['name']}, {contract['data']['count']:,} pictures")
    if "scores" in contract:
        facts.append(", ".join(f"{name} {value:.4g}" for name, value in contract["scores"].items()))
    return facts


def _belonging(contracts: dict[str, dict[str, Any]]) -> list[str]:
    predictors = {stage: contracts[stage] for stage in DRAWERS if stage in contracts}
    others = {kind: contracts[kind] for kind in KINDS[:2] if kind in contracts}
    if not predictors or len(others) < 2:
        return ["whether they belong together shows when all three are trained"]
    faults, hashes = [], [contract["hash"] for contract in predictors.values()]
    for stage, contract in predictors.items():
        try:
            check_belonging(contract, **others)
        except ValueError as error:
            faults.append(str(error))
        if stage in TUNED and contract["tuned_from"] not in hashes:
            faults.append(f"{stage} was tuned from another noise predictor, {contract['tuned_from'][:12]}")
    return faults or ["belong together"]


def _joined(index: dict[str, Any], contracts: dict[str, dict[str, Any]]) -> str:
    defaults = f"{index['resolution']} px, {index['default_steps']} steps, guidance {index['default_guidance']}"
    stage_of = {contract["hash"]: stage for stage, contract in contracts.items()}
    kinds = [kind for kind in (*KINDS, GENERATOR) if kind in index["stages"] or kind in KINDS[:2]]
    others = [
        f"{kind} {index['stages'].get(kind, 'none')[:12]}"
        for kind in kinds
        if index["stages"].get(kind) not in stage_of
    ]
    if others:
        return f"{defaults}; joined from other stages: {', '.join(others)}"
    predictor = stage_of.get(drawer_of(index["stages"]))
    which = f", the noise predictor of {predictor}" if predictor in TUNED else ""
    which = f", the latents drawn by {predictor}" if predictor in FAMILIES else which
    return f"{defaults}; joined from these stages{which}"


def _report_facts(report: dict[str, Any]) -> list[str]:
    facts = [
        f"{split}: exact {100 * categories['all']['exact']:.1f} % of {categories['all']['n']:,}"
        for split, categories in report.get("composition", {}).items()
    ]
    if "reconstruction" in report:  # which a folder of pictures has none of
        reconstruction = report["reconstruction"]
        facts.append(f"reconstruction {reconstruction['psnr']:.2f} dB over {reconstruction['n']:,}")
    return [*facts, f"{report['seconds']['total']:,.0f} s in all"]
