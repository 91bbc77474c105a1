"""Faults to plant in a child process (tests/launching.py): each is a small object whose call changes the child."""

import os
import resource
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch

from training.engine.learner import Learner
from training.engine.loop import Loop
from training.storage import checkpoint


@dataclass(frozen=True)
class KillAt:
    """SIGKILL in step `step` when so many of its passes have been made; on rank `rank` only."""

    step: int
    passes: int = 0
    rank: int = 0

    def __call__(self) -> None:
        self.on_reaching(lambda: os.kill(os.getpid(), signal.SIGKILL))

    def on_reaching(self, act) -> None:
        update, exchanging = Loop.update, Learner.exchanging
        now = [-1, 0]

        def noting(loop, inputs):
            now[:] = [inputs.step, 0]
            update(loop, inputs)

        def counting(learner, last_pass):
            if now == [self.step, self.passes] and int(os.environ.get("RANK", 0)) == self.rank:
                act()
            now[1] += 1
            return exchanging(learner, last_pass)

        Loop.update, Learner.exchanging = noting, counting


@dataclass(frozen=True)
class RaiseAt(KillAt):
    """An exception instead: a fault of the code on one rank."""

    def __call__(self) -> None:
        def act():
            raise RuntimeError("a fault on one rank")

        self.on_reaching(act)


@dataclass(frozen=True)
class StopAt(KillAt):
    """SIGTERM to every process of the job, as schedulers do: this one and its loader's workers."""

    def __call__(self) -> None:
        os.setpgrp()  # the workers will be of this group, and the tests are not
        self.on_reaching(lambda: os.killpg(0, signal.SIGTERM))


@dataclass(frozen=True)
class DiskFull:
    """No file can grow beyond `size` bytes: writes fail as on a full disk."""

    size: int

    def __call__(self) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


@dataclass(frozen=True)
class DiskFullAfter:
    """A full disk after the checkpoint of `step`."""

    step: int
    size: int = 20_000

    def __call__(self) -> None:
        save = checkpoint.save

        def saving(root, step, *args):
            folder = save(root, step, *args)
            if step == self.step and root.name == "checkpoints":
                DiskFull(self.size)()
            return folder

        checkpoint.save = saving


@dataclass(frozen=True)
class ReadOnlyAfter:
    """After the checkpoint of `step` nothing can be made in its folder, not even by root."""

    step: int

    def __call__(self) -> None:
        save = checkpoint.save

        def saving(root, step, *args):
            folder = save(root, step, *args)
            if step == self.step and root.name == "checkpoints":
                root.chmod(0o555)
                drop_capabilities()
            return folder

        checkpoint.save = saving


class Hold:
    """Hold a stage's folder from another process for as long as the block lasts."""

    def __init__(self, folder: Path):
        code = (
            f"import fcntl; f = open({str(folder / '.lock')!r}, 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(1); input()"
        )
        self.command = [sys.executable, "-c", code]

    def __enter__(self) -> None:
        self.holder = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.holder.stdout.readline()

    def __exit__(self, *error: object) -> None:
        self.holder.communicate(b"")


def drop_capabilities() -> None:
    """Make root heed permission bits as everybody does (capset(2), version 3)."""
    import ctypes

    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(header, nothing) == 0


def save_and_die(root: Path, step: int, size: int, line: int | None, counted: Path) -> None:
    """Save a checkpoint, and be killed by SIGKILL before the `line`-th line of the code that writes it is run.

    Without `line`: live, and write how many lines there were to `counted`.
    """
    numbers, seen = count(1), [0]

    def watch(frame, event, argument):
        name = Path(frame.f_code.co_filename).name
        if name not in ("checkpoint.py", "files.py"):
            return None
        if event == "line":
            seen[0] = number = next(numbers)
            if number == line:
                os.kill(os.getpid(), signal.SIGKILL)
        return watch

    threading.settrace(watch)
    sys.settrace(watch)
    checkpoint.save(root, step, state_of(step, size), {"step": step}, 1)
    sys.settrace(None)
    counted.write_text(str(seen[0]))


def state_of(step: int, size: int) -> dict[str, dict[str, torch.Tensor]]:
    """A checkpoint's tensors that can be told from another step's."""
    return {
        name: {"a": torch.full((size,), float(step)), "b": torch.arange(3) + step} for name in ("model", "optimizer")
    }


@dataclass(frozen=True)
class Fsdp2:
    """No fault: what `accelerate launch --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy POLICY` sets."""

    policy: str = "NO_WRAP"
    then: KillAt | None = None

    def __call__(self) -> None:
        names = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": self.policy}
        os.environ.update(
            names | {"FSDP_TRANSFORMER_CLS_TO_WRAP": "PRXBlock", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
        )
        if self.then is not None:
            self.then()


class Canary:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)
