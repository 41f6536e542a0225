"""Numbers of steps, and of the forwards in them."""

from __future__ import annotations


class Numbering:
    """Counts steps, unless the user numbers them; then what runs outside belongs to the last.

    Args:
        first: Number of the first step.
        resumed: Earlier attempts recorded steps: the first number may go back.
    """

    def __init__(self, first: int, *, resumed: bool) -> None:
        self.step = first
        """The step that runs, or ran last."""
        self.forward = 0
        """Number of its next forward."""
        self._next = first
        self._free = first
        """Steps from here to `_next` were forwards outside of any step: the user may still take
        their numbers, and goes on behind that forward."""
        self._resumed = resumed
        self._last: int | None = None
        self._said = False

    def begin(self, number: int | None) -> None:
        """A step of the user's begins.

        Raises:
            ValueError: The number lies before the last one.
        """
        if number is None:
            self.step, self.forward = self._next, 0
            return
        if self._resumed or number >= self._next:
            self._next = self._free = number
            self.step, self.forward = number, 0
        elif number != self._last:
            if number < self._free:
                last = "" if self._last is None else f", or the last one once more: {self._last}"
                raise ValueError(f"step number {number} must be at least {self._free}{last}")
            self.step, self.forward, self._free = number, 1, number + 1
        self._said = True

    def outside(self) -> None:
        """A forward begins outside of any step."""
        if self._said and self._last is not None:
            self.step = self._last
        else:
            self.step, self.forward = self._next, 0

    def take(self) -> int:
        """The number of a forward that begins."""
        number, self.forward = self.forward, self.forward + 1
        return number

    def end(self, *, inside: bool) -> None:
        """A step ended in which something ran.

        Args:
            inside: It was a step of the user's.
        """
        self._resumed = False
        self._last = self.step
        self._next = max(self._next, self.step + 1)
        if inside and self._free <= self.step:
            self._free = self.step + 1
