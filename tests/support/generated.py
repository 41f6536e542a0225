"""What a generation really ran, seen apart from moe_lens, and what its trace says of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from support.tables import frame
from support.truth import spy
from torch import Tensor, nn

from moe_lens.trace.reader import open_run


@dataclass
class Ran:
    """One forward of the root module."""

    token_ids_BS: Tensor
    experts: dict[str, Tensor] = field(default_factory=dict)
    """What each experts module was given, `[T, K]`, by path."""


@contextmanager
def watched(model: nn.Module) -> Iterator[list[Ran]]:
    """The forwards of a model, in order."""
    forwards: list[Ran] = []

    def begin(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = kwargs.get("input_ids", kwargs.get("decoder_input_ids"))
        forwards.append(Ran((args[0] if args else given).clone()))

    def end(*_: Any) -> None:
        forwards[-1].experts = {path: ids for path, ids, _ in calls}
        calls.clear()

    with spy(model) as calls:
        handles = [
            model.register_forward_pre_hook(begin, with_kwargs=True),
            model.register_forward_hook(end),
        ]
        try:
            yield forwards
        finally:
            for handle in handles:
                handle.remove()


@dataclass
class Traced:
    """A trace, with the forwards numbered in the order in which they ran."""

    run: Path

    def __post_init__(self) -> None:
        self.tokens = self._ordered(frame(self.run, "tokens"))
        self.routing = self._ordered(frame(self.run, "routing"))
        self.sequences = frame(self.run, "sequences").set_index("sequence")
        self.outcomes = frame(self.run, "outcomes")
        self.load = frame(self.run, "load")
        self.steps = frame(self.run, "steps").sort_values(["step", "forward"])

    def _ordered(self, rows: pd.DataFrame) -> pd.DataFrame:
        order = frame(self.run, "steps")[["step", "forward"]].sort_values(["step", "forward"])
        order["ran"] = range(len(order))
        return rows.merge(order, on=["step", "forward"])

    @property
    def rejected(self) -> set[tuple[int, int, int, int]]:
        """(step, forward, sequence, position) of what `outcomes` says was not kept."""
        lost = self.outcomes[self.outcomes.kept == False]  # noqa: E712
        keys = ["step", "forward", "sequence", "position"]
        return set(lost[keys].itertuples(index=False, name=None))

    @property
    def kept(self) -> pd.DataFrame:
        """Tokens that are no padding and were not rejected."""
        keys = ["step", "forward", "sequence", "position"]
        lost = self.rejected
        here = [key not in lost for key in self.tokens[keys].itertuples(index=False, name=None)]
        return self.tokens[np.array(here, bool) & ~self.tokens.padding.to_numpy()]

    def by_sequence(self) -> dict[int, dict[int, int]]:
        """Token id by position, of each sequence's kept tokens; each position once."""
        out: dict[int, dict[int, int]] = {}
        for row in self.kept.itertuples():
            of = out.setdefault(row.sequence, {})
            assert row.position not in of, (row.sequence, row.position)
            of[row.position] = row.token_id
        return out

    def prefixes(self) -> set[tuple[int, ...]]:
        """For each kept token, all tokens up to it; of a fork, through its parent."""
        own = self.by_sequence()
        everything: dict[int, dict[int, int]] = {}
        for row in self.tokens[~self.tokens.padding].itertuples():
            everything.setdefault(row.sequence, {})[row.position] = row.token_id

        def before(sequence: int, position: int) -> tuple[int, ...]:
            if position == 0:
                return ()
            mine = everything[sequence]
            if position - 1 not in mine:
                sequence = int(self.sequences.parent[sequence])
                return before(sequence, position)
            return (*before(sequence, position - 1), mine[position - 1])

        return {(*before(s, p), token) for s, of in own.items() for p, token in of.items()}


def same_experts(traced: Traced, forwards: list[Ran], slots: dict[int, Any] | None = None) -> int:
    """Check that each row of routing has the ids that the experts were given; how many rows.

    Args:
        traced: The trace.
        forwards: What ran.
        slots: Unused forwards may be left out: index in the trace to index in `forwards`.
    """
    paths = {x.layer: f"{x.path}.experts" for x in open_run(traced.run).meta.layers}
    for row in traced.routing.itertuples():
        ran = forwards[row.ran if slots is None else slots[row.ran]]
        assert list(row.expert_ids) == ran.experts[paths[row.layer]][row.token].tolist()
    return len(traced.routing)


def routed_to(forwards: list[Ran], valid: list[Tensor]) -> dict[tuple[str, int], int]:
    """(experts module, expert) to choices, of the tokens where `valid` (`[B, S]` each) is set."""
    out: dict[tuple[str, int], int] = {}
    for ran, valid_BS in zip(forwards, valid, strict=True):
        for path, ids_TK in ran.experts.items():
            for t in torch.nonzero(valid_BS.reshape(-1)).flatten().tolist():
                for expert in ids_TK[t].tolist():
                    out[path, expert] = out.get((path, expert), 0) + 1
    return out


def load_of(traced: Traced) -> dict[tuple[str, int], int]:
    """The same from the trace's counts."""
    paths = {x.layer: f"{x.path}.experts" for x in open_run(traced.run).meta.layers}
    sums = traced.load.groupby(["layer", "expert"]).routed.sum()
    return {(paths[layer], expert): int(n) for (layer, expert), n in sums.items() if n}
