"""Reading from a place that may stall: another try after a pause, then an error with the place's name."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from sd_mini.errors import UserError
from sd_mini.remarks import remark

T = TypeVar("T")

RETRIES = 3
FIRST_PAUSE = 1.0  # s; each further one is twice as long


# by name, as the hub's libraries have changed their HTTP client (requests, httpx, aiohttp) and may again
_PASSING = {
    "ConnectionError",
    "TimeoutError",
    "TransportError",
    "Timeout",
    "ClientConnectionError",
    "ClientPayloadError",
}
_OFFLINE = "OfflineModeIsEnabled"  # a setting of the user's, and a ConnectionError


def _is_passing(error: BaseException | None) -> bool:
    """Whether an error, or one of those it came from, is a lost connection or a timeout, which may pass."""
    names: set[str] = set()
    while error is not None:
        names |= {base.__name__ for base in type(error).__mro__}
        names |= {_OFFLINE} if _OFFLINE in str(error) else set()  # `datasets` keeps no more of it than its name
        error = error.__cause__
    return bool(names & _PASSING) and _OFFLINE not in names


class _Attempts:
    """The pauses between tries; a try that got further begins them anew."""

    def __init__(self, what: str, sleep: Callable[[float], None]):
        self._what, self._sleep, self._failed = what, sleep, 0

    def succeed(self) -> None:
        self._failed = 0

    def fail(self, error: Exception) -> None:
        """Wait for the next try. Raises what may not pass, and UserError when all tries are used up."""
        if not _is_passing(error):
            raise error
        reason = " ".join(str(error).split()) or type(error).__name__
        self._failed += 1
        if self._failed > RETRIES:
            raise UserError(
                f"{self._what}: no connection after {RETRIES + 1} tries ({reason}); run the command again when the "
                "connection is back"
            ) from error
        pause = FIRST_PAUSE * 2 ** (self._failed - 1)
        remark(f"{self._what}: {reason}; trying again in {pause:g} s ({self._failed} of {RETRIES})")
        self._sleep(pause)


def with_retries(read: Callable[[], T], what: str, sleep: Callable[[float], None] = time.sleep) -> T:
    """`read()`, tried again up to RETRIES times where the connection is lost or times out.

    Raises UserError, which names `what`, if it is lost each time. Other exceptions pass at once.
    """
    attempts = _Attempts(what, sleep)
    while True:
        try:
            return read()
        except Exception as error:
            attempts.fail(error)


def iterate_with_retries(
    start: Callable[[int], Iterator[T]], what: str, sleep: Callable[[float], None] = time.sleep
) -> Iterator[T]:
    """The items of `start(0)`; after a lost connection those of `start(n)`, n items having been read."""
    attempts, count = _Attempts(what, sleep), 0
    while True:
        try:
            for item in start(count):
                yield item
                count += 1
                attempts.succeed()
            return
        except Exception as error:
            attempts.fail(error)
