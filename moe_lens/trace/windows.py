"""Windows of counts: what one or many forwards saw, summed.

A forward stands alone wherever a capacity applies or it makes at least as many choices as there
are experts; small ones of one phase (decoding) share a window for about a second.
"""

from __future__ import annotations

import copy
import time
from dataclasses import fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lens.trace.events import Doubles, Forward, Ints, LayerCounts, Losses, loads

SHARED_SECONDS = 1.0

SHARED_FORWARDS = 64
"""Forwards that share a window at most, where nobody knows when they ran."""

_SUMMED = [f.name for f in fields(LayerCounts) if f.name.endswith(("_G", "_GE"))]


def stands_alone(forward: Forward) -> bool:
    """The counts of this forward must not be summed with those of another."""
    if forward.parts:
        return False
    return forward.phase == "train" or any(
        x.capacity is not None or fills(x.tokens, x.top_k, x.routed_GE.shape[1])
        for x in forward.layers
    )


def fills(tokens: int, top_k: int | None, experts: int) -> bool:
    """So many tokens make at least as many choices as a layer has experts."""
    return tokens * (top_k or 1) >= experts


NULL_WHEN_UNSEEN = {
    *("prob_sum", "weight_sum", "received"),
    *("entropy_sum", "margin_sum", "top1_prob_sum", "zloss_sum", "group_entropy_sum"),
}
"""Sums that are not known where one forward did not see them."""


class LayerSum:
    """One layer of a window: the counts, and what can only be known forward by forward."""

    def __init__(self, counts: LayerCounts) -> None:
        self.counts = counts
        self.forwards = 0
        self.max_load = self.max_load_expert = self.touched = 0

    def note(self, counts: LayerCounts, forwards: int) -> None:
        found = counts.loads
        if found is None:
            load_E = counts.processed_GE.sum(0)
            if counts.rerouted_in_GE is not None:
                load_E = load_E + counts.rerouted_in_GE.sum(0)
            found = loads(load_E[None])
        if self.forwards == 0 or found.most > self.max_load:
            self.max_load, self.max_load_expert = found.most, found.expert
        self.touched += found.touched
        self.forwards += forwards


class Window:
    """Sums forwards, until `tables` lays the sums into rows."""

    def __init__(self, number: int, attempt: int, forward: Forward) -> None:
        self.number = number
        self.attempt = attempt
        self.step = forward.step
        self.phase = forward.phase
        self.alone = stands_alone(forward)
        self._t_start_ns = forward.t_start_ns
        self._forwards = 0
        self._clear()

    def _clear(self) -> None:
        self.tags: list[str] = []
        self._since = time.monotonic()
        self._layers: dict[int, LayerSum] = {}
        self.tokens_G = np.zeros(0, np.int64)
        self.sequences_G = np.zeros(0, np.int64)
        self.loss_sum_G = np.zeros(0)
        self.loss_tokens_G = np.zeros(0, np.int64)

    def emptied(self) -> Window:
        """This window once more, for what belongs to it and came after its rows were written."""
        again = copy.copy(self)
        again._clear()
        return again

    def takes(self, forward: Forward) -> bool:
        """Whether this forward may still be summed into this window.

        By when it began: the writer takes forwards some time after they ran, many at once.
        """
        if self.alone or forward.phase != self.phase or stands_alone(forward):
            return False
        if forward.t_start_ns is None or self._t_start_ns is None:
            return self._forwards + (len(forward.parts) or 1) <= SHARED_FORWARDS
        return abs(forward.t_start_ns - self._t_start_ns) <= SHARED_SECONDS * 1e9

    def expired(self) -> bool:
        """It has waited long enough for another forward."""
        return time.monotonic() - self._since > SHARED_SECONDS

    def add(self, forward: Forward) -> None:
        forwards = len(forward.parts) or 1
        self._forwards += forwards
        at_G = self._index(forward.tags)
        self.tokens_G[at_G] += forward.tokens_G
        self.sequences_G[at_G] += forward.sequences_G
        for x in forward.layers:
            if x.layer in self._layers:
                _merge(self._layers[x.layer].counts, x, at_G, len(self.tags))
            else:
                # A shared window sums in place; the forward's own counts are not ours to change.
                own = x if self.alone else _copy(x)
                spread(own, at_G, len(self.tags))
                self._layers[x.layer] = LayerSum(own)
            self._layers[x.layer].note(x, forwards)

    def add_losses(self, losses: Losses) -> None:
        at_G = self._index(losses.tags)
        self.loss_sum_G[at_G] += losses.loss_sum_G
        self.loss_tokens_G[at_G] += losses.loss_tokens_G

    def _index(self, tags: list[str]) -> NDArray[np.int64]:
        """Where a forward's tags stand among the window's, which grow by the new ones."""
        new = [t for t in tags if t not in self.tags]
        if new:
            self.tags += new
            for name in ("tokens_G", "sequences_G", "loss_sum_G", "loss_tokens_G"):
                setattr(self, name, _grown(getattr(self, name), len(self.tags)))
        return np.array([self.tags.index(t) for t in tags], np.int64)

    def sums(self) -> list[LayerCounts]:
        """The counts of its layers, in order, laid out over all its tags."""
        layers = [self._layers[i].counts for i in sorted(self._layers)]
        for counts in layers:  # tags that came after a layer's last forward
            spread(counts, np.arange(len(counts.tokens_G)), len(self.tags))
        return layers

    def notes(self) -> list[LayerSum]:
        """What is known of its layers forward by forward, in the order of `sums`."""
        return [self._layers[i] for i in sorted(self._layers)]


def _grown(x: NDArray[Any], n: int) -> NDArray[Any]:
    if len(x) == n:
        return x
    return np.concatenate([x, np.zeros((n - len(x), *x.shape[1:]), x.dtype)])


def spread(x: LayerCounts, at_G: NDArray[np.int64], n: int) -> None:
    """Lay the counts of a forward's tags out over the window's `n` tags, in place."""
    if len(at_G) == n and (at_G == np.arange(n)).all():
        return
    for name in _SUMMED:
        old: Ints | Doubles | None = getattr(x, name)
        if old is not None:
            new = np.zeros((n, *old.shape[1:]), old.dtype)
            new[at_G] = old
            setattr(x, name, new)


def _copy(x: LayerCounts) -> LayerCounts:
    arrays = {n: a.copy() for n in _SUMMED if (a := getattr(x, n)) is not None}
    return replace(x, rows=None, loads=None, **arrays)


def _merge(into: LayerCounts, x: LayerCounts, at_G: NDArray[np.int64], n: int) -> None:
    spread(into, np.arange(len(into.tokens_G)), n)
    into.tokens += x.tokens
    into.padding_tokens += x.padding_tokens
    into.dispatch_ns = _known(into.dispatch_ns, x.dispatch_ns)
    into.combine_ns = _known(into.combine_ns, x.combine_ns)
    for name in _SUMMED:
        old, new = getattr(into, name), getattr(x, name)
        if new is None and old is None:
            continue
        if (old is None or new is None) and name.rpartition("_")[0] in NULL_WHEN_UNSEEN:
            setattr(into, name, None)  # unknown for some of the forwards: unknown
            continue
        if new is None:
            continue
        if old is None:
            old = np.zeros((n, *new.shape[1:]), new.dtype)
            setattr(into, name, old)
        old[at_G] += new


def _known(one: int | None, other: int | None) -> int | None:
    """A sum that is not known where one forward did not see it."""
    return None if one is None or other is None else one + other
