"""What only the system's packages bring to the tests."""

import os
from typing import NoReturn

import pytest


def missing(what: str) -> NoReturn:
    """What only the system's packages bring: a failure where `.ci/run` installs them, else skipped with their name."""
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)  # not under CI, where it fails: elsewhere a missing system package is no fault of the code
