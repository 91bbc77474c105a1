"""From the command line to a stage's folder: `--config FILE --run RUN [--steps N] [--any.field value]`."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml

from sd_mini.config import Config, read, read_yaml
from sd_mini.data.captioned import DataConfig
from sd_mini.data.parts import filled
from sd_mini.errors import UserError
from sd_mini.files import CONTRACT, atomic_text, only_writer
from sd_mini.processes import wait_for_everyone
from sd_mini.stages.contract import STAGES, kind_of, read_contract
from training.distributed.processes import follow_launcher, join_processes
from training.engine.best import BestKeeper
from training.engine.evaluation import EvaluateConfig
from training.engine.loop import Loop
from training.engine.metrics import check_trackers
from training.engine.reference import help_text
from training.engine.task import Origin, Task, TrainConfig
from training.storage import checkpoint

C = TypeVar("C", bound=Config)
REJECTED = "rejected.jsonl"  # in a stage's folder
DATA = "data.yaml"  # in a run: the data options of its first stage

# options of the data that change pixels, draws, or how many are scored; what the others change, the data's hash tells
_FIXED = {"resolution", "count", "seed", "background", "caption_weights"}

# What may change when a training is resumed: intervals of logging and saving; how the same sums are computed; paths of
# the data and the other stages, whose hashes a checkpoint holds.
_FREE = {
    *(f"train.{name}" for name in ("log_every", "valid_every", "preview_every", "checkpoint_every")),
    *(f"train.{name}" for name in ("keep_best", "patience")),
    *(f"train.{name}" for name in ("keep_last", "keep_every", "workers", "trace")),
    *(f"train.{name}" for name in ("accumulation", "gradient_checkpointing", "compile")),
    *(f"evaluate.{name}" for name in EvaluateConfig.model_fields),
    *(f"{part}.{name}" for part in ("data", "valid") for name in DataConfig.model_fields.keys() - _FIXED),
    *("resident", "text_encoder", "autoencoder", "noise_predictor"),
}

# errors of the disk or its permissions
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO}


@dataclass(frozen=True)
class Launch(Generic[C]):
    """A checked command line: the config, the folders of run and stage, the checkpoint to begin from, the trackers."""

    config: C
    run: Path
    folder: Path
    resume: Path | None = None
    log_with: tuple[str, ...] = ()
    begun_from: Path | None = None
    """the path given by --resume; `resume` is the checkpoint in it"""
    data_options: tuple[str, ...] = ()
    """the command line's options of `data` and `valid`, which the run's other stages inherit"""


@dataclass(frozen=True)
class Program(Generic[C]):
    """A stage as a program: its config, and the function from a launch to its task."""

    config: type[C]
    stage: str
    make_task: Callable[[Launch[C]], Task]

    def __call__(self, argv: Sequence[str]) -> None:
        """Read, check, train, export. Before config and data are checked only decoded pictures are written, to the
        run's cache."""
        started = time.perf_counter()
        launched: Launch[Any] | None = parse(self.config, self.stage, argv)
        if launched is None:
            return
        _check_folder(launched)
        exported = _exported_steps(launched.folder)
        is_over = exported is not None and _is_over(launched.folder, launched.config.train)
        if exported is not None and (
            is_over or max(exported, _reached(launched.folder)) >= launched.config.train.steps
        ):
            print(f"{launched.folder}: already trained and exported")
            return
        follow_launcher()
        processes = join_processes()
        launched.config.train.check(processes.num_processes)
        try:
            task = self.make_task(launched)
            begun_from = str(launched.begun_from.absolute()) if launched.begun_from is not None else None
            config = flat(launched.config.model_dump(mode="json"))
            origin = Origin(started, config, launched.resume, begun_from)
            loop = Loop(task, launched.config.train, launched.folder, origin, list(launched.log_with))
            if processes.is_main_process:
                launched.folder.mkdir(parents=True, exist_ok=True)
            with only_writer(launched.folder) if processes.is_main_process else nullcontext():
                if processes.is_main_process:
                    _save_data_options(launched)
                    atomic_text(launched.folder / "config.yaml", launched.config.to_yaml())
                    _save_rejected(launched.folder / REJECTED, task)
                wait_for_everyone()
                loop.run()
        except OSError as error:
            if error.errno not in _DISK:
                raise
            raise UserError(
                f"{launched.folder}: cannot be written ({error}); make room, or mend its permissions, and run the same "
                "command again"
            ) from error


