"""A trace in its order: the n-th forward of the model is the n-th that was recorded.

Legend: T tokens, K choices per token, N recorded rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_lens.errors import SteeringError
from moe_lens_hooks.adapter import MoELayer
from moe_lens_hooks.steering.recorded import Recorded
from moe_lens_hooks.steering.source import Key, Ticket, Wanted


class ByForward:
    """Replays forwards one after the other; all of their tokens, padding too.

    Args:
        recorded: What was read, of one rank.
        numbers: Number in the trace of each layer of the model.

    Raises:
        SteeringError: The trace lacks tokens of a forward.
    """

    def __init__(self, recorded: Recorded, numbers: dict[Key, int]) -> None:
        self.name = recorded.name
        self._recorded, self._numbers = recorded, numbers
        self._next = 0
        have = np.bincount(recorded.tokens["at"] >> 32, minlength=len(recorded.forwards))
        whole = np.array(recorded.sizes)
        lacking = np.flatnonzero(have != whole)
        if len(lacking):
            first = int(lacking[0])
            raise SteeringError(
                f"{self.name} has rows of {have[first]:,} of the {whole[first]:,} tokens of "
                f"{self._place(first)}, and lacks tokens in {len(lacking):,} of {len(whole):,} "
                f"forwards (sampling: {recorded.meta.sampling}). Record with tokens=1.0, choose "
                'steps that are whole with steps=, or force by="position".'
            )

    def begin(self, inputs: dict[str, Any]) -> Ticket:
        if self._next >= len(self._recorded.forwards):
            raise SteeringError(
                f"{self.name} holds {len(self._recorded.forwards)} forwards, and all of them were "
                "replayed. To start over, call rewind()."
            )
        self._check_text(self._next, inputs)
        return self._next

    def wanted(
        self,
        layer: MoELayer,
        times: int,
        ticket: Ticket,
        shape: tuple[int, ...],
        token_T: Tensor | None,
    ) -> Wanted | None:
        number = self._numbers.get((layer.info.path, times))
        found = None if number is None else self._recorded.layers[number]
        first, last = (0, 0) if found is None else found.of_forward(ticket)
        if found is None or first == last:
            raise SteeringError(
                f"{layer.info.path} runs in this forward, but has no decisions in "
                f"{self._place(ticket)} of {self.name}."
            )
        recorded_T = torch.from_numpy(found.at_N[first:last] & 0xFFFFFFFF)
        if token_T is not None and not torch.equal(token_T.cpu(), recorded_T):
            raise SteeringError(
                f"{layer.info.path} sees {len(token_T)} of the tokens, which are not the "
                f"{len(recorded_T)} that it saw in {self._place(ticket)} of {self.name}."
            )
        weights = found.weights_NK
        return Wanted(
            torch.from_numpy(found.ids_NK[first:last].astype(np.int64)),
            None if weights is None else torch.from_numpy(weights[first:last]),
        )

    def end(self, ticket: Ticket, ran: set[Key]) -> tuple[int, int]:
        seen = {self._numbers[key] for key in ran}
        for number, rows in self._recorded.layers.items():
            first, last = rows.of_forward(ticket)
            if last > first and number not in seen:
                raise SteeringError(
                    f"{rows.info.path} did not run in this forward, but has decisions in "
                    f"{self._place(ticket)} of {self.name}."
                )
        self._next = ticket + 1  # not before: a forward that raised may be tried again
        return self._recorded.sizes[ticket], 0

    def rewind(self) -> None:
        self._next = 0

    def _place(self, number: int) -> str:
        _, step, forward = self._recorded.forwards[number]
        return f"step {step}, forward {forward}"

    def _check_text(self, number: int, inputs: dict[str, Any]) -> None:
        """The batch is the recorded text, where the trace holds it."""
        tokens = self._recorded.tokens
        here = (tokens["at"] >> 32 == number) & (tokens["stream"] == "main")
        here &= tokens["token_id"] >= 0
        given = inputs.get("input_ids")
        if not here.any() or not isinstance(given, Tensor):
            return
        at = tokens["at"][here] & 0xFFFFFFFF
        text = given.reshape(-1).cpu().numpy()
        if len(text) != len(at):
            return  # a length that does not fit is told by the layers, with more to say
        differ = np.flatnonzero(text[at] != tokens["token_id"][here])
        if len(differ):
            token, i = int(at[differ[0]]), int(differ[0])
            raise SteeringError(
                f"this batch is another text than {self._place(number)} of {self.name}: token "
                f"{token} is {text[token]}, was {tokens['token_id'][here][i]} ({len(differ)} of "
                f"{len(at)} differ)."
            )
