"""Which sequences a forward goes on with: by its cache, or by the generation that it is part of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from torch import Tensor, nn

from moe_lens_hooks.generation import Generation, Generations
from moe_lens_hooks.inputs import cache_of, cached_length, positions_of, returned_cache
from moe_lens_hooks.lineage import Line, Nodes, Rows, StagedOutcomes
from moe_lens_hooks.wrapping import listen, silence

_UNSEEN = (
    "beam search reorders its rows between forwards, and here nothing tells how ({why}): sequences "
    "and positions would be wrong. Generate with use_cache=True and a cache of transformers that "
    "has reorder_cache, or without beams."
)


@dataclass
class Going:
    """How a forward goes on from those before it.

    Attributes:
        cache: Its cache; None without one.
        past: Positions in the cache, as far as the host knows.
        start: The same on a device, where only that knows.
        rows: What is known of the rows that it goes on with; None: they are new.
        sure: `rows` are those of this very cache or generation, not just the last ones that fit.
        again: Leading positions of each row that a forward before has routed (no cache).
        expand: Rows that a generation makes of each of the user's.
        phase: prefill or decode, inside a generation.
        problem: Why it cannot be followed.
    """

    cache: Any = None
    past: int = 0
    start: Tensor | None = None
    rows: Rows | None = None
    sure: bool = True
    again: int = 0
    expand: int = 1
    phase: str | None = None
    problem: str | None = None

    @property
    def cached(self) -> bool:
        """There is something in the cache."""
        return self.past > 0 or self.start is not None


class Following:
    """Follows caches and generations from forward to forward.

    Args:
        models: The recorded root modules.
        new: Makes a sequence that forks from one.
        put: Takes what became of tokens.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        new: Callable[[Line], Line],
        put: Callable[[StagedOutcomes], None],
    ) -> None:
        self._new, self._put = new, put
        self._rows: WeakKeyDictionary[Any, Rows] = WeakKeyDictionary()
        self._last: Rows | None = None
        """Of the last forward: goes on where a cache cannot be told from another (tuples)."""
        self._generations = Generations(models, self._over)
        self._listeners = {name: getattr(self, f"_{name}") for name in _METHODS}

    def close(self) -> None:
        """Stop listening to classes of caches and generations."""
        self._generations.close()
        for listener in self._listeners.values():
            silence(listener)

    def begin(self, inputs: dict[str, Any]) -> Going:
        """How a forward with these arguments goes on."""
        cache, generation = cache_of(inputs), self._generations.current
        going = Going() if cache is None else self._by_cache(cache, inputs, generation)
        if generation is None:
            return going
        generation.began = True
        going.expand = generation.expand
        if cache is None:
            going.rows = generation.rows
            done = generation.skipped if going.rows is None else going.rows.length
            going.past, going.again = (done, 0) if generation.cached else (0, done)
        started = going.cached or going.again > 0
        going.phase = "decode" if started and not generation.prefilling else "prefill"
        if generation.beams and started and not generation.prefilling:
            if cache is None:
                going.problem = _UNSEEN.format(why="there is no cache")
            elif going.rows is None or not going.rows.moved:
                why = f"{type(cache).__name__} was not seen to be reordered"
                going.problem = _UNSEEN.format(why=why)
        return going

    def skip(self, inputs: dict[str, Any]) -> None:
        """A forward begins that is not recorded: the cache grows by positions that nobody saw.

        By how many is seen when a recorded forward goes on with it; where only a device could tell,
        or caches cannot be told apart, sequences are new ones then.
        """
        self._last = None
        cache, generation = cache_of(inputs), self._generations.current
        if generation is not None:
            generation.began = True
        if cache is None:
            if generation is not None and generation.cached:
                self._grow(generation, positions_of(inputs) or 0)
            return
        length = cached_length(cache)
        try:
            if not isinstance(length, int) or length == 0:  # it may be used again for others
                self._rows.pop(cache, None)
            told_apart = isinstance(length, int)
        except TypeError:  # a tuple, or what compiled code tells of one
            told_apart = False
        if generation is not None and not told_apart:
            generation.rows = None

    def _grow(self, generation: Generation, positions: int) -> None:
        """A generation has a cache that its forwards do not show, and it grows."""
        if generation.rows is None:
            generation.skipped += positions
        else:
            generation.rows.skip(positions)

    @property
    def whole(self) -> bool:
        """What runs can only be followed from its beginning to its end."""
        return self._generations.whole

    def goes_on(self, going: Going, rows: Rows) -> None:
        """A forward was described: these are its rows."""
        self._last = rows
        generation = self._generations.current
        if generation is not None and generation.rows is not rows:
            generation.rows, generation.first = rows, len(rows.forwards)
        if going.cache is not None:
            self._bind(going.cache, rows)

    def over(self, rows: Rows | None, output: Any) -> None:
        """A forward has returned: the cache that it made, if any, holds its rows."""
        cache = returned_cache(output)
        if rows is not None and cache is not None:
            self._bind(cache, rows)

    def _by_cache(self, cache: Any, inputs: dict[str, Any], generation: Generation | None) -> Going:
        length = cached_length(cache)
        try:
            rows, sure = self._rows.get(cache), True
        except TypeError:  # a tuple, or what compiled code tells of one
            rows, sure = self._last if generation is None else generation.rows, False
            if not isinstance(length, int) and generation is None and positions_of(inputs) != 1:
                rows = None  # a prompt, as far as the host can tell
        if not isinstance(length, int):
            past = rows.length if rows is not None else 0
            return Going(cache, past, length if rows is None else None, rows, sure)
        if rows is not None and (length == 0 or (not sure and length != rows.length)):
            rows = None  # it was reset, or is another one
        if rows is not None:
            self._agree(rows, length)
        return Going(cache, length, None, rows, sure)

    def _agree(self, rows: Rows, length: int) -> None:
        """The cache holds so many positions: those beyond were cropped."""
        if length < rows.length:
            self._lost(rows, rows.cut(length))
        elif length > rows.length:
            rows.skip(length - rows.length)

    def _lost(self, rows: Rows, nodes: Nodes) -> None:
        if len(nodes):
            self._put(StagedOutcomes(rows.tokens(nodes), kept=False))

    def _bind(self, cache: Any, rows: Rows) -> None:
        try:
            self._rows[cache] = rows
        except TypeError:  # a tuple
            return
        for name, listener in self._listeners.items():
            listen(type(cache), name, listener)

    def _over(self, generation: Generation) -> None:
        """Only now is it known which beams were returned, and that a draft was one."""
        rows = generation.rows
        if rows is None:
            return
        nodes = rows.since(generation.first)
        if generation.beams and generation.finished is not None:
            self._lost(rows, nodes[~np.isin(nodes, list(generation.kept()))])
        elif generation.draft:
            self._lost(rows, nodes)

    # -- what caches do between forwards ---------------------------------------------------------

    @contextmanager
    def _crop(self, cache: Any, args: Any, kwargs: Any) -> Iterator[list[Any]]:
        yield []
        rows, length = self._rows.get(cache), cached_length(cache)
        if rows is not None and isinstance(length, int) and 0 < length < rows.length:
            self._agree(rows, length)

    @contextmanager
    def _reset(self, cache: Any, args: Any, kwargs: Any) -> Iterator[list[Any]]:
        yield []
        self._rows.pop(cache, None)

    @contextmanager
    def _reorder_cache(self, cache: Any, args: Any, kwargs: Any) -> Iterator[list[Any]]:
        yield []
        self._move(cache, args[0] if args else kwargs.get("beam_idx"))

    @contextmanager
    def _batch_select_indices(self, cache: Any, args: Any, kwargs: Any) -> Iterator[list[Any]]:
        yield []
        self._move(cache, args[0] if args else kwargs.get("indices"))

    @contextmanager
    def _batch_repeat_interleave(self, cache: Any, args: Any, kwargs: Any) -> Iterator[list[Any]]:
        yield []
        rows, repeats = self._rows.get(cache), args[0] if args else kwargs.get("repeats")
        if rows is not None and isinstance(repeats, int):
            self._move(cache, np.repeat(np.arange(len(rows)), repeats))

    def _move(self, cache: Any, source: Any) -> None:
        """The rows of a cache were reordered (read here, between forwards: this waits)."""
        rows = self._rows.get(cache)
        if rows is None or source is None:
            return
        at = np.asarray(source.tolist() if isinstance(source, Tensor) else source)
        at = np.flatnonzero(at) if at.dtype == bool else at % max(1, len(rows))
        lost = rows.reorder(at.tolist(), self._new)
        generation = self._generations.current
        if generation is None or not generation.beams or generation.rows is not rows:
            self._lost(rows, lost)  # a generation tells in the end: a finished beam leaves too


_METHODS = (*("crop", "reset", "reorder_cache", "batch_select_indices", "batch_repeat_interleave"),)
