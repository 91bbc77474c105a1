"""The files of ours that one training step and one picture pass through: `python -m tests.walks`.

A file counts when a function of it is called. sd_mini/cpu stands behind one door: what it computes is diffusers' own
forward pass, so it counts as one file, and its files are listed apart.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from sd_mini import Pipeline
from sd_mini.cpu.threads import one_thread

ROOT = Path(__file__).parent.parent
ROOTS = ("sd_mini", "training", "eval")
DOOR = "sd_mini/cpu"
STEP, PICTURE = 9, 9  # files at most


def files_called(call: Callable[[], object]) -> list[str]:
    """The files of ROOTS in which a function was called, in order of the first call."""
    files: dict[str, None] = {}

    def profile(frame, event, argument):
        if event == "call" and frame.f_code.co_name != "<module>":
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ROOTS:
                files.setdefault(path.relative_to(ROOT).as_posix())

    with one_thread():  # a profile is of one thread
        sys.setprofile(profile)
        try:
            call()
        finally:
            sys.setprofile(None)
    return list(files)


def counted(files: list[str]) -> list[str]:
    """The walk, with all that lies behind the door as one."""
    return list(dict.fromkeys(DOOR if name.startswith(f"{DOOR}/") else name for name in files))


def step_walk(run: Path, folder: Path) -> list[str]:
    """One update of the smoke noise predictor: from fetching the batch to the log line. `run` holds stages 1 and 2."""
    from sd_mini.config import read
    from tests.support.launching import MAINS, SMOKE
    from training.engine.batches import iterate
    from training.engine.launch import Launch
    from training.engine.loop import Loop, Stop
    from training.engine.task import Origin

    stages = {name: str(run / name / "final") for name in ("text_encoder", "autoencoder")}
    config = read(MAINS["noise_predictor"].config, SMOKE / "noise_predictor.yaml").model_copy(update=stages)
    (folder / "noise_predictor").mkdir(parents=True)
    task = MAINS["noise_predictor"].make_task(Launch(config, folder, folder / "noise_predictor"))
    train = config.train.model_copy(update={"ema_every": 1})
    loop = Loop(task, train, folder / "noise_predictor", Origin(0.0, {}), [])
    loop.watch.start({}, 0)
    batches, stop = iterate(loop.steps, 0, train.steps, 0), Stop(1)

    def step():
        loop.update(next(batches))
        loop.watch.bar.update()
        loop.pace.add(1.0)
        stop.is_asked()
        loop.log()

    step()  # the first one also counts the FLOPs of an update and the speed of the machine
    return files_called(step)


def picture_walk(pipeline: Pipeline) -> list[str]:
    """One picture of one prompt."""
    generator = torch.Generator().manual_seed(0)
    return files_called(lambda: pipeline("a small red circle", generator=generator))


def main() -> None:
    from tests.support.launching import MAINS, launch

    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        codes = [launch(stage, run, "--log_with", "none") for stage in MAINS]
        assert not any(codes)
        walks = {"step": (step_walk(run, Path(name) / "walk"), STEP)}
        walks["picture"] = picture_walk(Pipeline.from_run(run)), PICTURE
    for what, (files, most) in walks.items():
        print(
            f"one {what}: {len(counted(files))} files, at most {most}; all files of {DOOR} by themselves {len(files)}"
        )
        print("".join(f"  {file}\n" for file in files), end="")


if __name__ == "__main__":
    main()
