"""The files that a source is read from, as they were when it was opened: for cache keys, and to find later changes."""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from sd_mini.data.metadata import some
from sd_mini.errors import UserError

State = tuple[int, int] | None  # size in bytes and time of the last change in ns; None: the file is not there


@dataclass(frozen=True)
class FileStates:
    """Size and time of the last change of each file; contents are not read."""

    root: Path
    states: dict[str, State]
    identity: str = ""
    """What identifies the content beside the files: the fingerprint of `datasets`."""

    @classmethod
    def of(cls, root: Path, files: Iterable[Path], identity: str = "") -> FileStates:
        paths = tqdm([str(path) for path in files], desc="checking files", delay=2, leave=False)
        return cls(root, {path: _state(path) for path in paths}, identity)

    def digest(self) -> str:
        """SHA-256, in hex, of the identity and each file's path relative to the root, size and time of last change."""
        digest = hashlib.sha256(self.identity.encode())
        for path, state in self.states.items():
            digest.update(json.dumps([relative_id(path, self.root), state]).encode())
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """Raises UserError, naming them, for files that changed, appeared or vanished since."""
        changed = [relative_id(path, self.root) for path, state in self.states.items() if _state(path) != state]
        if changed:
            raise UserError(
                f"{self.root}: {len(changed):,} of its files changed while they were read ({some(changed, ', ')}); "
                "run the command again when nothing writes there"
            )


def _state(path: str) -> State:
    try:
        stat = os.stat(path)
    except OSError:  # a missing picture, or a loop of links, is the fault of its row
        return None
    return stat.st_size, stat.st_mtime_ns


def relative_id(path: Path | str, root: Path) -> str:
    """A path relative to `root`, with slashes and accents in one spelling: the same on every machine."""
    text, start = str(path), f"{root}{os.sep}"
    relative = text[len(start) :] if text.startswith(start) else os.path.relpath(text, root)
    # a metadata's "a/../b.png" and "b.png" are one picture
    return unicodedata.normalize("NFC", os.path.normpath(relative).replace(os.sep, "/"))


def check_unique(ids: Iterable[str], source: str) -> None:
    """Raises UserError, naming them, for ids that several rows have."""
    twice = [one for one, number in Counter(ids).items() if number > 1]
    if twice:
        raise UserError(f"{source}: {len(twice):,} ids stand for several rows each ({some(twice, ', ')}); rename them")
