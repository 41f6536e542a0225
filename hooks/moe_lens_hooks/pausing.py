"""Recording that is stopped and started while the model runs.

Any thread may ask for it; it is taken up where a forward begins (or a step, or a beam search), so
that a forward is recorded whole or not at all.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from moe_lens.trace.meta import Meta
from moe_lens_hooks.forward import OpenForward

NOT_RECORDED = "forwards that ran while the recorder was paused, and are not recorded"
"""The warning in the trace's meta that counts them."""


class Switch:
    """Whether forwards are recorded, and how many were not.

    Args:
        on: They are from the beginning.
        before: Forwards that earlier attempts did not record.
        edit: Changes the trace's meta file.
        held: Something runs that has to end as it began.
    """

    def __init__(
        self,
        on: bool,
        before: int,
        edit: Callable[[Callable[[Meta], None]], None],
        held: Callable[[], bool],
    ) -> None:
        self.wanted = self.ever = on
        """Now, and at any time before."""
        self.on = on
        """What holds for the forward or step that runs."""
        self.skipped = 0
        """Forwards that ran while it was off."""
        self._before, self._edit, self._held = before, edit, held

    def want(self, on: bool) -> None:
        """Ask that it be so. From any thread."""
        self.wanted = on
        self.ever |= on

    def take(self) -> None:
        """Between forwards: from here on, what is wanted holds."""
        if self.on != self.wanted and not self._held():
            self.on = self.wanted
            self.note()

    def note(self) -> None:
        """Say in the trace how many forwards were not recorded. From any thread."""
        if self.skipped:
            self._edit(self._change)

    def _change(self, meta: Meta) -> None:
        meta.warnings[NOT_RECORDED] = self._before + self.skipped


@dataclass
class SkippedForward(OpenForward):
    """A forward that is not recorded: hooks that find it running do nothing.

    Several threads may run the model while nothing is recorded. It stands for all their forwards
    until none of them is running, so that none is seen from its middle on.
    """

    switch: Switch | None = None
    beside: set[int] = field(default_factory=set)
    """Other threads that run the model."""

    def problem(self, text: str, n: int = 1) -> None:
        """Nothing is recorded that could be wrong."""

    def join(self) -> None:
        """This thread, too, begins a forward."""
        self.beside.add(threading.get_ident())
        if self.switch is not None:
            self.switch.skipped += 1

    def leave(self) -> bool:
        """This thread's forward is over; True: and so is this, for no other thread's is left."""
        mine = threading.get_ident()
        self.beside.discard(mine)
        # Of a thread that is gone, nobody told that its forward is over.
        alive = set(sys._current_frames())
        if self.thread != mine and self.thread in alive:
            return False
        self.beside &= alive
        if not self.beside:
            return True
        self.thread = self.beside.pop()
        return False
