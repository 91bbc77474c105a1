"""The processes of a training: their cores, their memory, how they are stopped, what Accelerate makes of them."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    ProjectConfiguration,
    parse_flag_from_env,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

from sd_mini.errors import UserError
from sd_mini.memory import keep_freed_memory


def join_processes() -> PartialState:
    """The state all processes share, as Accelerator would ask for it; else CPU processes do not find each other."""
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    if is_shared():
        patient_group()
    return state


def patient_group() -> dist.ProcessGroup:
    """All processes, by gloo, for waiting on the CPU however long one of them works alone."""
    return _patient_group(dist.group.WORLD)


@lru_cache(maxsize=1)
def _patient_group(of: dist.ProcessGroup) -> dist.ProcessGroup:
    return dist.new_group(backend="gloo", timeout=timedelta(days=365))


def wait_for_everyone() -> None:
    """Return once every process is here. One may measure, decode or copy for hours before it comes; a collective of
    NCCL gives up after ten minutes, one of gloo after thirty."""
    if is_shared():
        dist.barrier(group=patient_group())


def make_accelerator(mixed_precision: str | None, folder: Path, log_with: list[str]) -> Accelerator:
    """Accelerate for a training in `folder`. Raises ValueError for float16, which would need a loss scaler's state."""
    _check_environment()
    project = ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder))
    AcceleratorState._reset_state()  # of another training in this process, which may have had another precision
    precision = chosen_precision(mixed_precision, join_processes().device)
    accelerator = Accelerator(mixed_precision=precision, log_with=log_with or None, project_config=project)
    if accelerator.mixed_precision == "fp16":
        raise UserError("mixed precision fp16: expected no or bf16, whose range needs no loss scaling")
    if accelerator.distributed_type == DistributedType.MULTI_CPU and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        # Accelerate asks for FSDP only where there are GPUs; the same code shards over CPU processes just as well
        AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin()
    if accelerator.distributed_type == DistributedType.FSDP:
        _check_fsdp(accelerator)
    if accelerator.device.type == "cpu":
        tune_cpu(accelerator.num_processes)
    return accelerator


# what `accelerate launch` says through the environment and a config field of ours decides, with the value that says
# nothing
_OURS = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "--train.accumulation N"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "--train.compile BACKEND"),
}
_OTHERS = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG")


def _check_environment() -> None:
    """Raises UserError for what Accelerate would change of the arithmetic behind the config's back."""
    for name, (usual, ours) in _OURS.items():
        if (value := os.environ.get(name, usual)).lower() != usual:
            raise UserError(f"{name}={value}: a launch takes it from its config; leave it out and give {ours}")
    for name in _OTHERS:
        if parse_flag_from_env(name):
            raise UserError(f"{name}: expected plain data parallelism or FSDP2; launch without it")


def chosen_precision(asked: str | None, device: torch.device) -> str | None:
    """What was asked for, "auto" made "bf16" where `device` multiplies in it, and elsewhere "no"."""
    if asked != "auto":
        return asked
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has = getattr(torch.cpu, "get_capabilities", dict)()  # a newer torch than the oldest that will do
        able = any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return "bf16" if able else "no"


