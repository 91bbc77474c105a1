"""Captioned pictures => the same without what is harmful, broken, worthless, repeated, or in the test set.

python -m training.data.prepare --data SOURCE --out FOLDER [--test SOURCE] [--config FILE] [--any.field value]
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Sequence
from pathlib import Path

from sd_mini.config import command, read
from sd_mini.errors import UserError
from training.data.prepare.config import PrepareConfig
from training.engine.reference import fields_of

_SHORT = {"--data": "--data.source", "--test": "--test.source"}
_OWN = ("--config", "--out")


def main(argv: Sequence[str]) -> None:
    """Read, check, clean, print the counts."""
    if "--help" in argv or "-h" in argv:
        print(help_text())
        return
    options, rest = split_options(argv)
    if "--out" not in options:
        raise UserError("expected --out FOLDER, for example --out data/clean")
    config = read(PrepareConfig, options.get("--config"), rest)
    from training.data.prepare.run import clean

    report = clean(config, Path(options["--out"]))
    print(f"{options['--out']}: kept {report['kept']:,} of {report['rows']:,} rows")
    for step, reasons in report["rejected"].items():
        if reasons:
            print(f"  {step}: " + ", ".join(f"{reason} {number:,}" for reason, number in reasons.items()))
    if not report["kept"]:
        raise UserError(f"{options['--out']}: no row was kept; report.html there has examples of each reason")


def split_options(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Words => this program's own options, and those of the config, `--data SOURCE` written out."""
    own: dict[str, str] = {}
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name not in _OWN and name not in _SHORT:
            rest.append(word)
            continue
        if not equals:
            value = next(words, None)
            if value is None:
                raise UserError(f"{name}: expected a value after it")
        if name in _OWN:
            own[name] = value
        else:
            rest += [_SHORT[name], value]
    return own, rest


def help_text() -> str:
    lines = [
        *(__doc__ or "").splitlines(),
        "",
        *(f"  --{name} ({kind}; {default}) {text}".rstrip() for name, kind, default, text in fields_of(PrepareConfig)),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    if "forkserver" in multiprocessing.get_all_start_methods():
        # of the one fork server of this program: workers then begin with what tasks need
        multiprocessing.get_context("forkserver").set_forkserver_preload(["training.data.prepare.run"])
    sys.exit(command(main))
