"""`sd-mini app`: the page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sd_mini.cli.arguments import whole_number
from sd_mini.cli.opening import open_pipeline
from sd_mini.errors import UserError

PORT, LAST_PORT = 7860, 65_535  # gradio's own


def add_command(commands: Any) -> None:
    parser = commands.add_parser("app", help="serve a page that draws pictures and shows what runs hold")
    parser.set_defaults(run_command=run)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run folders, or pipeline folders themselves")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine)")
    parser.add_argument(
        "--port",
        type=whole_number(0),
        default=PORT,
        help="port to listen at, 0 for any free one (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> None:
    if options.port > LAST_PORT:
        raise UserError(f"--port {options.port}: expected a number from 0 to {LAST_PORT}")
    from sd_mini.app.server import serve

    serve(options.runs, open_pipeline, options.host, options.port)
