"""One question answered whole: what would other placements of this run's experts have given?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe_lens.errors import ReplayError
from moe_lens.replay.index import Index
from moe_lens.replay.placement.balance import Balance
from moe_lens.replay.placement.choices import (
    TOKENS,
    Choices,
    choices_of,
    together_of,
)
from moe_lens.replay.placement.counts import MOST, Counts, counts_of, rows_of
from moe_lens.replay.placement.fit import Group, fitted, placed
from moe_lens.replay.placement.methods import METHODS
from moe_lens.replay.placement.plan import Placement
from moe_lens.replay.placement.verdict import LEAST_GAIN, Verdict, fetched, verdict_of
from moe_lens.replay.placement.what_if import (
    Traffic,
    balances,
    divided,
    held_bytes,
    traffic_of,
    weight_bytes,
)
from moe_lens.trace.reader import RunFiles, open_run


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        group: Ranks, replicas, nodes.
        method: The way to place that is to be judged and written: one of `METHODS`, or a plan's
            file.
        now: The file of a plan: where experts lie now; None: in the order of their numbers, no
            replicas.
        layers, phase, steps: Only these of the run.
        dtype: Of weights and of what is sent: a key of `moe_lens.metrics.stall.BYTES`.
        compare: Judge every way to place, not only the one.
        verdict: Say whether it helps.
        least_gain: A gain below is none.
        forwards: At most so many are looked at, evenly spread.
        tokens: At most about so many of each layer, where rows per token are read.
    """

    group: Group
    method: str = "eplb"
    now: str | None = None
    layers: frozenset[int] | None = None
    phase: str | None = None
    steps: range | None = None
    dtype: str = "bfloat16"
    compare: bool = True
    verdict: bool = False
    least_gain: float = LEAST_GAIN
    forwards: int = MOST
    tokens: int = TOKENS


@dataclass(frozen=True)
class Candidate:
    """A placement, judged on forwards that it was not fitted to.

    Attributes:
        placement: Fitted to the earlier forwards.
        balance: By phase.
        traffic: None where the run has no rows per token.
        bytes_per_rank: Weights of all layers' experts on a rank, those that layers share once; None
            where sizes are unknown.
        moved: Experts that the busiest rank has to fetch, over all layers, from where they lie now;
            those that layers share count in each.
        moved_bytes: Their weights; None where sizes are unknown.
    """

    placement: Placement
    balance: dict[str, Balance]
    traffic: Traffic | None
    bytes_per_rank: int | None
    moved: int
    moved_bytes: int | None


@dataclass(frozen=True)
class Study:
    """The answer.

    Attributes:
        counts: Everything that was looked at.
        fitted_to, judged_by: Its parts; the same forwards in phases of few forwards.
        now: Where experts lie now: judged first of all.
        candidates: The others; the one asked for is among them.
        plan: The one asked for, fitted to all forwards: what is written.
        verdict: If it was asked for.
        made_steps: How forwards were made up, where no engine ran them; empty: they were run.
    """

    counts: Counts
    fitted_to: Counts
    judged_by: Counts
    now: Candidate
    candidates: list[Candidate]
    plan: Placement
    verdict: Verdict | None
    made_steps: str = ""

    def of(self, method: str) -> Candidate:
        """The candidate of a method, or of a plan by the name of its file."""
        return next(c for c in self.candidates if c.placement.method == method)

    @property
    def in_sample(self) -> list[str]:
        """Phases of so few forwards that they are judged by those they were fitted to."""
        both = set(self.fitted_to.forwards) & set(self.judged_by.forwards)
        return [phase for phase in self.judged_by.phases if any(key[2] == phase for key in both)]

    @property
    def fitted_how(self) -> str:
        """What plans were fitted to and judged by, in words."""
        judged = set(self.judged_by.forwards)
        apart = [key for key in self.fitted_to.forwards if key not in judged]
        text = []
        if apart:
            later = len(judged - set(self.fitted_to.forwards))
            text.append(f"fitted to {len(apart):,} forwards, judged by the {later:,} after them")
        if self.in_sample:
            few = ", ".join(self.in_sample)
            text.append(f"{few} has too few forwards to keep some apart, and is judged by those")
            text[-1] += " that plans were fitted to, which flatters them"
        return "; ".join(text)


