"""The processes of a training: their cores, their memory, how they are stopped, what Accelerate makes of them."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
from sd_mini.openmp import cores
from sd_mini.processes import is_distributed, patient_group, process_device


def join_processes() -> PartialState:
    """Accelerate's state of this group of processes, on the device that the launcher chose."""
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    if is_distributed():
        patient_group()
    return state


def make_accelerator(mixed_precision: str | None, folder: Path, log_with: list[str]) -> Accelerator:
    """Accelerate for a training in `folder`. Raises ValueError for float16, which would need a loss scaler's state."""
    _check_environment()
    project = ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder))
    AcceleratorState._reset_state()  # an earlier training in this process may have had another precision
    join_processes()
    precision = chosen_precision(mixed_precision, process_device())
    trackers: list[Any] = list(log_with)
    accelerator = Accelerator(mixed_precision=precision, log_with=trackers or None, project_config=project)
    if accelerator.mixed_precision == "fp16":
        raise UserError("mixed precision fp16: expected no or bf16, whose range needs no loss scaling")
    if accelerator.distributed_type == DistributedType.MULTI_CPU and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        # Accelerate enables FSDP on GPUs alone; the same code shards over CPU processes
        AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin()
    if accelerator.distributed_type == DistributedType.FSDP:
        _check_fsdp(accelerator)
    if accelerator.device.type == "cpu":
        tune_cpu(accelerator.num_processes)
    return accelerator


# variables of `accelerate launch` that a config field of ours replaces: their neutral value, and that field
_OURS = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "--train.accumulation N"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "--train.compile BACKEND"),
}
_OTHERS = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG")


def _check_environment() -> None:
    """Raises UserError for variables by which Accelerate would change the arithmetic unseen by the config."""
    for name, (usual, ours) in _OURS.items():
        if (value := os.environ.get(name, usual)).lower() != usual:
            raise UserError(f"{name}={value}: a launch takes it from its config; leave it out and give {ours}")
    for name in _OTHERS:
        if parse_flag_from_env(name):
            raise UserError(f"{name}: expected plain data parallelism or FSDP2; launch without it")


def chosen_precision(precision: str | None, device: torch.device) -> str | None:
    """The precision of the config; "auto" is "bf16" where `device` multiplies in it natively, else "no"."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has = getattr(torch.cpu, "get_capabilities", dict)()  # missing in the oldest torch we support
        able = any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return "bf16" if able else "no"


@contextmanager
def rounded_products() -> Generator[None]:
    """Inside, a GPU's float32 products may use TF32: 10 bits of mantissa, beside the 7 of bfloat16.

    In full float32, Muon's products alone take a tenth of an update of 100M parameters.
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
    plugin: Any = accelerator.state.fsdp_plugin
    # every process builds its own weights and buffers from the seed, so none is sent
    plugin.cpu_ram_efficient_loading = False
    # as without FSDP, autocast alone decides what is computed in bfloat16; weights, targets and sums stay float32
    plugin.mixed_precision_policy = MixedPrecisionPolicy()


def follow_launcher() -> None:
    """Get SIGTERM when `accelerate launch`, the parent, dies: it does not forward signals itself."""
    parent = Path(f"/proc/{os.getppid()}/cmdline")
    if parent.is_file() and b"accelerate" in parent.read_bytes():
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def rows_of_process(count: int, processes: int, rank: int) -> slice:
    """The rows of `count` that process `rank` works on: contiguous, disjoint, and together all of them."""
    return slice(count * rank // processes, count * (rank + 1) // processes)


def joined_rows(
    local_scores: dict[str, np.ndarray], rows: slice, count: int, accelerator: Accelerator
) -> dict[str, list[float]]:
    """Each process's scores of its own `rows` => the scores of all `count` rows, on every process."""
    table = torch.zeros(
        len(local_scores), count, dtype=torch.float64
    )  # each process fills its own columns; their sum is the table
    table[:, rows] = torch.from_numpy(np.stack([np.asarray(scores, np.float64) for scores in local_scores.values()]))
    if accelerator.num_processes > 1:
        table = accelerator.reduce(table.to(accelerator.device), "sum")
    return dict(zip(local_scores, table.tolist(), strict=True))


def tune_cpu(processes: int) -> None:
    """Use every core, flush denormals, and let glibc keep large freed blocks instead of faulting them in each step.

    `OMP_NUM_THREADS`, where the user has set it, is the number of threads. Measured on two cores: denormal numbers in
    young gradients and Adam moments halve the speed of the autoencoder; keeping blocks takes 13 % off a step of the
    shapes noise predictor.
    """
    threads = _users_environment().get("OMP_NUM_THREADS", "")
    torch.set_num_threads(int(threads) if threads.isdecimal() and int(threads) else max(cores() // processes, 1))
    torch.set_flush_denormal(True)
    keep_freed_memory()


_LAUNCHERS = {"accelerate", "accelerate-launch", "accelerate.commands.launch", "accelerate.commands.accelerate_cli"}
_LAUNCHERS |= {"launch.py", "accelerate_cli.py", "torchrun", "torch.distributed.run", "torch.distributed.launch"}


def _users_environment() -> dict[str, str]:
    """The environment the user launched with: launchers set OMP_NUM_THREADS to 1 in ours by default, which would leave
    all cores but one idle."""
    parent = Path(f"/proc/{os.getppid()}")
    try:
        words = [Path(word).name for word in (parent / "cmdline").read_bytes().decode(errors="replace").split("\0")]
        if not _LAUNCHERS.isdisjoint(words[:3]):  # PYTHON [-m] LAUNCHER ...
            pairs = (parent / "environ").read_bytes().decode(errors="replace").split("\0")
            return dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    except OSError:  # no /proc, or another user's process
        pass
    return dict(os.environ)
