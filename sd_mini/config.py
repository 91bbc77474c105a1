"""Configs: a frozen pydantic model per stage, read from a YAML file and changed by dotted overrides.

`--any.field value` on the command line is `any: {field: value}` in the file. A value is read as YAML; pydantic then
checks its type, so `1e-4`, which YAML calls a string, is still a float where a float is asked for.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from sd_mini.errors import UserError
from sd_mini.texts import printable, read_text, shown

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """Base of every config: frozen, unknown fields refused, the docstring under a field is its help text."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    brief: ClassVar[str | None] = None
    """how the whole is written in one word, where it can be; `--help` then shows that instead of the fields"""

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def read(cls: type[C], path: str | Path | None, overrides: Sequence[str] = ()) -> C:
    """YAML file + `--a.b value` overrides => a checked `cls`.

    Raises ValueError, one line: the file that is missing, the field that is unknown (with the nearest name), the value
    of the wrong type.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values = read_yaml(Path(path))
    for dotted, value in _pairs(overrides):
        _assign(values, dotted, value)
    return check(cls, values, source=str(path or "command line"))


def check(cls: type[C], values: dict[str, Any], source: str) -> C:
    """Plain values => a checked `cls`; pydantic's report is cut down to its first complaint, on one line."""
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        mend = "; give it in the file or as --{name} VALUE"
        raise UserError(f"{source}: {complaint(cls, error, mend)}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The fields of a YAML file. Raises ValueError, one line, for one that is missing, unreadable or no mapping."""
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise UserError(f"config {path}: no such file" + (f"; in that folder: {', '.join(near)}" if near else ""))
    try:
        values = yaml.safe_load(read_text(path)) or {}
    except (yaml.YAMLError, ValueError) as error:  # of a date such as 2024-06-31 the latter
        raise UserError(f"config {path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"config {path}: expected fields with values, got a {type(values).__name__}")
    return values


def _pairs(overrides: Sequence[str]) -> list[tuple[str, Any]]:
    """["--a.b", "1", "--c=2"] => [("a.b", 1), ("c", 2)]."""
    pairs, rest = [], list(overrides)
    while rest:
        name = rest.pop(0)
        if not name.startswith("--") or name == "--":
            raise UserError(f"argument {name!r}: expected --field value or --field.inner value")
        name, equals, text = name[2:].partition("=")
        if not equals:
            if not rest:
                raise UserError(f"--{name}: expected a value after it")
            text = rest.pop(0)
        try:
            pairs.append((name, yaml.safe_load(text)))
        except (yaml.YAMLError, ValueError):
            raise UserError(f"--{name}: the value {text!r} is not readable as YAML") from None
    return pairs


def _assign(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.replace("-", "_").split(".")
    for parent in parents:
        inner = values.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise UserError(f"--{dotted}: {parent} is {inner!r}, which has no inner fields")
        values = inner
    values[last] = value


def complaint(cls: type[Config], error: ValidationError, mend_missing: str = "") -> str:
    """pydantic's report => its first complaint, on one line; `mend_missing` says where a field {name} can be given."""
    first = error.errors()[0]
    where = [str(part)[:60] for part in first["loc"] if isinstance(part, str)]
    name = ".".join(where) or "the config"
    if first["type"] == "extra_forbidden":
        known = sorted(_fields_at(cls, where[:-1]))
        near = difflib.get_close_matches(where[-1], known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"{name}: unknown field; {hint}fields here: {', '.join(known)}"
    if first["type"] == "missing":
        return f"{name}: missing{mend_missing.format(name=name)}"
    return f"{name}: got {shown(first['input'])}; {first['msg'][0].lower()}{first['msg'][1:]}"


def _fields_at(cls: Any, where: Sequence[str]) -> set[str]:
    """Field names of the (possibly nested, possibly union) config that `where` points at."""
    models = [m for m in (cls, *get_args(cls)) if isinstance(m, type) and issubclass(m, BaseModel)]
    if not where:
        return {name for model in models for name in model.model_fields}
    inner = [model.model_fields[where[0]].annotation for model in models if where[0] in model.model_fields]
    return {name for annotation in inner for name in _fields_at(annotation, where[1:])}


def command(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Run `main(argv)` as a command line: a UserError is one line on stderr and exit code 2.

    So is a stdout that takes no more (`> /dev/full`). One that nobody reads any more (`| head`) ends it without a word,
    with the 141 that the shell gives to SIGPIPE. Any other exception is our fault and keeps its traceback.
    `SD_MINI_TRACEBACK=1` lets a UserError through, too.
    """
    try:
        with redirect_stdout(_Stdout(sys.stdout)):
            code = main(sys.argv[1:] if argv is None else argv) or 0
            sys.stdout.flush()
            return code
    except _StdoutRefusal as error:
        if isinstance(error.__cause__, BrokenPipeError):
            return 141
        print(f"error: stdout: nothing more can be written there ({error}); make room", file=sys.stderr)
        return 2
    except UserError as error:
        if os.environ.get("SD_MINI_TRACEBACK"):
            raise
        print("error: " + printable(" ".join(str(error).split())), file=sys.stderr)
        return 2


class _StdoutRefusal(Exception):
    """Stdout takes no more."""


class _Stdout:
    """A stdout whose refusals are told from those of files: both are an OSError that names none."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._tried(self._stream.write, text)

    def flush(self) -> None:
        self._tried(self._stream.flush)

    def _tried(self, call: Callable[..., Any], *given: str) -> Any:
        try:
            return call(*given)
        except OSError as error:
            # what is left in the buffer goes nowhere: Python would try, and complain, once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            raise _StdoutRefusal(error.strerror) from error


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Raises ValueError where `value` is not one of `choices`, naming both."""
    known = tuple(choices)
    if value not in known:
        raise UserError(f"{name}: got {value!r}, expected one of {known}: use one of these")
