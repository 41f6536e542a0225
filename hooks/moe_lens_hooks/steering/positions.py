"""A trace by sequence and position: a rollout, token by token, replayed in whatever batches.

What a sequence's token at a position was routed to is looked up, however the recording was cut into
forwards (prefill, decode, chunks) and whatever the batch looks like now (padding, packed rows, one
forward for all). Positions count a sequence's own tokens from 0, without padding.

Legend: B rows, S positions, T = B S tokens, N recorded tokens, K choices per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_lens.errors import SteeringError
from moe_lens_hooks.adapter import MoELayer
from moe_lens_hooks.inputs import cache_of, cached_positions
from moe_lens_hooks.steering.batches import Placed, place
from moe_lens_hooks.steering.choice import OWN
from moe_lens_hooks.steering.history import History, history_of
from moe_lens_hooks.steering.recorded import Recorded
from moe_lens_hooks.steering.source import Key, Ticket, Wanted

Name = int | str
"""A recorded sequence: its number on its rank, or the request id that the user gave it."""

Ints = NDArray[np.int64]


@dataclass(eq=False)
class _Forward:
    """A ticket: a forward, and where its tokens stand among the recorded ones."""

    inputs: dict[str, Any]
    past: int
    sequences: list[int] | None = None
    """Places in `History.sequences`, one for each sequence of the batch."""
    following: int = 0
    """How many of them are the next ones in the order in which they were recorded."""
    row_T: dict[str, Ints] = field(default_factory=dict)
    """By stream: row of the history; -1: no decision."""
    forced: int = 0
    own: int = 0


class ByPosition:
    """Looks decisions up by sequence and position.

    Args:
        recorded: What was read.
        numbers: Number in the trace of each layer of the model.
        layout: How the model flattens: "bs" or "sb".
        partial: The batch and the recorded sequences may overlap in part only.
    """

    def __init__(
        self, recorded: Recorded, numbers: dict[Key, int], layout: str, partial: bool
    ) -> None:
        self.name = recorded.name
        self._numbers, self._layout, self._partial = numbers, layout, partial
        self._history: History = history_of(recorded)
        self._next = 0
        self._named: list[int] | None = None
        self._running: list[int] = []
        """Sequences of the forward before, with which decoding goes on."""

    def begin(self, inputs: dict[str, Any]) -> Ticket:
        return _Forward(inputs, cached_positions(inputs))

    def wanted(
        self,
        layer: MoELayer,
        times: int,
        ticket: Ticket,
        shape: tuple[int, ...],
        token_T: Tensor | None,
    ) -> Wanted | None:
        forward: _Forward = ticket
        number = self._numbers.get((layer.info.path, times))
        if number not in self._history.decisions:
            raise SteeringError(f"{layer.info.path} runs now, but has no decisions in {self.name}.")
        stream = layer.info.stream
        if stream not in forward.row_T:
            self._locate(forward, stream, shape, token_T is None)
        row_T = forward.row_T[stream]
        if token_T is not None:
            row_T = row_T[token_T.cpu().numpy()]
        ids_NK, weights_NK = self._history.decisions[number]
        ids = ids_NK[row_T].astype(np.int64)
        ids[row_T < 0] = OWN
        weights = None if weights_NK is None else torch.from_numpy(weights_NK[row_T])
        return Wanted(torch.from_numpy(ids), weights)

    def end(self, ticket: Ticket, ran: set[Key]) -> tuple[int, int]:
        forward: _Forward = ticket
        idle = [path for path, times in self._numbers if (path, times) not in ran]
        if idle and not forward.past:
            raise SteeringError(f"{idle[0]} did not run, but has decisions in {self.name}.")
        forward.inputs = {}
        # Not before: a forward that raised may be tried again.
        self._next += forward.following
        self._running = forward.sequences or self._running
        return forward.forced, forward.own

    def rewind(self) -> None:
        self._next, self._named, self._running = 0, None, []

    def name_rows(self, names: Sequence[Name] | None) -> None:
        """Say which recorded sequences the next forwards hold; None: the next ones in order.

        Raises:
            SteeringError: There is no such sequence, or several of that name.
        """
        self._named = None if names is None else [self._history.find(n) for n in names]

    def _locate(self, forward: _Forward, stream: str, shape: tuple[int, ...], whole: bool) -> None:
        placed = place(forward.inputs, stream, shape if whole else (), forward.past, self._layout)
        if forward.sequences is None:
            forward.sequences = self._assign(forward, placed.runs)
        if len(forward.sequences) != placed.runs:
            raise SteeringError(
                f"the {stream} stream of this batch has {placed.runs} sequences, the other "
                f"{len(forward.sequences)}."
            )
        valid_T = placed.run_T >= 0
        sequence_T = np.array([*forward.sequences, 0], np.int64)[placed.run_T]
        row_T = self._history.look_up(stream, sequence_T, placed.position_T)
        row_T[~valid_T] = -1
        forward.row_T[stream] = row_T
        forward.forced += int((row_T >= 0).sum())
        forward.own += int((valid_T & (row_T < 0)).sum())
        if not self._partial:
            self._check_lengths(forward, stream, placed, row_T)
        if stream == "main":
            self._check_text(forward, row_T)

    def _assign(self, forward: _Forward, runs: int) -> list[int]:
        """Recorded sequences of a batch of so many."""
        if forward.past and len(self._running) == runs:
            return self._running
        known = self._history.sequences
        if self._named is not None:
            chosen = self._named
        else:
            chosen = list(range(self._next, min(self._next + runs, len(known))))
            forward.following = runs
        if len(chosen) != runs:
            said = "were named" if self._named is not None else f"of {len(known)} are left"
            raise SteeringError(
                f"this batch has {runs} sequences, but {len(chosen)} recorded ones {said} in "
                f"{self.name}. Name one for each with rows([...]), or start over with rewind()."
            )
        return chosen

    def _check_lengths(self, forward: _Forward, stream: str, placed: Placed, row_T: Ints) -> None:
        """All tokens but a sequence's last have decisions, and all decisions a token."""
        assert forward.sequences is not None
        # A prefill is the beginning of a sequence, and more comes.
        whole = cache_of(forward.inputs) is None and not forward.inputs.get("use_cache")
        for run, sequence in enumerate(forward.sequences):
            of_run = placed.run_T == run
            position = placed.position_T[of_run]
            missing = position[row_T[of_run] < 0]
            recorded = self._history.length(stream, sequence)
            name = self._history.label(sequence)
            if (missing < position.max()).any():
                raise SteeringError(
                    f"sequence {run} of this batch has {len(position)} tokens, but {name} of "
                    f"{self.name} has no decision at position {missing.min()} ({recorded} recorded)"
                    ". Is it another sequence? Name them with rows([...]), or let tokens without a "
                    "decision follow their routers with partial=True."
                )
            if whole and recorded > position.max() + 1:
                raise SteeringError(
                    f"sequence {run} of this batch has {len(position)} tokens, but {name} of "
                    f"{self.name} {recorded}. Is it another sequence? Name them with rows([...]), "
                    "or replay the beginning of longer ones with partial=True."
                )

    def _check_text(self, forward: _Forward, row_T: Ints) -> None:
        """The batch is the recorded text, where the trace holds it."""
        given = forward.inputs.get("input_ids")
        if not isinstance(given, Tensor) or given.numel() != len(row_T):
            return
        text_T = (given if self._layout == "bs" else given.T).reshape(-1).cpu().numpy()
        was_T = self._history.streams["main"].text_N[row_T]
        differ = np.flatnonzero((row_T >= 0) & (was_T >= 0) & (was_T != text_T))
        if len(differ):
            t = int(differ[0])
            raise SteeringError(
                f"this batch is another text than {self.name}: token {t} is {text_T[t]}, was "
                f"{was_T[t]} ({len(differ)} of {int((row_T >= 0).sum())} differ). Name the "
                "recorded sequences with rows([...])."
            )
