"""The files that a source is read from, as they were when it was opened: for cache keys, and to find later changes."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sd_mini.data.metadata import some
from sd_mini.errors import UserError
from sd_mini.progress import progress

_MISSING = (-1, -1)


@dataclass(frozen=True, eq=False)
class FileStates:
    """N files and what tells whether one has changed; contents are not read."""

    root: Path
    paths: list[str]
    states: np.ndarray
    """(N, 2) int64: size in bytes, and time of the last change in ns; _MISSING where there is no file."""
    identity: str = ""
    """What identifies the content beside the files: the fingerprint of `datasets`."""

    @classmethod
    def of(cls, root: Path, files: Iterable[Path], identity: str = "") -> FileStates:
        paths = [str(path) for path in files]
        return cls(root, paths, _states(paths), identity)

    def joined(self, other: FileStates) -> FileStates:
        return FileStates(self.root, self.paths + other.paths, np.concatenate([self.states, other.states]))

    def digest(self) -> str:
        """SHA-256, in hex, of the identity and each file's path relative to the root, size and time of last change."""
        digest = hashlib.sha256(f"{self.identity}\0".encode())
        for path in self.paths:
            digest.update(f"{relative_id(path, self.root)}\0".encode(errors="surrogateescape"))
        digest.update(self.states.tobytes())
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """Raises UserError, naming them, for files that changed, appeared or vanished since."""
        rows = np.flatnonzero((_states(self.paths) != self.states).any(1))
        if len(rows):
            changed = [relative_id(self.paths[row], self.root) for row in rows]
            raise UserError(
                f"{self.root}: {len(changed):,} of its files changed while they were read ({some(changed, ', ')}); "
                "run the command again when nothing writes there"
            )


def _states(paths: list[str]) -> np.ndarray:
    bar = progress(paths, desc="checking files", delay=2, leave=False)
    return np.array([_state(path) for path in bar], dtype=np.int64).reshape(-1, 2)


def _state(path: str) -> tuple[int, int]:
    try:
        stat = os.stat(path)
    except OSError:  # a missing picture, or a loop of links, is the fault of its row
        return _MISSING
    return stat.st_size, stat.st_mtime_ns


def relative_path(path: Path | str, root: Path) -> str:
    """A path relative to `root`, as `os.path.relpath` does but for 200,000 files in a tenth of the time."""
    text, start = str(path), "" if root == Path() else f"{root}{os.sep}"
    if text.startswith(start) and ".." not in text and (start or not os.path.isabs(text)):
        return text[len(start) :]
    return os.path.relpath(text, root)


def relative_id(path: Path | str, root: Path) -> str:
    """A path relative to `root`, with slashes and accents in one spelling: the same on every machine."""
    return unicodedata.normalize("NFC", relative_path(path, root).replace(os.sep, "/"))


def check_unique(ids: Iterable[str], source: str) -> None:
    """Raises UserError, naming them, for ids that several rows have."""
    twice = [one for one, number in Counter(ids).items() if number > 1]
    if twice:
        raise UserError(f"{source}: {len(twice):,} ids stand for several rows each ({some(twice, ', ')}); rename them")
