"""The command line `sd-mini`; importing it loads no torch."""

from sd_mini.cli.commands import main

__all__ = ["main"]
