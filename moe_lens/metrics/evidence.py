"""What is known of one layer in one phase: the arrays that the catalogue's metrics are made of.

A metric's function names what it reads as its parameters; each is a field or property of
`Evidence`, and `DATA` says which data it comes from. `moe_lens.queries.evidence` fills them in.

Legend: E experts, Z zero-compute experts, V = E + Z outputs of the router, F forwards, T tokens
(some, with rows), N tokens of whole sequences, one after another, K choices of a token, R draws,
P capacity factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moe_lens.metrics.chance import Floats, Ints, draws_of, draws_of_forwards

Bools = NDArray[np.bool_]
Answer = Mapping[str, float | None]
"""A row of a stored question."""

LEVELS = {
    "C": "counts and sums, of every token: always recorded",
    "I": "expert ids of single tokens: record with tokens=1.0, or a share of the sequences",
    "W": "gate weights of single tokens: recorded with their ids",
    "Z": "router logits of single tokens: record with tokens=1.0 and logits=True",
}
"""Codes of what has to be recorded."""


@dataclass(frozen=True)
class Data:
    """What a field of `Evidence` is, and where it comes from."""

    level: str
    """A code of `LEVELS`."""
    lacks: str
    """What to say where it is null."""


DATA = {
    "experts": Data("C", "no experts"),
    "outputs": Data("C", "no experts"),
    "top_k": Data("C", "no a fixed number of choices per token"),
    "tokens": Data("C", "no tokens"),
    "counts_E": Data("C", "no choices"),
    "counts_HE": Data("C", "fewer than two steps"),
    "prob_V": Data("C", "no sums of router probabilities"),
    "gate_E": Data("C", "no sums of gate weights"),
    "layer_balance": Data("C", "no choices"),
    "router_confidence": Data("C", "no sums of entropy, margin and z-loss"),
    "dropped_tokens": Data("C", "no counts of drops"),
    "counts_FE": Data("C", "no counts of single forwards: windows hold several"),
    "prob_FV": Data("C", "no router probabilities of single forwards"),
    "overflowed_FE": Data("C", "no capacity: the layer is dropless"),
    "capacity_F": Data("C", "no capacity: the layer is dropless"),
    "tokens_F": Data("C", "no counts of single forwards: windows hold several"),
    "step_F": Data("C", "no counts of single forwards: windows hold several"),
    "rank_F": Data("C", "no counts of single forwards: windows hold several"),
    "computed_FE": Data("C", "no counts of single forwards: windows hold several"),
    "sweep": Data("C", "no forwards with counts, or rows, of their own"),
    "sequence_T": Data("I", "no per-token rows"),
    "chosen_TV": Data("I", "no per-token rows"),
    "weight_TV": Data("W", "no per-token rows"),
    "dropped_TV": Data("W", "no per-token rows with dropped choices"),
    "logits_TV": Data("Z", "no router logits"),
    "prob_TV": Data("Z", "no router logits, and what they mean"),
    "ids_NK": Data("I", "no per-token rows"),
    "weights_NK": Data("W", "no gate weights of the router's own choices"),
    "before_NK": Data("I", "no layer before it in its stream"),
    "sequence_N": Data("I", "no per-token rows"),
    "position_N": Data("I", "no per-token rows"),
    "tag_N": Data("I", "fewer than two tags"),
    "tags": Data("I", "fewer than two tags"),
    "token_id_N": Data("I", "no token ids: record with token_ids=True"),
    "margin_N": Data("I", "no margins of single tokens"),
    "dropped_N": Data("I", "no dropped choice in the kept rows"),
    "loss_N": Data("I", "no losses of single tokens: give them to rec.loss"),
    "draws_RE": Data("C", "no choices"),
    "draws_RFE": Data("C", "no counts of single forwards: windows hold several"),
}  # fmt: skip
"""Of every field and property that a metric may read."""


@dataclass(frozen=True)
class Evidence:
    """One layer in one phase. None: not recorded, or there is no such number.

    Attributes:
        experts: E.
        outputs: V.
        top_k: k, where it is fixed.
        tokens: Valid tokens behind the counts.
        counts_E: Choices of each expert by valid tokens.
        counts_HE: `[2, E]`: the same of the first and the second half of the steps.
        prob_V: Mean of the router's probability, sums to 1.
        gate_E: Sums of the gate weights with which an expert was computed.
        layer_balance: The layer's row of the stored question; so `router_confidence` and
            `dropped_tokens`, all tags together.
        counts_FE: Choices in single forwards, whole steps drawn evenly over the run.
        computed_FE: Choices of those that their expert computed.
        overflowed_FE: Choices of those that found their expert full; null without a capacity.
        prob_FV: Mean router probability in each.
        tokens_F: Valid tokens of each.
        step_F: Its step.
        rank_F: Its rank.
        capacity_F: Choices that an expert takes, where it is one capacity for the whole forward.
        sweep: `capacity_factor`, `dropped_share`, as the question `capacity_sweep` says.
        sequence_T: Number of each token's sequence, from 0.
        chosen_TV: Whether the router chose the output for the token.
        weight_TV: Gate weights, 0 where not chosen.
        dropped_TV: Of the chosen, those that no expert computed; null where nothing was.
        logits_TV: Rounded to bfloat16, as recorded.
        prob_TV: What they mean: softmax, or scores divided by their sum.
        ids_NK: The router's choices of experts, the largest gate weight first; -1: chose fewer.
        weights_NK: Their gate weights; 0 where there is no choice.
        before_NK: The same tokens' choices in the layer before.
        sequence_N: Number of the token's sequence, from 0 and ascending.
        position_N: Position in it, ascending.
        tag_N: Number of its tag in `tags`; two tags at least.
        tags: Names.
        token_id_N: Vocabulary id.
        margin_N: k-th minus next selection score.
        dropped_N: How many of the token's choices no expert computed; null where nothing was
            dropped.
        loss_N: Of the prediction made at the token; NaN where none was given.
        why: For fields that are null, a better reason than `DATA` has.
    """

    experts: int
    outputs: int
    tokens: int = 0
    top_k: int | None = None
    counts_E: Ints | None = None
    counts_HE: Ints | None = None
    prob_V: Floats | None = None
    gate_E: Floats | None = None
    layer_balance: Answer | None = None
    router_confidence: Answer | None = None
    dropped_tokens: Answer | None = None
    counts_FE: Ints | None = None
    computed_FE: Ints | None = None
    overflowed_FE: Ints | None = None
    prob_FV: Floats | None = None
    tokens_F: Ints | None = None
    step_F: Ints | None = None
    rank_F: Ints | None = None
    capacity_F: Ints | None = None
    sweep: pd.DataFrame | None = None
    sequence_T: Ints | None = None
    chosen_TV: Bools | None = None
    weight_TV: Floats | None = None
    dropped_TV: Bools | None = None
    logits_TV: Floats | None = None
    prob_TV: Floats | None = None
    ids_NK: Ints | None = None
    weights_NK: Floats | None = None
    before_NK: Ints | None = None
    sequence_N: Ints | None = None
    position_N: Ints | None = None
    tag_N: Ints | None = None
    tags: tuple[str, ...] | None = None
    token_id_N: Ints | None = None
    margin_N: Floats | None = None
    dropped_N: Ints | None = None
    loss_N: Floats | None = None
    why: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def draws_RE(self) -> Ints | None:
        """Counts of a uniform router with as many tokens and choices."""
        if self.counts_E is None or self.tokens <= 0:
            return None
        return draws_of(self.tokens, int(self.counts_E.sum()), self.experts)

    @cached_property
    def draws_RFE(self) -> Ints | None:
        """The same of single forwards."""
        if self.counts_FE is None or self.tokens_F is None:
            return None
        return draws_of_forwards(self.tokens_F, self.counts_FE.sum(1), self.experts)

    def reason(self, name: str) -> str:
        """Why the field is null."""
        return self.why.get(name, DATA[name].lacks)
