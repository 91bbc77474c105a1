"""The command line `sd-mini`: one module a command. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from sd_mini.cli import app, doctor, export, generate, init, inspection, survey
from sd_mini.cli.arguments import Parser
from sd_mini.config import command
from sd_mini.errors import UserError
from sd_mini.openmp import let_threads_sleep
from sd_mini.progress import quiet_libraries

COMMANDS = (generate, app, inspection, export, survey, init, doctor)  # each has `add_command`, in the order of `--help`


def main(argv: Sequence[str] | None = None) -> int:
    """`sd-mini ...` => exit code: 0, or 2 after one line on stderr that says what to mend."""
    let_threads_sleep()  # nothing has imported torch yet
    quiet_libraries()
    return command(_main, argv)


def _main(argv: Sequence[str]) -> None:
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    if getattr(options, "prompt", "") is None and len(rest) == 1 and not rest[0].startswith("--"):
        options.prompt = rest.pop()  # argparse takes an optional PROMPT for left out where options stand before it
    if rest and not getattr(options, "takes_fields", False):
        near = difflib.get_close_matches(rest[0].partition("=")[0], parser.options(), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"unrecognized arguments: {' '.join(rest)}; {hint}`sd-mini --help` shows what is expected")
    options.rest = rest
    options.run_command(options)


def _parser() -> Parser:
    parser = Parser(prog="sd-mini", description="A latent text-to-image model, trained in three stages.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add_command(commands)
    return parser
