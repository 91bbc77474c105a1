"""`sd-mini doctor`: what this machine and this environment have, what is missing, and how to mend it."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd_mini import __version__
from sd_mini.errors import UserError
from sd_mini.files import check_writable
from sd_mini.openmp import cores

if TYPE_CHECKING:
    from packaging.requirements import Requirement

PURPOSES = {
    "train": "training and evaluation",
    "app": "the page: sd-mini app",
    "minilm": "a pretrained sentence encoder",
    "efficientnet": "ImageNet features for python -m eval",
    "prepare": "cleaning: python -m training.data.prepare",
    "cluster": "cleaning on several hosts",
    "safety": "cleaning with a detector of nudity",
    "heic": ".heic pictures",
    "emoji": "building the emoji data set",
    "dev": "the tests",
}
_LITTLE_DISK = 5  # GB free: a small run with its caches and checkpoints
_LITTLE_MEMORY = 4  # GB: one stage's training takes up to 1.5, a report twice that
OK, MEND = "ok", "mend"


def add_command(commands: Any) -> None:
    parser = commands.add_parser("doctor", help="check versions, devices, extras, disk and threads")
    parser.set_defaults(run_command=run)
    parser.add_argument(
        "folder", metavar="FOLDER", nargs="?", type=Path, default=Path(), help="where runs will lie (default: here)"
    )


def run(options: argparse.Namespace) -> None:
    if options.folder.is_file():
        raise UserError(f"FOLDER {options.folder}: is a file; give the folder in which runs will lie")
    to_mend = 0
    for findings in (versions, devices, threads, compiler, memory, lambda: disks(options.folder), extras):
        for state, subject, fact in findings():
            print(f"{state:5} {subject:14} {fact}", flush=True)
            to_mend += state == MEND
    print(f"{to_mend} to mend" if to_mend else "nothing to mend")


Finding = tuple[str, str, str]  # OK, MEND or the empty text of what is optional; the subject; the fact and its remedy


def versions() -> list[Finding]:
    findings = [(OK, "sd_mini", f"{__version__}, Python {platform.python_version()} at {sys.prefix}")]
    if _metadata() is None:
        return [*findings, (MEND, "packages", "sd-mini is not installed, so its needs are unknown; pip install -e .")]
    for requirement in _requirements(""):
        found, problem = _installed(requirement)
        fact = found if problem is None else f"{problem}; pip install '{requirement}'"
        findings.append((OK if problem is None else MEND, requirement.name, fact))
    return findings


def extras() -> list[Finding]:
    """What each extra adds, and of what it needs that is not there."""
    findings = []
    found = _metadata()
    for extra in sorted(set(found.get_all("Provides-Extra") or [])) if found is not None else []:
        lacking = [r.name for r in _requirements(extra) if r.name != "sd-mini" and _installed(r)[1] is not None]
        purpose = PURPOSES.get(extra, "")
        if lacking:
            fact = f"{purpose}; lacks {', '.join(lacking)}: pip install 'sd-mini[{extra}]'"
            findings.append(("", f"[{extra}]", fact))
        else:
            findings.append((OK, f"[{extra}]", purpose))
    return findings


def _metadata() -> Any:
    """Of the installed package; none of a bare checkout."""
    try:
        return metadata.metadata("sd-mini")
    except metadata.PackageNotFoundError:
        return None


def _requirements(extra: str) -> list[Requirement]:
    """What the package needs with this extra alone; "" is none."""
    from packaging.requirements import Requirement

    parsed = [Requirement(line) for line in metadata.requires("sd-mini") or []]
    if not extra:
        return [r for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return [r for r in parsed if r.marker and "extra" in str(r.marker) and r.marker.evaluate({"extra": extra})]


def _installed(requirement: Requirement) -> tuple[str, str | None]:
    """A package's version, and what is wrong with it."""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return "", "not installed"
    if requirement.specifier.contains(version, prereleases=True):
        return version, None
    return version, f"{version}, expected {requirement.specifier}"


def devices() -> list[Finding]:
    try:
        import torch
    except ImportError as error:
        return [(MEND, "device", f"torch cannot be imported ({error}); pip install torch")]
    if torch.cuda.is_available():
        found = []
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16"
            found.append((OK, f"cuda:{i}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {bf16}"))
        return found
    level = torch.backends.cpu.get_cpu_capability()
    fact = f"{platform.processor() or platform.machine()}, {level}"
    if shutil.which("nvidia-smi"):
        why = "is built for CPUs alone: install one for CUDA" if torch.version.cuda is None else "sees none: nvidia-smi"
        return [(MEND, "device", f"{fact}; an NVIDIA driver is there, but this torch {why}")]
    for name, kind in (("mps", "Apple GPU"), ("xpu", "Intel GPU")):
        if getattr(torch, name).is_available():
            return [("", "device", f"{fact}; the {kind} is used by --device {name} of Accelerate, and is not tested")]
    return [(OK, "device", f"{fact}; no GPU, the recipes for two cores are training/configs/shapes, pictures, photos")]


def threads() -> list[Finding]:
    try:
        import torch
    except ImportError:  # which `devices` says
        return []
    own, used = cores(), torch.get_num_threads()
    set_by = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ}
    fact = f"{used} of {own} cores" + "".join(f", {name}={value}" for name, value in set_by.items())
    if used > own:
        return [(MEND, "threads", f"{fact}: more threads than cores wait for each other; set OMP_NUM_THREADS={own}")]
    if used < own and set_by:
        return [("", "threads", f"{fact}: unset it to use all cores")]
    return [(OK, "threads", fact)]


def compiler() -> list[Finding]:
    try:
        from sd_mini.cpu import kernels
    except ImportError:  # of torch, which `devices` says
        return []
    found = kernels.compiler()
    if found is None:
        return [(MEND, "C compiler", "none: small PRX networks run slower on a CPU; install gcc or clang (cc)")]
    return [(OK, "C compiler", f"{found}; compiled kernels in {kernels.cache_folder()}")]


def memory() -> list[Finding]:
    from sd_mini.memory import available, total

    free, whole = available() / 2**30, total() / 2**30
    if free < _LITTLE_MEMORY:
        return [(MEND, "memory", f"{free:.1f} of {whole:.1f} GiB free, expected {_LITTLE_MEMORY}; close programs")]
    return [(OK, "memory", f"{free:.1f} of {whole:.1f} GiB free")]


def disks(folder: Path) -> list[Finding]:
    """Free disk where runs lie, and where the libraries keep what they download."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    findings = []
    for subject, place in (("runs", folder), ("hub cache", home)):
        there = next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free / 1e9
        fact = f"{free:.1f} GB free at {place.absolute()}"
        try:
            check_writable(place.absolute(), subject)  # by a trial: permissions alone do not tell, least of all root
        except UserError as error:
            findings.append((MEND, subject, str(error)))
            continue
        if free < _LITTLE_DISK:
            findings.append((MEND, subject, f"{fact}, expected {_LITTLE_DISK}; make room, or take another place"))
        else:
            findings.append((OK, subject, fact))
    return findings