@contextmanager
def rounded_products() -> Iterator[None]:
    """Inside, a GPU's float32 products may be rounded to 10 bits (TF32): finer than the 7 of bfloat16 beside them.

    Muon's alone would take a tenth of an update of 100M parameters in full float32.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _check_fsdp(accelerator: Accelerator) -> None:
    if not accelerator.is_fsdp2:
        raise UserError("FSDP: expected version 2; launch with --fsdp_version 2")
    plugin = accelerator.state.fsdp_plugin
    # every process has built its own weights and buffers from the seed, so none has to send them to the others
    plugin.cpu_ram_efficient_loading = False
    # autocast alone decides what is computed in bfloat16, as without FSDP: weights, targets and sums stay float32
    plugin.mixed_precision_policy = MixedPrecisionPolicy()


def follow_launcher() -> None:
    """When `accelerate launch` is told to stop it dies without a word to us: let the kernel pass that on as SIGTERM."""
    parent = Path(f"/proc/{os.getppid()}/cmdline")
    if parent.is_file() and b"accelerate" in parent.read_bytes():
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def is_shared() -> bool:
    """Whether other processes have a part of the batch."""
    return dist.is_initialized() and dist.get_world_size() > 1


def share(count: int, processes: int, rank: int) -> slice:
    """The rows of `count` that process `rank` looks at: every row is some process's, and no row is two's."""
    return slice(count * rank // processes, count * (rank + 1) // processes)


def joined_rows(
    own: dict[str, np.ndarray], rows: slice, count: int, accelerator: Accelerator
) -> dict[str, list[float]]:
    """Each process's scores of its own `rows` => the scores of all `count` rows, on every process."""
    table = torch.zeros(len(own), count, dtype=torch.float64)  # each process fills its own columns, the sum all
    table[:, rows] = torch.from_numpy(np.stack([np.asarray(scores, np.float64) for scores in own.values()]))
    if accelerator.num_processes > 1:
        table = accelerator.reduce(table.to(accelerator.device), "sum")
    return dict(zip(own, table.tolist(), strict=True))


def tune_cpu(processes: int) -> None:
    """Use every core, flush denormals, and let glibc keep large freed blocks instead of faulting them in each step.

    `OMP_NUM_THREADS`, where the user has set it, is the number of threads. Measured on two cores: denormal numbers in
    young gradients and Adam moments halve the speed of the autoencoder; keeping blocks takes 13 % off a step of the
    shapes noise predictor.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = _users_environment().get("OMP_NUM_THREADS", "")
    torch.set_num_threads(int(asked) if asked.isdecimal() and int(asked) else max(cores // processes, 1))
    torch.set_flush_denormal(True)
    keep_freed_memory()


_LAUNCHERS = {"accelerate", "accelerate-launch", "accelerate.commands.launch", "accelerate.commands.accelerate_cli"}
_LAUNCHERS |= {"launch.py", "accelerate_cli.py", "torchrun", "torch.distributed.run", "torch.distributed.launch"}


def _users_environment() -> dict[str, str]:
    """The environment as the user has it: a launcher sets OMP_NUM_THREADS to 1 in ours where it is not told otherwise,
    which would leave all cores but one idle."""
    parent = Path(f"/proc/{os.getppid()}")
    try:
        words = [Path(word).name for word in (parent / "cmdline").read_bytes().decode(errors="replace").split("\0")]
        if not _LAUNCHERS.isdisjoint(words[:3]):  # PYTHON [-m] LAUNCHER ...
            pairs = (parent / "environ").read_bytes().decode(errors="replace").split("\0")
            return dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    except OSError:  # no /proc, or another user's process
        pass
    return dict(os.environ)


def seed_network_draws(seed: int, device: torch.device) -> None:
    """Seed the generators a network draws from in its forward pass. `torch.manual_seed` visits every kind of device."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


@contextmanager
def only_writer(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold `folder` for this process: two in one would spoil each other's files.

    Where another process holds it, `wait` until it does no more, or raise ValueError. The lock is the kernel's, so it
    ends with the process.
    """
    if os.name != "posix":
        yield
        return
    import fcntl

    with (folder / ".lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another process is training here; wait for it, stop it, or give another --run"
            ) from None
        yield


class Stop:
    """SIGTERM and Ctrl-C are noted instead of obeyed, so that the loop can end at a step's end. A context manager."""

    def __init__(self, processes: int):
        self.signal: int | None = None
        # asked for every step, and the device must not wait for the answer: so on the CPU
        self.group = patient_group() if processes > 1 else None

    def asked(self) -> bool:
        """Whether any process was stopped: all have to stop at the same step, or the others would wait for ever."""
        if self.group is not None:
            noted = torch.tensor([self.signal or 0])
            dist.all_reduce(noted, dist.ReduceOp.MAX, group=self.group)
            self.signal = noted.tolist()[0] or None
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """As the shell has it, 143 for SIGTERM and 130 for Ctrl-C: what comes after a training must not begin."""
        return 128 + (self.signal or 0)

    def __enter__(self) -> Stop:
        def note(number: int, frame: object) -> None:
            self.signal = number

        self._before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
