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


def recorder(files: dict[str, None]):
    """A profile function that notes the files of ROOTS in which a function is called, in order of the first call."""

    def profile(frame, event, argument):
        if event == "call" and frame.f_code.co_name != "<module>":
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ROOTS:
                files.setdefault(path.relative_to(ROOT).as_posix())

    return profile


def files_called(call: Callable[[], object]) -> list[str]:
    """The files of ours that one call passes through."""
    files: dict[str, None] = {}
    with one_thread():  # a profile is of one thread
        sys.setprofile(recorder(files))
        try:
            call()
        finally:
            sys.setprofile(None)
    return list(files)


def counted(files: list[str]) -> list[str]:
    """The walk, with all that lies behind the door as one."""
    return list(dict.fromkeys(DOOR if name.startswith(f"{DOOR}/") else name for name in files))


def step_walk(run: Path, folder: Path) -> list[str]:
    """The second of four steps of the smoke noise predictor, as the loop itself runs it: from the update to the next
    batch, with its log line. The first one also counts FLOPs. `run` holds stages 1 and 2."""
    from sd_mini.config import read
    from tests.support.launching import MAINS, SMOKE
    from training.engine.launch import Launch
    from training.engine.loop import Loop
    from training.engine.task import Origin

    stages = {name: str(run / name / "final") for name in ("text_encoder", "autoencoder")}
    config = read(MAINS["noise_predictor"].config, SMOKE / "noise_predictor.yaml").model_copy(update=stages)
    (folder / "noise_predictor").mkdir(parents=True)
    task = MAINS["noise_predictor"].make_task(Launch(config, folder, folder / "noise_predictor"))
    rare = {"preview_every": 4, "checkpoint_every": 4, "ema_snapshots": 1}
    train = config.train.model_copy(update={"steps": 4, "ema_every": 1, "log_every": 1} | rare)
    loop = Loop(task, train, folder / "noise_predictor", Origin(0.0, {}), [])
    files: dict[str, None] = {}
    update = loop.update

    def traced(inputs):
        sys.setprofile(recorder(files) if loop.step == 1 else None)
        update(inputs)

    loop.update = traced
    with one_thread():  # a profile is of one thread
        loop.run()
    return list(files)


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
