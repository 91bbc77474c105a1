"""`sd-mini doctor`: what this machine and this environment have, what is missing, and how to mend it."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from sd_mini import __version__
from sd_mini.openmp import cores

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
    findings = [*versions(), *devices(), *threads(), *compiler(), *memory(), *disks(options.folder), *extras()]
    for state, subject, fact in findings:
        print(f"{state:5} {subject:14} {fact}")
    to_mend = sum(state == MEND for state, _, _ in findings)
    print(f"{to_mend} to mend" if to_mend else "nothing to mend")


Finding = tuple[str, str, str]  # OK, MEND or the empty text of what is optional; the subject; the fact and its remedy


def versions() -> list[Finding]:
    findings = [(OK, "sd_mini", f"{__version__}, Python {platform.python_version()} at {sys.prefix}")]
    for requirement in _requirements(""):
        found, problem = _installed(requirement)
        fact = found if problem is None else f"{problem}; pip install '{requirement}'"
        findings.append((OK if problem is None else MEND, requirement.name, fact))
    return findings


def extras() -> list[Finding]:
    """What each extra adds, and of what it needs that is not there."""
    findings = []
    for extra in sorted(set(metadata.metadata("sd-mini").get_all("Provides-Extra") or [])):
        lacking = [r.name for r in _requirements(extra) if r.name != "sd-mini" and _installed(r)[1] is not None]
        purpose = PURPOSES.get(extra, "")
        if lacking:
            fact = f"{purpose}; lacks {', '.join(lacking)}: pip install 'sd-mini[{extra}]'"
            findings.append(("", f"[{extra}]", fact))
        else:
            findings.append((OK, f"[{extra}]", purpose))
    return findings


def _requirements(extra: str) -> list[Requirement]:
    """What the package needs with this extra alone; "" is none."""
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
    import torch

    if torch.cuda.is_available():
        found = []
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16"
            found.append((OK, f"cuda:{i}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {bf16}"))
        return found
    level = torch.backends.cpu.get_cpu_capability()
    fact = f"{platform.processor() or platform.machine()}, {level}"
    if torch.version.cuda is not None and shutil.which("nvidia-smi"):
        return [(MEND, "device", f"{fact}; an NVIDIA driver is there but torch sees no GPU: see nvidia-smi")]
    return [(OK, "device", f"{fact}; no GPU, the recipes for two cores are training/configs/shapes, pictures, photos")]


def threads() -> list[Finding]:
    import torch

    own, used = cores(), torch.get_num_threads()
    set_by = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ}
    fact = f"{used} of {own} cores" + "".join(f", {name}={value}" for name, value in set_by.items())
    if used > own:
        return [(MEND, "threads", f"{fact}: more threads than cores wait for each other; set OMP_NUM_THREADS={own}")]
    if used < own and set_by:
        return [("", "threads", f"{fact}: unset it to use all cores")]
    return [(OK, "threads", fact)]


def compiler() -> list[Finding]:
    from sd_mini.cpu.kernels import cache_folder

    found = shutil.which("cc")
    if found is None:
        return [(MEND, "C compiler", "none: small PRX networks run slower on a CPU; install gcc or clang (cc)")]
    return [(OK, "C compiler", f"{found}; compiled kernels in {cache_folder()}")]


def memory() -> list[Finding]:
    from sd_mini.memory import available, total

    free, whole = available() / 2**30, total() / 2**30
    if free < _LITTLE_MEMORY:
        return [(MEND, "memory", f"{free:.1f} of {whole:.1f} GiB free, expected {_LITTLE_MEMORY}; close programs")]
    return [(OK, "memory", f"{free:.1f} of {whole:.1f} GiB free")]


def disks(folder: Path) -> list[Finding]:
    """Free disk where runs lie, and where the libraries keep what they download."""
    from huggingface_hub.constants import HF_HUB_CACHE

    findings = []
    for subject, place in (("runs", folder), ("hub cache", Path(HF_HUB_CACHE))):
        there = next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free / 1e9
        fact = f"{free:.1f} GB free at {place.absolute()}"
        if not os.access(there, os.W_OK):
            findings.append((MEND, subject, f"{there} cannot be written; mend its permissions, or take another place"))
        elif free < _LITTLE_DISK:
            findings.append((MEND, subject, f"{fact}, expected {_LITTLE_DISK}; make room, or take another place"))
        else:
            findings.append((OK, subject, fact))
    return findings