def parse(cls: type[C], stage: str, argv: Sequence[str]) -> Launch[C] | None:
    """Command line => the checked config and its folders; None when only help was asked for. Raises ValueError."""
    argv = list(argv)
    if "--help" in argv or "-h" in argv:
        print(help_text(cls, stage))
        return None
    config_file, run, steps, resume, log_with = (
        _take(argv, name) for name in ("--config", "--run", "--steps", "--resume", "--log_with")
    )
    if run is None:
        raise UserError(f"expected --run FOLDER, for example --run runs/mine ({stage}/ is made in it)")
    if steps is not None:
        argv += ["--train.steps", steps]
    data_options = _data_options(argv)
    is_new = not (Path(run) / stage / "config.yaml").is_file()  # else its own config holds the data options
    config = read(cls, config_file, [*(_inherited_data(Path(run), data_options) if is_new else ()), *argv])
    parts: Any = config
    config = config.model_copy(update={"valid": filled(parts.data, parts.valid)})
    nearest = next(path for path in (Path(run), *Path(run).absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(
            f"--run {run}: {nearest} is {'not writable' if nearest.is_dir() else 'a file'}; give another folder"
        )
    folder, begun_from = Path(run) / stage, Path(resume) if resume is not None else None
    checkpoint_folder = _check_resume(config, folder, stage, begun_from) if begun_from is not None else None
    trackers = tuple(check_trackers((log_with or "tensorboard").split(",")))
    return Launch(config, Path(run), folder, checkpoint_folder, trackers, begun_from, tuple(data_options))


def _data_options(argv: Sequence[str]) -> list[str]:
    """Those of `--data.FIELD VALUE` and `--valid.FIELD VALUE` (or with =), as `--NAME=VALUE`."""
    options = []
    for word, following in pairwise([*argv, ""]):
        if word.startswith(("--data.", "--valid.")):
            options.append(word if "=" in word else f"{word}={following}")
    return options


def _inherited_data(run: Path, given: Sequence[str]) -> list[str]:
    """The data options of the run's first stage, if any; printed, as this command line does not have them.

    Those of a part whose source is among the `given` options are left out: they are of other data.
    """
    path = run / DATA
    others = {option.split(".")[0] for option in given if ".source=" in option}
    inherited = [f"--{name}={value}" for name, value in read_yaml(path).items()] if path.is_file() else []
    options = [option for option in inherited if option.split(".")[0] not in others]
    if options and os.environ.get("RANK", "0") == "0":
        print(f"{path}: {' '.join(options)}, from the run's first stage; your options override these", file=sys.stderr)
    return options


def _save_data_options(launched: Launch[C]) -> None:
    is_first = not any((launched.run / kind / "config.yaml").is_file() for kind in STAGES)
    if launched.data_options and is_first:
        pairs = (option.removeprefix("--").split("=", 1) for option in launched.data_options)
        atomic_text(launched.run / DATA, yaml.safe_dump(dict(pairs), sort_keys=False))


def _save_rejected(path: Path, task: Task) -> None:
    """The rows that this stage leaves out, one a line: part, source, id, reason."""
    if task.rejected or path.exists():
        atomic_text(path, "".join(f"{json.dumps(asdict(one), ensure_ascii=False)}\n" for one in task.rejected))


def _check_resume(config: Config, folder: Path, stage: str, path: Path) -> Path | None:
    """The checkpoint that --resume names. Raises UserError if this folder has another one, or the config differs.

    None if this folder began from it already: then its own newest checkpoint is resumed, so that the same command can
    be rerun.
    """
    newest = checkpoint.newest(folder / "checkpoints")[0]
    if newest is not None and checkpoint.load_state(newest).get("begun_from") == str(path.absolute()):
        return None
    try:
        start = checkpoint.find(path, stage)
    except ValueError as error:
        raise UserError(f"--resume {error}") from error
    if newest is not None and newest.resolve() != start.resolve():
        raise UserError(
            f"--resume {path}: {folder} already resumes from {newest}; leave --resume out, or give another --run"
        )
    state = checkpoint.load_state(start)
    _refuse_change(config, state["config"], state["step"], str(start), "give the config it was trained with")
    return start


def _check_folder(launched: Launch[C]) -> None:
    """Raises UserError, the fields named, where the stage's folder was started before with another config."""
    path = launched.folder / "config.yaml"
    if not path.is_file():
        return
    before = flat(read(type(launched.config), path).model_dump(mode="json"))
    reached = max(_reached(launched.folder), _exported_steps(launched.folder) or 0)
    _refuse_change(launched.config, before, reached, str(launched.folder), "give another --run, or delete it")


def _reached(folder: Path) -> int:
    """The step of the newest checkpoint of the stage in `folder`; 0 where there is none."""
    newest = checkpoint.newest(folder / "checkpoints")[0]
    return checkpoint.load_state(newest)["step"] if newest is not None else 0


def _exported_steps(folder: Path) -> int | None:
    """The steps after which the stage in `folder` was exported; none where it was not."""
    final = folder / "final"
    return read_contract(final, kind_of(folder.name)).get("steps") if (final / CONTRACT).is_file() else None


def _is_over(folder: Path, config: TrainConfig) -> bool:
    """Whether a training has no patience left: another look without a better one would be one too many."""
    return config.keep_best is not None and BestKeeper(folder, config.keep_best, config.patience).is_over


def _refuse_change(config: Config, then: dict[str, Any], reached: int, where: str, mend: str) -> None:
    """Raises UserError for changed fields. `train.steps` may change, but not to below `reached`."""
    now = flat(config.model_dump(mode="json"))
    free = _FREE | ({"train.steps"} if now["train.steps"] >= reached else set())
    changed = sorted(k for k in now.keys() | then.keys() if now.get(k) != then.get(k) and k not in free)
    if changed:
        what = ", ".join(f"{k} was {then.get(k)!r}, now {now.get(k)!r}" for k in changed[:4])
        raise UserError(f"{where} was started with another config: {what}; {mend}")


def _take(argv: list[str], name: str) -> str | None:
    """Remove `name VALUE` (or `name=VALUE`) from argv and return the value."""
    for i, word in enumerate(argv):
        if word == name:
            if i + 1 == len(argv):
                raise UserError(f"{name}: expected a value after it")
            value = argv[i + 1]
            del argv[i : i + 2]
            return value
        if word.startswith(name + "="):
            del argv[i]
            return word.partition("=")[2]
    return None


def flat(values: dict, prefix: str = "") -> dict[str, Any]:
    """Nested values => "outer.inner" => value."""
    flattened: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flattened |= flat(value, f"{prefix}{key}.")
        else:
            flattened[prefix + key] = value
    return flattened
