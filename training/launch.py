"""From the command line to a stage's folder: `--config FILE --run RUN [--steps N] [--any.field value]`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from sd_mini.config import Config, read
from training import loop

C = TypeVar("C", bound=Config)

# what may change from one start to the next without making it another training
_FREE = {"train.log_every", "train.preview_every", "train.checkpoint_every", "train.keep_last"}


@dataclass(frozen=True)
class Launch(Generic[C]):
    """A checked config, and where the run and the stage live."""

    config: C
    run: Path
    folder: Path


def parse(cls: type[C], stage: str, argv: Sequence[str]) -> Launch[C] | None:
    """Command line => the checked config and its folders; None when only help was asked for. Raises ValueError."""
    argv = list(argv)
    if "--help" in argv or "-h" in argv:
        print(help_text(cls, stage))
        return None
    config_file, run, steps = (_take(argv, name) for name in ("--config", "--run", "--steps"))
    if run is None:
        raise ValueError(f"expected --run FOLDER, for example --run runs/mine ({stage}/ is made in it)")
    if steps is not None:
        argv += ["--train.steps", steps]
    config = read(cls, config_file, argv)
    nearest = next(path for path in (Path(run), *Path(run).absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(
            f"--run {run}: {nearest} is {'not writable' if nearest.is_dir() else 'a file'}; give another folder"
        )
    return Launch(config, Path(run), Path(run) / stage)


def run(cls: type[C], stage: str, argv: Sequence[str], make_task: Callable[[Launch[C]], loop.Task]) -> None:
    """A stage's whole main: read, check, train, export. Nothing is written before config and data are known good."""
    started = time.perf_counter()
    launched = parse(cls, stage, argv)
    if launched is None:
        return
    claimed = _check_folder(launched)
    if (launched.folder / "final" / "stage.json").is_file():
        print(f"{launched.folder}: already trained and exported")
        return
    # as Accelerator would ask: without it two CPU processes would not find each other
    processes = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    with processes.main_process_first():  # the first encodes the caches, the others read them
        task = make_task(launched)
    training = loop.Loop(task, launched.config.train, launched.folder, started)
    if processes.is_main_process and not claimed:
        launched.folder.mkdir(parents=True, exist_ok=True)
        (launched.folder / "config.yaml").write_text(launched.config.to_yaml(), encoding="utf-8")
    processes.wait_for_everyone()
    training.run()


def _check_folder(launched: Launch[C]) -> bool:
    """Whether the stage's folder was started before. Raises ValueError, the fields named, if with another config."""
    path = launched.folder / "config.yaml"
    if not path.is_file():
        return False
    before = read(type(launched.config), path)
    now, then = _flat(launched.config.model_dump()), _flat(before.model_dump())
    changed = sorted(k for k in now.keys() | then.keys() if now.get(k) != then.get(k) and k not in _FREE)
    if changed:
        what = ", ".join(f"{k} was {then.get(k)!r}, now {now.get(k)!r}" for k in changed[:4])
        raise ValueError(f"{launched.folder} was started with another config: {what}; give another --run, or delete it")
    return True


def help_text(cls: type[Config], stage: str) -> str:
    """Every field with its type and docstring."""
    lines = [
        f"accelerate launch -m training.{stage} --config FILE --run RUN [--steps N] [--any.field value]",
        "",
        *_field_lines(cls, ""),
    ]
    return "\n".join(lines)


def _field_lines(cls: type[Config], prefix: str) -> list[str]:
    lines = []
    for name, field in cls.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Config):
            lines += _field_lines(field.annotation, f"{prefix}{name}.")
        else:
            kind = getattr(field.annotation, "__name__", None) or str(field.annotation).replace("typing.", "")
            lines.append(f"  --{prefix}{name} ({kind}) {field.description or ''}".rstrip())
    return lines


def _take(argv: list[str], name: str) -> str | None:
    """Remove `name VALUE` (or `name=VALUE`) from argv and return the value."""
    for i, word in enumerate(argv):
        if word == name:
            if i + 1 == len(argv):
                raise ValueError(f"{name}: expected a value after it")
            value = argv[i + 1]
            del argv[i : i + 2]
            return value
        if word.startswith(name + "="):
            del argv[i]
            return word.partition("=")[2]
    return None


def _flat(values: dict, prefix: str = "") -> dict[str, object]:
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
