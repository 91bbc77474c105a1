"""The options of `sd-mini generate` that start from a picture: --image, --mask and --strength."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sd_mini.errors import UserError


def add_edit_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", metavar="FILE", type=Path, help="start from this picture instead of from noise")
    parser.add_argument("--mask", metavar="FILE", type=Path, help="of its size: white is repainted, black is kept")
    parser.add_argument(
        "--strength", type=_fraction, help="how much of the picture may change, 0 to 1 (0.8; with --mask 1)"
    )


def edit_inputs(options: argparse.Namespace) -> dict[str, Any]:
    """The options => further arguments of the pipeline's call; none without a picture.

    Raises ValueError for a file that is no picture, and for a mask or a strength without a picture.
    """
    if options.image is None:
        for name in ("mask", "strength"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name}: goes with a picture to start from; give it by --image FILE")
        return {}
    from sd_mini.images import decode_image

    edit: dict[str, Any] = {"image": decode_image(options.image)[0]}
    if options.mask is not None:
        edit["mask_image"] = decode_image(options.mask, background=(0, 0, 0))[0]  # what is transparent is kept
    if options.strength is not None:
        edit["strength"] = options.strength
    return edit


def _fraction(text: str) -> float:
    """An argparse type: text => a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number from 0 to 1")
    return value
