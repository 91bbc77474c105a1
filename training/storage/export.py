"""Export a stage from any checkpoint of a training, or with an average of any width, without further training.

python -m training.storage.export runs/mine/noise_predictor --out runs/mine/narrow [--step N] [--ema_width 0.03]

What it writes is a stage like `final/`: `Pipeline.from_stages` takes it.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import torch

from sd_mini.config import command, read
from sd_mini.errors import UserError
from sd_mini.files import CONTRACT, check_writable
from sd_mini.stages.contract import STAGES, kind_of, program_of, read_contract
from training.engine.launch import Launch
from training.engine.task import export_record, mean_scores
from training.optim.ema import WIDTHS
from training.storage import checkpoint, snapshots


def export(folder: Path, out: Path, step: int | None = None, ema_width: float | None = None) -> str:
    """Write the stage trained in `folder` to `out`, as it was at `step`. Returns its hash.

    `step`: of a checkpoint that is still there, or of a snapshot of the averages; none: the newest. `ema_width`: any
    width where a snapshot was taken at that step, 0.05 and 0.10 at every checkpoint; none: the width of the training's
    config. Raises ValueError where there is no such checkpoint or snapshot, or the data or the other stages are not
    those it was trained on.
    """
    if folder.name not in STAGES or not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: expected a stage's folder, RUN/STAGE with its config.yaml; {', '.join(STAGES)}")
    if out.exists() and not (out / CONTRACT).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: holds something else than an exported stage; give a new folder")
    check_writable(out)
    program = import_module(f"{program_of(folder.name)}.task").main
    config = read(program.config, folder / "config.yaml")
    width = config.train.ema_width if ema_width is None else ema_width
    if width is not None and config.train.ema_width is None:
        raise UserError(f"--ema_width {width}: {folder} was trained without averages; leave it out")
    task = program.make_task(Launch(config, folder.parent, folder))
    objective = next(iter(task.players.values())).objective
    snapshot = snapshots.of_step(folder, step) if step is not None and width is not None else None
    is_pruned = snapshot is not None and step is not None and not checkpoint.named(folder, step).is_dir()
    # if the checkpoint was pruned its averages are in the snapshot; frozen weights are those of any other checkpoint
    saved = _checkpoint(folder, None if is_pruned else step)
    tensors, state = checkpoint.load(saved)
    checkpoint.check_identity(saved, state, task.identity)
    checkpoint.check_keys(f"{saved}/model.safetensors", tensors["model"], objective.state_dict())
    objective.load_state_dict(tensors["model"])
    if is_pruned:
        tensors = checkpoint.load(snapshot)[0]
        state |= {"step": step, "seconds": state["seconds"] * step / state["step"]}
    if width is not None:
        at_step = tensors[f"ema-{width}"] if width in WIDTHS else snapshots.at_width(folder, state["step"], width)
        snapshots.put(objective, at_step)
    objective.requires_grad_(False).eval()
    with torch.no_grad():
        scores = task.validate(objective, slice(0, task.valid_count))
        means = mean_scores({name: values.tolist() for name, values in scores.items()}, task.valid_sources)
        task.export(objective, out, export_record(objective, state["seconds"], state["step"], means, width))
    return read_contract(out, kind_of(folder.name))["hash"]


def _checkpoint(folder: Path, step: int | None) -> Path:
    if step is None:
        return checkpoint.find(folder, folder.name)
    return checkpoint.find(checkpoint.named(folder, step), folder.name)


def main(argv: Sequence[str]) -> None:
    parser = ArgumentParser(prog="python -m training.storage.export", description=__doc__.splitlines()[0])
    parser.add_argument("stage", type=Path, help="RUN/STAGE, where it was trained")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write the stage to")
    parser.add_argument("--step", type=int, help="of a checkpoint or snapshot; the newest if not given")
    parser.add_argument("--ema_width", type=float, help="relative width of the average, 0.01 to 0.28")
    options = parser.parse_args(argv)
    digest = export(options.stage, options.out, options.step, options.ema_width)
    print(f"{options.out}: {options.stage.name} {digest[:12]}")


if __name__ == "__main__":
    sys.exit(command(main))
