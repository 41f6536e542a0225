"""What went wrong while recording, told to the user at the end of a step, once."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Collection
from typing import Literal

from moe_lens.errors import CaptureBreach, UnsupportedRouter
from moe_lens.trace.meta import Meta
from moe_lens.trace.writer import TraceWriter
from moe_lens_hooks.forward import OpenForward

OnTrouble = Literal["raise", "warn"]


REMEMBERED = 1000
"""Breaches that were told already and may come from the writer once more (it keeps a hundred)."""


class Watch:
    """Gathers breaches and the writer's failure; raises or warns as the user chose.

    Args:
        writer: Checks the invariants and may fail.
        on_breach, on_write_error: "raise" or "warn".
        stop: Called when the writer has failed and the model is to run on.
    """

    def __init__(
        self,
        writer: TraceWriter,
        on_breach: OnTrouble,
        on_write_error: OnTrouble,
        stop: Callable[[], None],
    ) -> None:
        self._writer = writer
        self._raise_breach = on_breach == "raise"
        self.raise_write_error = on_write_error == "raise"
        self._stop = stop
        self._stopped = False
        self.tell: Callable[[str], None] = _warn
        """How the user hears of what is not raised."""
        self._seen_here: list[str] = []
        self._refused = False
        self._told: deque[str] = deque(maxlen=REMEMBERED)
        self._warned: set[str] = set()

    def breach(self, text: str, *, refused: bool = False) -> None:
        """A breach seen on the model's thread; the writer will find it again in the forward.

        Args:
            text: What is wrong.
            refused: A layer's routing cannot be seen.
        """
        self._seen_here.append(text)
        self._refused |= refused

    def problems(self, forward: OpenForward, refusals: Collection[str | None]) -> None:
        """A forward is over: its problems are breaches.

        Args:
            forward: Knows them.
            refusals: Texts that say that a layer's routing cannot be seen.
        """
        for text, n in forward.problems.items():
            times = f" ({n})" if n > 1 else ""
            where = f"step {forward.step}, forward {forward.forward}"
            self.breach(f"{where}: {text}{times}", refused=text in refusals)

    def check(self) -> None:
        """Raise or warn of what is new.

        Raises:
            TraceWriteError: The disk refused.
            UnsupportedRouter: A layer turned out to route in a way that cannot be seen.
            CaptureBreach: An invariant failed.
        """
        if self._writer.failed is not None:
            if self.raise_write_error:
                raise self._writer.failed
            if not self._stopped:
                self._stopped = True
                self._stop()
                self.tell(str(self._writer.failed))
        here, self._seen_here = self._seen_here, []
        texts = here + [t for t in self._writer.take_breaches() if t not in self._told]
        self._told.extend(here)
        if not texts:
            return
        more = f" … and {len(texts) - 3} more" if len(texts) > 3 else ""
        message = "; ".join(texts[:3]) + more
        refused, self._refused = self._refused, False
        if self._raise_breach:
            raise UnsupportedRouter(message) if refused else CaptureBreach(message)
        self.tell(message)

    def count(self, text: str, n: int = 1) -> None:
        """Note in the trace that something went wrong, without stopping."""

        def change(meta: Meta) -> None:
            meta.warnings[text] = meta.warnings.get(text, 0) + n

        self._writer.edit(change)

    def warn(self, text: str) -> None:
        """Warn the first time, count every time."""
        self.count(text)
        if text not in self._warned:
            self._warned.add(text)
            self.tell(text)


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=5)
