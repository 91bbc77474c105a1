"""What stages 1 and 2 make of the data, encoded once: arrays in shards on disk, memory-mapped when read.

A cache is named by a hash of all that decides its content (the stage, the data, the preprocessing), so an edited
picture or another autoencoder gets another cache; one that was cut short goes on at its first missing shard.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from sd_mini.stages import combined_hash, sync

SHARD_ROWS = 4096
VERSION = 1  # part of every key: raise it when what is encoded, or how it lies in the shards, changes


class Rows:
    """Rows of one array that lies in several memory-mapped .npy files; `rows[ids]` copies the asked ones out."""

    def __init__(self, paths: list[Path]):
        self.shards = [np.load(path, mmap_mode="r") for path in paths]

    def __len__(self) -> int:
        return sum(len(shard) for shard in self.shards)

    def __getitem__(self, ids: np.ndarray) -> np.ndarray:
        """(B,) row numbers => (B, ...)."""
        ids = np.asarray(ids)
        out = np.empty((len(ids), *self.shards[0].shape[1:]), self.shards[0].dtype)
        shard_of = ids // SHARD_ROWS
        for number in np.unique(shard_of):
            here = shard_of == number
            out[here] = self.shards[number][ids[here] % SHARD_ROWS]
        return out


def encode(
    folder: Path,
    key: dict[str, object],
    count: int,
    encode_rows: Callable[[slice], dict[str, np.ndarray]],
    title: str,
    chunk: int = 256,
) -> dict[str, Rows]:
    """Rows 0..count of each array that `encode_rows(slice)` makes, from `folder/HASH_OF_KEY`, encoded where missing.

    A shard is written under another name, brought to disk and renamed, so a shard that is there is whole.
    """
    home = folder / combined_hash(key)[:24]
    home.mkdir(parents=True, exist_ok=True)
    shards = [slice(a, min(a + SHARD_ROWS, count)) for a in range(0, count, SHARD_ROWS)]
    missing = [i for i in range(len(shards)) if not (home / f"{i:05d}.done").exists()]
    rows = sum(shards[i].stop - shards[i].start for i in missing)
    with tqdm(total=rows, desc=title, unit="row", disable=not missing, mininterval=1) as bar:
        for i in missing:
            parts = []
            for start in range(shards[i].start, shards[i].stop, chunk):
                piece = slice(start, min(start + chunk, shards[i].stop))
                parts.append(encode_rows(piece))
                bar.update(piece.stop - piece.start)
            for name in parts[0]:
                _write(home / f"{name}.{i:05d}.npy", np.concatenate([part[name] for part in parts]))
            (home / f"{i:05d}.done").touch()
    names = sorted({path.name.split(".")[0] for path in home.glob("*.npy")})
    return {name: Rows([home / f"{name}.{i:05d}.npy" for i in range(len(shards))]) for name in names}


def _write(path: Path, array: np.ndarray) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
    os.rename(partial, path)
    sync(path.parent)
