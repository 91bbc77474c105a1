"""What is known of all rows together: their hashes, and which rows are refused for another row's sake."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sd_mini.files import atomic_file
from training.data.prepare.facts import Facts

# of rows that are refused for the sake of others; a code is a place in it
REASONS = (
    ("", ""),
    ("quality", "repeated_caption"),
    ("duplicates", "exact"),
    ("duplicates", "near"),
    ("duplicates", "caption"),
    ("decontamination", "exact"),
    ("decontamination", "near"),
    ("decontamination", "caption"),
)


@dataclass(frozen=True)
class Rows:
    """The hashes of N rows and what decides which of two is kept."""

    content: np.ndarray
    hash: np.ndarray
    mirrored: np.ndarray
    thumbnail: np.ndarray
    """(N, 36) uint8"""
    caption: np.ndarray
    """0 for rows without a caption"""
    area: np.ndarray
    """px"""
    length: np.ndarray
    """characters of the caption"""

    @classmethod
    def of(cls, facts: Facts) -> Rows:
        names = ("content", "hash", "mirrored", "thumbnail", "caption", "length")
        columns = {name: facts.column(name) for name in names}
        return cls(area=facts.column("width").astype(np.int64) * facts.column("height"), **columns)

    def is_class_like(self, alive: np.ndarray) -> bool:
        """Whether captions name classes: there are fewer different ones than half the rows."""
        captions = self.caption[alive]
        return 2 * len(np.unique(captions)) < len(captions)


@dataclass
class Verdicts:
    """Which rows are left, and why the others are not."""

    alive: np.ndarray
    """(N,) bool: neither steps 1 to 3 nor any step since have refused the row"""
    code: np.ndarray
    """(N,) uint8, a place in REASONS"""
    other: np.ndarray
    """(N,) int64: the row that is kept instead, or the test row; -1 for none"""
    kept_pairs: np.ndarray = field(default_factory=lambda: np.empty((0, 2), np.int64))
    """(K, 2) near-duplicate pictures that are kept for their different captions"""
    remarks: list[str] = field(default_factory=list)

    @classmethod
    def begin(cls, alive: np.ndarray) -> Verdicts:
        return cls(alive.copy(), np.zeros(len(alive), np.uint8), np.full(len(alive), -1, np.int64))

    def refuse(self, rows: np.ndarray, step: str, reason: str, others: np.ndarray | int) -> None:
        self.alive[rows] = False
        self.code[rows] = REASONS.index((step, reason))
        self.other[rows] = others

    def save(self, path: Path) -> None:
        with atomic_file(path) as partial, partial.open("wb") as file:
            np.savez(
                file,
                alive=self.alive,
                code=self.code,
                other=self.other,
                kept_pairs=self.kept_pairs,
                remarks=np.array(self.remarks, dtype=str),
            )

    @classmethod
    def load(cls, path: Path) -> Verdicts:
        with np.load(path) as stored:
            fields = {name: stored[name] for name in ("alive", "code", "other", "kept_pairs")}
            return cls(**fields, remarks=stored["remarks"].tolist())
