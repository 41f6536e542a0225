"""Listening to methods of classes: generation and its caches have no hooks of their own.

A method is wrapped on the class that defines it, not on the instance (a copy of which would go on
calling the original's), and only while somebody listens. What it does and returns is not changed.
Listeners are held weakly: listening does not keep a recorder or its model alive.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any
from weakref import WeakMethod

Listener = Callable[[Any, tuple[Any, ...], dict[str, Any]], AbstractContextManager[list[Any]]]
"""A bound method: (self, args, kwargs) to a context around the call; its list gets what the call
returned."""

_listeners: dict[tuple[type, str], list[WeakMethod[Listener]]] = {}
_originals: dict[tuple[type, str], Any] = {}
_running = threading.local()


def listen(cls: type, name: str, listener: Listener) -> None:
    """Call `listener` around a method, on whichever base of `cls` defines it in Python, if any."""
    owner = next((c for c in cls.__mro__ if name in vars(c)), None)
    if owner is None or not inspect.isfunction(vars(owner)[name]):
        return
    key = (owner, name)
    if key not in _originals:
        _originals[key], _listeners[key] = vars(owner)[name], []
        setattr(owner, name, _wrapper(key, vars(owner)[name]))
    weak = WeakMethod(listener, lambda _: _clear())
    if weak not in _listeners[key]:
        _listeners[key].append(weak)


def silence(listener: Listener) -> None:
    """Stop calling it; a method that nobody listens to is what it was."""
    gone = WeakMethod(listener)
    for key, listeners in _listeners.items():
        _listeners[key] = [x for x in listeners if x != gone]
    _clear()


def _clear() -> None:
    for key, listeners in list(_listeners.items()):
        _listeners[key] = [x for x in listeners if x() is not None]
        if not _listeners[key]:
            del _listeners[key]
            setattr(*key, _originals.pop(key))


def _wrapper(key: tuple[type, str], method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        inside: set[tuple[int, str]] = _running.__dict__.setdefault("inside", set())
        this = (id(self), key[1])
        if this in inside:  # a subclass calls its base: one call, told once
            return method(self, *args, **kwargs)
        inside.add(this)
        try:
            with ExitStack() as stack:
                alive = [f for x in _listeners.get(key, ()) if (f := x()) is not None]
                told = [stack.enter_context(f(self, args, kwargs)) for f in alive]
                returned = method(self, *args, **kwargs)
                for box in told:
                    box.append(returned)
        finally:
            inside.discard(this)
        return returned

    return call
