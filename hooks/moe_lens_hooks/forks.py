"""What a forked child must let go of: threads are not in it, and files are its parent's."""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet


class Forgets(Protocol):
    """Something that a child cannot go on with."""

    def _forget(self) -> None: ...


_live: WeakSet[Forgets] = WeakSet()


def forget_in_child(x: Forgets) -> None:
    """After a fork, `x._forget()` is called in the child."""
    _live.add(x)


def _forget_all() -> None:
    for x in list(_live):
        x._forget()


os.register_at_fork(after_in_child=_forget_all)
