"""Splits by any of their usual names, and which of a source's splits a config asks for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from sd_mini.errors import UserError

if TYPE_CHECKING:
    from sd_mini.data.captioned import DataConfig

Part = Literal["data", "valid"]

TRAIN = "train"
ALIASES = (  # names of one split, whichever of them a folder has and whichever is asked for
    (TRAIN, "training"),
    ("validation", "valid", "val", "dev"),
    ("test", "testing", "eval", "evaluation"),
)
_NAMES = {name for names in ALIASES for name in names}


class FieldError(UserError):
    """A user's mistake whose message begins with the field that is meant."""


def is_split(name: str) -> bool:
    return name.lower() in _NAMES


def chosen_splits(asked: str, known: Iterable[str]) -> list[str]:
    """Those of the `known` splits that are asked for: that of this very name, else those of another name for it."""
    known = sorted(set(known))
    if asked in known:
        return [asked]
    names = next((names for names in ALIASES if asked.lower() in names), ())
    return [name for name in known if name.lower() in names]


def asked_splits(config: DataConfig, part: Part, known: Iterable[str]) -> list[str]:
    """Those of a source's splits that are asked for. Raises FieldError, naming those there are, where it has none."""
    known = list(known)
    chosen = chosen_splits(config.split, known)
    if not chosen:
        raise FieldError(f"{part}.split: {config.source!r} has no split {config.split!r}; it has {', '.join(known)}")
    return chosen
