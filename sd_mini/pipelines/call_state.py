"""The state of a pipeline's call: calls in several threads at once do not see each other's."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from threading import get_ident
from typing import Any
from weakref import WeakKeyDictionary

_LAST = 0  # no thread's number: what is read and set where no call runs
# of each pipeline, by the thread that calls it; not on the pipeline itself, which can then be pickled
_STATES: WeakKeyDictionary[Any, dict[int, dict[str, Any]]] = WeakKeyDictionary()


class OfTheCall:
    """An attribute of a pipeline that belongs to the call which runs in this thread.

    Set in a thread where none runs (a page's button that stops it), it is set for every call that does.
    """

    def __init__(self, default: Any):
        self.default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, pipeline: Any, owner: type | None = None) -> Any:
        if pipeline is None:
            return self
        states = _STATES.get(pipeline, {})
        return states.get(get_ident(), states.get(_LAST, {})).get(self.name, self.default)

    def __set__(self, pipeline: Any, value: Any) -> None:
        states = _STATES.setdefault(pipeline, {_LAST: {}})
        own = states.get(get_ident())
        for state in list(states.values()) if own is None else [own]:
            state[self.name] = value


def one_call(method: Callable) -> Callable:
    """A pipeline's method in which `OfTheCall` attributes are this call's; the last call's stay readable after it."""

    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        states, thread = _STATES.setdefault(self, {_LAST: {}}), get_ident()
        around = states.get(thread)  # where a callback calls its own pipeline
        states[thread] = {}
        try:
            return method(self, *args, **kwargs)
        finally:
            states[_LAST] = states.pop(thread)
            if around is not None:
                states[thread] = around

    return call
