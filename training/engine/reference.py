"""Every field of the programs' configs, from their docstrings: what `--help` prints, and docs/config.md.

python -m training.engine.reference > docs/config.md
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple, get_args

from pydantic_core import PydanticUndefined

from sd_mini.config import Config
from sd_mini.stages.contract import STAGES, program_of


class FieldReference(NamedTuple):
    """One field: `name` dotted, as in `--train.lr`; `kind` its type; `default` as YAML would hold it."""

    name: str
    kind: str
    default: str
    meaning: str


def fields_of(config: type[Config], prefix: str = "", defaults: Config | None = None) -> Iterator[FieldReference]:
    """The fields of a config and of those in it. One that is mostly written in a word is not taken apart.

    `defaults`: the values that the config has where it stands, as `valid` has others than `data`.
    """
    for name, field in config.model_fields.items():
        annotation, meaning = field.annotation, " ".join((field.description or "").split())
        nested = isinstance(annotation, type) and issubclass(annotation, Config)
        default = field.get_default(call_default_factory=True) if defaults is None else getattr(defaults, name)
        if nested and annotation.brief is None:
            yield from fields_of(annotation, f"{prefix}{name}.", default if isinstance(default, Config) else None)
            continue
        if nested:
            kind, shown = str(annotation.brief), _brief(default)
        else:
            kind = _kind(annotation)
            shown = "required" if default is PydanticUndefined else _yaml(default)
        yield FieldReference(prefix + name, kind, shown, meaning)


def _kind(annotation: object) -> str:
    """A type as its annotation is written, without the bounds that pydantic checks."""
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation.__name__
    text = re.sub(r"\w+\.(?=\w)", "", str(annotation))
    return re.sub(r"Annotated\[(\w+), FieldInfo\(.*?\]\)\]", r"\1", text)


def _brief(default: object) -> str:
    """A nested config's own first value, by which it is written in a word."""
    return _yaml(next(iter(default.model_dump().values()))) if isinstance(default, Config) else _yaml(default)


def _yaml(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_yaml, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def help_text(config: type[Config], stage: str) -> str:
    """Every field with its type, default and docstring."""
    lines = [
        f"accelerate launch -m {program_of(stage)} --config FILE --run RUN [--steps N] [--any.field value]",
        "  --resume PATH: begin from that checkpoint (or the newest in that folder); refused where there is none",
        "  --log_with NAME[,NAME]: tensorboard (the default), wandb, trackio, mlflow, ... as Accelerate has them; none",
        "",
        *(f"  --{name} ({kind}; {default}) {meaning}".rstrip() for name, kind, default, meaning in fields_of(config)),
    ]
    return "\n".join(lines)


def markdown() -> str:
    """docs/config.md: a table for each stage, and for cleaning."""
    from importlib import import_module

    lines = [
        "# Config reference",
        "",
        "Generated from the fields' docstrings by `python -m training.engine.reference > docs/config.md`. In the YAML",
        "file a dotted name is nested (`train: {lr: 1.0e-3}`); on the command line it is an option, `--train.lr 1e-3`.",
    ]
    configs = {program: import_module(f"{program}.task").main.config for program in map(program_of, STAGES)}
    configs["training.data.prepare"] = import_module("training.data.prepare.config").PrepareConfig
    for program, config in configs.items():
        lines += ["", f"## {program}", "", "| field | type | default | meaning |", "|---|---|---|---|"]
        for reference in fields_of(config):
            name, kind, default, meaning = (text.replace("|", "\\|") for text in reference)
            lines.append(f"| `{name}` | {kind} | `{default}` | {meaning} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
