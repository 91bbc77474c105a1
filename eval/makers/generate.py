"""Prompts => pictures, each from a seed of its own: by several processes, and going on where a killed one stopped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from eval.makers.sources import PictureSource, Sampling
from sd_mini.errors import UserError
from sd_mini.files import combined_hash, sync, usual_modes, written_to
from sd_mini.progress import progress


@dataclass(frozen=True)
class Job:
    """Pictures to be made of these prompts; picture i starts from the noise of seed i."""

    name: str
    prompts: list[str]
    sampling: Sampling


def generate(maker: PictureSource, prompts: Sequence[str], sampling: Sampling, bar: tqdm) -> np.ndarray:
    """N prompts => (N, 3, R, R) uint8 at the pipeline's resolution R; picture i starts from the noise of seed i.

    Raises ValueError for the first prompt that the pipeline does not take, before any picture is made.
    """
    maker.check(prompts)
    return np.concatenate([_batch(maker, prompts, sampling, start, bar) for start in _starts(prompts, sampling)])


def _starts(prompts: Sequence[str], sampling: Sampling) -> range:
    return range(0, len(prompts), sampling.batch)


def _batch(maker: PictureSource, prompts: Sequence[str], sampling: Sampling, start: int, bar: tqdm) -> np.ndarray:
    part = prompts[start : start + sampling.batch]
    made = maker.make(part, range(start, start + len(part)), sampling)
    bar.update(len(part))
    return made


class Kept:
    """Batches of pictures in a folder beside the report, under the hash of all that they depend on.

    A batch is the same pictures whoever makes it, so the processes take them in turn, and what a killed evaluation has
    made is not made again.
    """

    def __init__(self, beside: Path, maker: PictureSource, jobs: Sequence[Job]):
        self.maker, self.jobs = maker, jobs
        self.root = beside.with_name(f".{beside.name}.pictures")
        asked = [(job.name, job.prompts, asdict(job.sampling)) for job in jobs]
        self.folder = self.root / combined_hash({"maker": maker.hash, "asked": asked})[:16]

    def make(self, rank: int = 0, processes: int = 1) -> None:
        """This process' share of the batches that are not there. Raises ValueError for a prompt that is not taken."""
        for job in self.jobs:
            self.maker.check(job.prompts)
        every = [(job, start) for job in self.jobs for start in _starts(job.prompts, job.sampling)]
        share = [(job, start) for job, start in every[rank::processes] if not self._path(job, start).is_file()]
        total = sum(len(job.prompts[start : start + job.sampling.batch]) for job, start in share)
        with progress(total=total, desc="pictures", delay=1) as bar:
            for job, start in share:
                path = self._path(job, start)
                partial = path.with_suffix(f".{os.getpid()}.partial")
                made = _batch(self.maker, job.prompts, job.sampling, start, bar)
                with written_to(path):
                    self.folder.mkdir(parents=True, exist_ok=True)
                    save_file({"pictures": made}, partial)
                    usual_modes(partial)
                    sync(partial)
                    os.replace(partial, path)

    def _path(self, job: Job, start: int) -> Path:
        return self.folder / f"{job.name}-{start:06d}.safetensors"

    def read(self, name: str) -> np.ndarray:
        """(N, 3, R, R) uint8 of the job of that name. Raises ValueError, the file named, where one is damaged."""
        job = next(job for job in self.jobs if job.name == name)
        parts = []
        for start in _starts(job.prompts, job.sampling):
            path = self._path(job, start)
            try:
                parts.append(load_file(path)["pictures"])
            except (OSError, SafetensorError, KeyError) as error:
                raise UserError(f"{path}: not readable ({error}); delete it, and it is made again") from None
        return np.concatenate(parts)

    def delete(self) -> None:
        """Once the report is written, all pictures of this and of earlier ones that never came to their end."""
        shutil.rmtree(self.root, ignore_errors=True)