def study(run: str | Path, question: Question) -> Study:
    """Read a run and judge placements.

    Raises:
        TraceError: Not a trace.
        ReplayError: No counts, or numbers that no placement can have.
    """
    files = open_run(run)
    counts = counts_of(
        files,
        layers=question.layers,
        phase=question.phase,
        steps=question.steps,
        most=question.forwards,
    )
    earlier, later = divided(counts)
    now = _now(files, question, counts)
    rows = rows_of(files, counts.infos)
    together = _together(question, rows, earlier) if _wants(question, "affinity") else None
    judged = [m for m in METHODS if _wants(question, m)]
    if together is None and question.method != "affinity":
        judged = [m for m in judged if m != "affinity"]
    placements = [now, *(placed(m, question.group, earlier, together) for m in judged)]
    if question.method in METHODS:
        of_all = _together(question, rows, counts) if question.method == "affinity" else None
        plan = placed(question.method, question.group, counts, of_all)
    else:
        plan = fitted(files, question.method, question.group, counts)
        placements.append(plan)
    choices = choices_of(rows, later, question.tokens)
    made = [_candidate(placement, later, now, choices, question.dtype) for placement in placements]
    verdict = _verdict(question, counts, now, together) if question.verdict else None
    return Study(
        counts, earlier, later, made[0], made[1:], plan, verdict, made_steps=files.meta.steps
    )


def _together(question: Question, rows: Index | None, counts: Counts) -> NDArray[np.float64] | None:
    return together_of(choices_of(rows, counts, question.tokens), counts)


def _wants(question: Question, method: str) -> bool:
    """Whether a way to place is judged: experts in their order are, as they lie now."""
    return method == question.method or (question.compare and method != "contiguous")


def _verdict(
    question: Question,
    counts: Counts,
    now: Placement,
    together_LEE: NDArray[np.float64] | None,
) -> Verdict:
    if question.method not in METHODS:
        raise ReplayError(
            "a verdict fits plans to one part of the run and judges them by the next: it takes a "
            f"way to place ({', '.join(METHODS)}), not a finished plan."
        )
    return verdict_of(
        counts,
        question.method,
        question.group,
        now,
        together_LEE=together_LEE,
        least_gain=question.least_gain,
    )


def _now(files: RunFiles, question: Question, counts: Counts) -> Placement:
    """Where experts lie: no replicas, where they divide without."""
    group = question.group
    if question.now is None:
        replicas = 0 if counts.experts % group.ranks == 0 else group.replicas
        return placed("contiguous", Group(group.ranks, replicas, group.nodes), counts)
    if question.now in METHODS:
        raise ReplayError(
            f"where experts lie now is a plan's file, not {question.now!r}: what is fitted to the "
            "run lies nowhere yet."
        )
    return fitted(files, question.now, group, counts)


def _candidate(
    placement: Placement,
    later: Counts,
    now: Placement,
    choices: dict[int, Choices] | None,
    dtype: str,
) -> Candidate:
    traffic = None
    if choices is not None:
        traffic = traffic_of(choices, later.infos, placement, dtype=dtype)
    each_L = weight_bytes(later.infos, dtype)
    fetched_RL = fetched(now, placement)
    return Candidate(
        placement=placement,
        balance=balances(later, placement),
        traffic=traffic,
        bytes_per_rank=None if each_L is None else held_bytes(placement, later.infos, each_L),
        moved=int(fetched_RL.sum(1).max()),
        moved_bytes=None if each_L is None else int((fetched_RL * each_L).sum(1).max()),
    )
