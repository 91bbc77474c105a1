"""Costs measured side by side in one process tree: medians, ranges and ratios.

python -m training.benchmarks [--only PART] [--out FILE] [--config FILE] [--run RUN] [--any.field value]
    stage 3: training, mfu, time_to_score, pipeline, profile; RUN is a finished run such as runs/shapes
python -m training.benchmarks loop STAGE --config FILE --run RUN
python -m training.benchmarks save
python -m training.benchmarks encode TEXT_STAGE
python -m training.benchmarks decode AUTOENCODER
python -m training.benchmarks autoencoder --config FILE --run RUN
python -m training.benchmarks curves CONFIG CONFIG --seconds 60
python -m training.benchmarks cleaning ROWS
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sd_mini.cli.arguments import Parser
from sd_mini.config import command
from sd_mini.errors import UserError
from sd_mini.files import atomic_text, check_writable, read_json
from sd_mini.stages.contract import read_contract
from training.benchmarks import autoencoder, cleaning, costs, pipeline, predictor, score

STAGE_3: dict[str, Callable[[Sequence[str]], Any]] = {
    "training": predictor.training_speed,
    "mfu": predictor.utilisation,
    "time_to_score": score.time_to_score,
    "pipeline": pipeline.pipeline_speed,
    "profile": predictor.profiled,
}
OTHERS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {  # and what each expects after its name
    "loop": (costs.loop_cost, "STAGE --config FILE --run RUN"),
    "save": (costs.save_cost, ""),
    "encode": (costs.encode_cost, "TEXT_STAGE"),
    "decode": (costs.decode_cost, "AUTOENCODER"),
    "autoencoder": (autoencoder.training_speed, "--config FILE --run RUN"),
    "curves": (autoencoder.curves, "CONFIG CONFIG"),
    "cleaning": (cleaning.cleaning, "ROWS"),
}


def main(argv: Sequence[str]) -> None:
    if not argv or argv[0].startswith("--"):
        return stage_3(argv)
    name, *rest = argv
    benchmark, usage = OTHERS.get(name, (None, ""))
    takes_options = "--" in usage or name == "curves"
    if benchmark is None or (not rest if takes_options else len(rest) != len(usage.split())):
        usages = ", ".join(f"`{other} {usage}`".replace(" `", "`") for other, (_, usage) in OTHERS.items())
        raise UserError(f"{' '.join(argv)}: expected no name (stage 3), or one of {usages}")
    return benchmark(rest)


def stage_3(argv: Sequence[str]) -> None:
    """All parts, or `--only` one: their figures, also in `--out` as JSON, where other parts are kept."""
    parser = Parser(
        prog="python -m training.benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", choices=list(STAGE_3), help="one part; all if left out")
    parser.add_argument("--out", type=Path, default=Path("benchmark.json"), help="(%(default)s)")
    parser.add_argument("--config", default="training/configs/shapes/noise_predictor.yaml", help="(%(default)s)")
    parser.add_argument("--run", default="runs/shapes", help="whose stages 1 and 2 are trained (%(default)s)")
    options, overrides = parser.parse_known_args(argv)
    words = ["--config", options.config, "--run", options.run, *overrides]
    launched = predictor.parsed(words)
    check_writable(options.out)
    for kind in ("text_encoder", "autoencoder"):
        read_contract(launched.run / kind / "final", kind)
    report = read_json(options.out) or {}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    report["machine"] = {"cores": os.cpu_count(), "torch": torch.__version__, "device": device}
    for name in [options.only] if options.only else STAGE_3:
        print(f"# {name}")
        report[name] = STAGE_3[name](words)
        atomic_text(options.out, json.dumps(report, indent=2) + "\n")
    print(options.out)


if __name__ == "__main__":
    sys.exit(command(main))
