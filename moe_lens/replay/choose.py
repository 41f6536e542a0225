"""Which forwards are replayed: some of each phase, spread evenly over the run.

They are visited in an order in which every beginning is spread over the run too, so that a replay
that runs out of time has seen all of it, only more coarsely.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import pyarrow.compute as pc

from moe_lens.errors import ReplayError
from moe_lens.replay import tables
from moe_lens.replay.index import Index

_T = TypeVar("_T")


@dataclass(frozen=True)
class Forward:
    """A forward of one rank, and how many of its tokens' rows the largest layer has."""

    rank: int
    step: int
    forward: int
    phase: str
    tokens: int

    @property
    def key(self) -> tuple[int, int, int]:
        return self.rank, self.step, self.forward


@dataclass(frozen=True)
class Chosen:
    """Forwards to replay, in the order in which they are to be visited.

    Attributes:
        forwards: Those chosen.
        recorded: Forwards of the trace with per-token rows.
        partial: Of those, forwards that lack rows of some of their tokens.
        used_partial: They are replayed all the same, as smaller batches.
    """

    forwards: list[Forward]
    recorded: int
    partial: int
    used_partial: bool


def choose(index: Index, most: int | None, *, partial: bool = False) -> Chosen:
    """Choose forwards.

    Args:
        index: What there is.
        most: Of each phase; None: all.
        partial: Take forwards too of which only some tokens have rows.

    Raises:
        ReplayError: None has the rows of all its tokens, and `partial` is off.
    """
    every, whole = _forwards(index)
    usable = every if partial else whole
    if not usable:
        fullest = max(every, key=lambda f: f.tokens)
        has, tokens = fullest.tokens, _all_tokens(index, fullest)
        of_all = "" if tokens is None else f" of {tokens:,}"
        parts = "Replay the parts as smaller batches with --partial."
        how = "Record with tokens=1.0 (moe-lens record --tokens 1)"
        raise ReplayError(
            f"{index.files.path}: none of the {len(every):,} forwards with per-token rows has them "
            f"for all its tokens (sampling: {index.files.meta.sampling}; the fullest has {has:,}"
            f"{of_all}), and a part of a batch does not load experts as the batch did. "
            + (parts if index.files.meta.imported else f"{how}, or {parts[0].lower()}{parts[1:]}")
        )
    by_phase: dict[str, list[Forward]] = defaultdict(list)
    for each in usable:
        by_phase[each.phase].append(each)
    visited = in_turns(by_phase, most)
    return Chosen(visited, len(every), len(every) - len(whole), partial)


def _forwards(index: Index) -> tuple[list[Forward], list[Forward]]:
    """All forwards with rows, in order, and those of which every layer is whole."""
    names = ("rank", "step", "forward", "phase")
    found = index.sites.group_by(names).aggregate([("rows", "max"), ("whole", "all")])
    order = [(name, "ascending") for name in ("step", "forward", "rank")]
    rows = found.sort_by(order).to_pylist()
    every = [Forward(r["rank"], r["step"], r["forward"], r["phase"], r["rows_max"]) for r in rows]
    return every, [f for f, r in zip(every, rows, strict=True) if r["whole_all"]]


def _all_tokens(index: Index, forward: Forward) -> int | None:
    only = (pc.field("step") == forward.step) & (pc.field("forward") == forward.forward)
    rows = tables.rows(index.files, "steps", forward.rank, ("tokens",), only)
    return int(rows["tokens"][0].as_py()) if rows.num_rows else None


def in_turns(by_phase: Mapping[str, list[_T]], most: int | None) -> list[_T]:
    """At most so many of each phase, spread over the run: one of each phase in turn.

    A beginning of the list has all phases, and each of them from all over the run.
    """
    taken = [_spread(found, most) for found in by_phase.values()]
    longest = max(map(len, taken))
    return [found[i] for i in range(longest) for found in taken if i < len(found)]


def _spread(found: list[_T], most: int | None) -> list[_T]:
    """At most so many, evenly apart, ordered so that every beginning is evenly apart too."""
    n = len(found) if most is None else min(most, len(found))
    at = evenly(len(found), n)
    return [found[at[i]] for i in coarse_first(n)]


def evenly(of: int, most: int) -> list[int]:
    """Places of `most` things, evenly apart, among `of` things."""
    return [(2 * i + 1) * of // (2 * most) for i in range(most)]


def coarse_first(n: int) -> list[int]:
    """0 to n - 1 in the order of their reversed bits (van der Corput): the ends meet last.

    Every beginning of the list is spread over the whole, as an interrupted sweep should be.
    """
    bits = max(1, (n - 1).bit_length())
    return [i for k in range(2**bits) if (i := int(f"{k:0{bits}b}"[::-1], 2)) < n]
