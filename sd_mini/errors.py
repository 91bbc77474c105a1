"""The one exception that stands for a user's mistake."""

from __future__ import annotations


class UserError(ValueError):
    """A user's mistake, in one line: what was given, what was expected, how to mend it.

    A command line prints it and exits with 2 (`sd_mini.config.command`). Any other exception, a ValueError of numpy or
    torch among them, is a fault of ours: it keeps its traceback and exits with 1.
    """
