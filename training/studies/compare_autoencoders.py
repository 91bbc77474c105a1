"""Judge autoencoders by what can be learned over them: the better reconstruction is often the worse latent space.

python -m training.studies.compare_autoencoders RUN RUN... --config training/configs/shapes/noise_predictor.yaml \\
    --text_encoder RUN/text_encoder/final --steps 700 --out runs/compared

On the shapes world, whose pictures can be judged.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sd_mini.cli.arguments import Parser, whole_number
from sd_mini.config import command
from sd_mini.errors import UserError
from sd_mini.files import atomic_text, check_writable
from sd_mini.stages.contract import read_contract
from training.noise_predictor import task as noise_predictor
from training.studies import judged

RESULTS = "compared.json"


def main(argv: Sequence[str] | None = None) -> int:
    return command(_main, argv)


def _main(argv: Sequence[str]) -> None:
    options, overrides = _parser().parse_known_args(argv)
    text = read_contract(options.text_encoder, "text_encoder")
    contracts = [read_contract(folder, "autoencoder") for folder in options.autoencoders]
    if len(contracts) < 2 or len({contract["hash"] for contract in contracts}) < len(contracts):
        raise UserError("expected at least two autoencoders to compare, each of them once")
    check_writable(options.out)
    rows = []
    for folder, contract in zip(options.autoencoders, contracts, strict=True):
        name = f"{len(rows)}-{contract['hash'][:8]}"
        run = options.out / name
        _train(options, folder, run, overrides)
        prompts = ["--prompts", str(options.prompts)] if options.prompts is not None else []
        report = judged.report(run, run / "report", *prompts)
        rows.append(_row(str(folder), name, contract, report))
        found = {"text_encoder": text["hash"], "steps": options.steps, "autoencoders": rows}
        atomic_text(options.out / RESULTS, json.dumps(found, indent=2) + "\n")
    print(table(rows))
    print(options.out / RESULTS)


def _train(options: Any, autoencoder: Path, run: Path, overrides: Sequence[str]) -> None:
    """The same short stage 3 over this autoencoder: same seed, data, text stage and number of updates."""
    stages = ["--autoencoder", str(autoencoder.absolute()), "--text_encoder", str(options.text_encoder.absolute())]
    argv = ["--config", str(options.config), "--run", str(run), "--steps", str(options.steps), *stages, *overrides]
    noise_predictor.main(argv)
    judged.link(run, {"autoencoder/final": autoencoder, "text_encoder/final": options.text_encoder})


def _row(folder: str, run: str, contract: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    exact = {split: scores["all"] for split, scores in report.get("composition", {}).items()}
    ceiling = {split: scores["all"]["exact"] for split, scores in report.get("ceiling", {}).items()}
    return {
        "autoencoder": folder,
        "run": run,
        "latent_shape": contract["latent_shape"],
        "psnr": report["reconstruction"]["psnr"],
        "exact": exact,
        "ceiling": ceiling,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Reconstruction beside what came of it: PSNR, and exact % [95 % interval] of n and the ceiling by split."""
    lines = []
    for row in rows:
        shape = " x ".join(map(str, row["latent_shape"]))
        lines.append(f"{row['autoencoder']}: latents {shape}, {row['psnr']:.2f} dB")
        for split, score in row["exact"].items():
            interval = f"[{100 * score['low']:.1f}, {100 * score['high']:.1f}]"
            lines.append(
                f"  {split:>18} {100 * score['exact']:5.1f} % {interval} of {score['n']:.0f}, "
                f"ceiling {100 * row['ceiling'][split]:.1f} %"
            )
    return "\n".join(lines)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m training.studies.compare_autoencoders",
        description="Train the same short stage 3 over each autoencoder, and measure. --any.field value changes it.",
    )
    parser.add_argument(
        "autoencoders", metavar="AUTOENCODER", nargs="+", type=Path, help="exported stages, at least two"
    )
    parser.add_argument("--config", required=True, type=Path, help="of stage 3")
    parser.add_argument("--text_encoder", required=True, type=Path, help="exported text stage, the same for all")
    parser.add_argument("--steps", type=whole_number(1), default=700, help="updates of stage 3 over each (%(default)s)")
    parser.add_argument("--prompts", type=whole_number(1), help="a split, that it measures; its own number if left out")
    parser.add_argument("--out", required=True, type=Path, help="folder of the runs; the same command goes on in it")
    return parser


if __name__ == "__main__":
    sys.exit(main())
