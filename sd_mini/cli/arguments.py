"""Arguments of every command line: a parser that complains in one line, kinds of numbers, targets checked first."""

from __future__ import annotations

import argparse
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from sd_mini.errors import UserError
from sd_mini.files import check_writable


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are ValueErrors, for `config.command`: one line, without the usage in front.

    Abbreviated options are refused: a later option could change what they mean.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` shows what is expected")

    def options(self) -> list[str]:
        """The names of all options, of its commands' too."""
        names = []
        for action in self._actions:
            names += [name for name in action.option_strings if name.startswith("--")]
            if isinstance(action, argparse._SubParsersAction):
                names += [name for parser in action.choices.values() for name in parser.options()]
        return names


def whole_number(minimum: int) -> Callable[[str], int]:
    """An argparse type: text => a whole number of at least `minimum` and at most 18 digits, which fits any seed."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"-?[0-9]{1,18}", text) or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number from {minimum} to 10^18 - 1")
        return int(text)

    return parse


def fraction(text: str) -> float:
    """An argparse type: text => a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number from 0 to 1")
    return value


def check_target(folder: Path, mark: str, option: str = "--out") -> Path:
    """The folder that `option` names, checked before anything is computed.

    What we wrote into a folder that stands there is replaced, so it has to be empty or to hold `mark`, the file by
    which ours are known; a user's other files stay (`files.atomic_folder`).

    Raises ValueError for a file in its place or above it, for a folder of anything else, and where nothing can be
    written.
    """
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"{option} {folder}: {nearest} is a file, expected a folder; give another name")
    if nearest == folder and any(folder.iterdir()) and not (folder / mark).is_file():
        raise UserError(f"{option} {folder}: holds other files (no {mark}) and would be replaced; give a new folder")
    check_writable(folder, option)
    return folder


def check_picture_file(path: Path) -> str:
    """A file to be written => Pillow's format for its ending. Raises ValueError if no picture can be put there."""
    from PIL import Image

    if not path.parent.is_dir():
        raise UserError(f"--out {path}: no folder {path.parent}; make it, or give another")
    if path.is_dir():
        raise UserError(f"--out {path}: is a folder, expected a picture file such as {path / 'picture.png'}")
    picture_format = Image.registered_extensions().get(path.suffix.lower(), "none")
    try:
        Image.new("RGB", (16, 16)).save(io.BytesIO(), picture_format)
    except (KeyError, OSError, ValueError):  # no such format; one that Pillow only reads; one without colours
        raise UserError(f"--out {path}: Pillow writes no {path.suffix or 'file without an ending'}; use .png") from None
    check_writable(path)
    return picture_format
