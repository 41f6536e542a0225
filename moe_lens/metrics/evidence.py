"""What is known of one layer in one phase: the arrays that the catalogue's metrics are made of.

A metric's function names what it reads as its parameters; each is a field or property of
`Evidence`, and `DATA` says which data it comes from. `moe_lens.queries.evidence` fills them in.

Legend: E experts, Z zero-compute experts, V = E + Z outputs of the router, F forwards, T tokens
(some, with rows), N tokens of whole sequences, one after another, K choices of a token, R draws,
G tags, B octaves of positions,
P capacity factors, M how many tokens chose a set of experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moe_lens.metrics.by_tag import moved_tags, tally
from moe_lens.metrics.by_token import OfIds, given_ids, moved_positions, octave, of_ids
from moe_lens.metrics.chance import Floats, Ints, draws_of, draws_of_forwards
from moe_lens.metrics.moves import Moves, Prefetched, moves, prefetched
from moe_lens.metrics.pairs import Pairs
from moe_lens.metrics.sequences import Sequences
from moe_lens.metrics.subsets import chosen_sets, reachable, set_draws

if TYPE_CHECKING:
    from moe_lens.metrics.bias import Ranking

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
    "top_k": Data("C", "no fixed number of choices per token"),
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
    "ranked": Data("I", "no gate weights, which would tell a token's first choice"),
    "before_NK": Data("I", "no layer before it in its stream"),
    "sequence_N": Data("I", "no per-token rows"),
    "position_N": Data("I", "no per-token rows"),
    "tag_N": Data("I", "fewer than two tags"),
    "tags": Data("I", "fewer than two tags"),
    "token_id_N": Data("I", "no token ids: record with token_ids=True"),
    "margin_N": Data("I", "no margins of single tokens"),
    "dropped_N": Data("I", "no dropped choice in the kept rows"),
    "loss_N": Data("I", "no losses of single tokens: give them to rec.loss"),
    "counts_GE": Data("C", "fewer than two tags"),
    "tokens_G": Data("C", "fewer than two tags"),
    "draws_RGE": Data("C", "fewer than two tags"),
    "tagged_GE": Data("I", "fewer than two tags"),
    "moved_RGE": Data("I", "fewer than two tags"),
    "placed_BE": Data("I", "no per-token rows"),
    "turned_RBE": Data("I", "no per-token rows"),
    "of_ids": Data("I", "no token ids: record with token_ids=True"),
    "ranked_ids": Data("I", "no token ids: record with token_ids=True"),
    "given_ids_R": Data("I", "no token ids: record with token_ids=True"),
    "ranking": Data("C", "no known selection bias"),
    "moves": Data("I", "no layer before it in its stream"),
    "prefetched": Data("I", "no layer before it in its stream"),
    "group_limit": Data("C", "no configuration of the router"),
    "widths": Data("C", "no widths of the model and of an expert"),
    "reachable_sets": Data("C", "no fixed number of choices per token"),
    "sets_M": Data("I", "no per-token rows"),
    "set_draws_RM": Data("I", "no tokens that all made k choices"),
    "pairs": Data("I", "no per-token rows"),
    "sequences": Data("I", "no per-token rows"),
    "ranked_sequences": Data("I", "no per-token rows"),
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
        ranked: Whether the first choice stands first; null where nothing tells which it is.
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
        counts_GE: Choices of each expert by all tokens of a tag; two tags at least.
        tokens_G: Tokens of each.
        ranking: How a router with a selection bias would choose without it.
        group_limit: Groups of experts, and how many of them a token may use; 1 of 1: no limit.
        widths: Hidden size of the model, and intermediate size of an expert.
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
    ranked: bool | None = True
    before_NK: Ints | None = None
    sequence_N: Ints | None = None
    position_N: Ints | None = None
    tag_N: Ints | None = None
    tags: tuple[str, ...] | None = None
    token_id_N: Ints | None = None
    margin_N: Floats | None = None
    dropped_N: Ints | None = None
    loss_N: Floats | None = None
    counts_GE: Ints | None = None
    tokens_G: Ints | None = None
    ranking: Ranking | None = None
    group_limit: tuple[int, int] | None = None
    widths: tuple[int, int] | None = None
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

    @cached_property
    def moves(self) -> Moves | None:
        """Where tokens of each expert of the layer before go, as they are and shuffled."""
        if self.before_NK is None or self.ids_NK is None or self.ranked is None:
            return None
        return moves(self.before_NK, self.ids_NK)

    @cached_property
    def prefetched(self) -> Prefetched | None:
        """What k prefetched experts are worth."""
        if self.before_NK is None or self.ids_NK is None or self.sequence_N is None:
            return None
        if self.top_k is None:
            return None
        return prefetched(self.before_NK, self.ids_NK, self.sequence_N, self.experts, self.top_k)

    @cached_property
    def reachable_sets(self) -> int | None:
        """How many sets of k experts the router can choose."""
        if self.top_k is None or self.group_limit is None:
            return None
        return reachable(self.experts, self.top_k, *self.group_limit) or None

    @cached_property
    def sets_M(self) -> Ints | None:
        """How many different sets of experts were chosen by m tokens of `ids_NK`."""
        return None if self.ids_NK is None else chosen_sets(self.ids_NK)

    @cached_property
    def pairs(self) -> Pairs | None:
        """Experts that one token of `ids_NK` chose together."""
        return None if self.ids_NK is None else Pairs(self.ids_NK, self.experts)

    @cached_property
    def sequences(self) -> Sequences | None:
        """The tokens of `ids_NK` along their sequences."""
        ids_NK, sequence_N, position_N = self.ids_NK, self.sequence_N, self.position_N
        if ids_NK is None or sequence_N is None or position_N is None:
            return None
        return Sequences(ids_NK, sequence_N, position_N, self.experts)

    @property
    def ranked_sequences(self) -> Sequences | None:
        """The same where it is known which choice is a token's first."""
        return None if self.ranked is None else self.sequences

    @cached_property
    def set_draws_RM(self) -> Ints | None:
        """The same of a router to which all sets that it can reach are alike."""
        ids_NK, sets = self.ids_NK, self.reachable_sets
        if ids_NK is None or not sets or ((ids_NK >= 0).sum(1) != self.top_k).any():
            return None
        return set_draws(len(ids_NK), sets)

    @cached_property
    def draws_RGE(self) -> Ints | None:
        """The same by tag."""
        if self.counts_GE is None or self.tokens_G is None:
            return None
        return draws_of_forwards(self.tokens_G, self.counts_GE.sum(1), self.experts)

    @cached_property
    def tagged_GE(self) -> Ints | None:
        """Choices of each expert by the N tokens, by tag."""
        if self.ids_NK is None or self.tag_N is None or self.tags is None:
            return None
        return tally(self.tag_N, self.ids_NK, len(self.tags), self.experts)

    @cached_property
    def moved_RGE(self) -> Floats | None:
        """The same with the tags permuted over the sequences."""
        if self.ids_NK is None or self.tag_N is None or self.tags is None:
            return None
        if self.sequence_N is None:
            return None
        return moved_tags(self.ids_NK, self.tag_N, self.sequence_N, len(self.tags), self.experts)

    @cached_property
    def placed_BE(self) -> Ints | None:
        """Choices of each expert by the N tokens, by octave of their position."""
        if self.ids_NK is None or self.position_N is None:
            return None
        octave_N = octave(self.position_N)
        return tally(octave_N, self.ids_NK, int(octave_N.max(initial=-1)) + 1, self.experts)

    @cached_property
    def turned_RBE(self) -> Ints | None:
        """The same with each sequence's choices turned by a random stretch."""
        if self.ids_NK is None or self.position_N is None or self.sequence_N is None:
            return None
        return moved_positions(self.ids_NK, self.position_N, self.sequence_N, self.experts)

    @cached_property
    def of_ids(self) -> OfIds | None:
        """What token ids say about experts, as they are and moved."""
        if self.ids_NK is None or self.token_id_N is None or self.sequence_N is None:
            return None
        return of_ids(self.ids_NK, self.token_id_N, self.sequence_N, self.experts)

    @property
    def ranked_ids(self) -> OfIds | None:
        """The same where it is known which choice is a token's first."""
        return None if self.ranked is None else self.of_ids

    @cached_property
    def given_ids_R(self) -> Floats | None:
        """What a tag says about experts beyond the id, as it is (0) and with the tags permuted."""
        if self.ids_NK is None or self.token_id_N is None or self.sequence_N is None:
            return None
        if self.tag_N is None or self.tags is None:
            return None
        return given_ids(
            self.ids_NK, self.token_id_N, self.sequence_N, self.tag_N, len(self.tags), self.experts
        )

    def reason(self, name: str) -> str:
        """Why the field is null."""
        return self.why.get(name, DATA[name].lacks)
