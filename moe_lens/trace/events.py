"""What capture hands to the trace writer: one `Forward` per forward of the root module.

Everything is a numpy array on the host, so that hooks (torch), importers and generated traces feed
the same writer. Suffixes: G tags of the forward, E experts, N rows kept, K choices per token,
M runners-up.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Ids = NDArray[np.int32]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(slots=True)
class LayerRows:
    """Per-token rows of one layer in one forward."""

    token_N: Ids
    expert_ids_NK: Ids
    weights_NK: Floats | None
    """Gate weights; None: whoever recorded this had none."""
    chosen_NK: Bools | None = None
    """False: this slot holds no choice (dynamic k). None: all are choices."""
    router_ids_NK: Ids | None = None
    """The router's choices, where the implementation runs other experts."""
    next_ids_NM: Ids | None = None
    next_weights_NM: Floats | None = None
    entropy_N: Floats | None = None
    """NaN where a token has none."""
    group_entropy_N: Floats | None = None
    """Of the sums over groups of experts; NaN where a token has none. None: no groups."""
    margin_N: Floats | None = None
    """NaN where a token has none."""
    dropped_NK: Bools | None = None
    """True: no expert computed this slot."""
    logits_NE: Floats | None = None
    forward_N: Ids | None = None
    """Index into the forward's `parts`; None: it has none."""

    def __len__(self) -> int:
        return len(self.token_N)


@dataclass(slots=True)
class Loads:
    """What experts of a layer computed in single forwards."""

    most: int
    """Choices that one expert computed in one forward, at most."""
    expert: int
    """Which it was."""
    touched: int
    """Experts with any choice, summed over the forwards."""


def loads(load_FE: Ints) -> Loads:
    """Of F forwards; the first of several that are largest."""
    if load_FE.size == 0:
        return Loads(0, 0, 0)
    forward, expert = divmod(int(load_FE.argmax()), load_FE.shape[1])
    return Loads(int(load_FE[forward, expert]), expert, int(np.count_nonzero(load_FE)))


@dataclass(slots=True)
class LayerCounts:
    """One MoE layer in one forward. Counts by (tag, expert) are of valid tokens only.

    `routed` is what the router chose and `processed` what the experts were given to compute: two
    observations, which the writer compares.
    """

    layer: int
    tokens: int
    padding_tokens: int
    tokens_G: Ints
    routed_GE: Ints
    processed_GE: Ints
    weight_sum_GE: Doubles | None
    padding_GE: Ints | None = None
    overflowed_GE: Ints | None = None
    """None: the layer has no capacity, nothing can overflow."""
    dropped_GE: Ints | None = None
    rerouted_in_GE: Ints | None = None
    unserved_G: Ints | None = None
    nonfinite_G: Ints | None = None
    prob_sum_GE: Doubles | None = None
    entropy_sum_G: Doubles | None = None
    margin_sum_G: Doubles | None = None
    top1_prob_sum_G: Doubles | None = None
    zloss_sum_G: Doubles | None = None
    group_entropy_sum_G: Doubles | None = None
    """Of the sums over groups of experts; None: no groups."""
    received_GE: Ints | None = None
    capacity: int | None = None
    """Choices one expert takes in one capacity group; None: dropless."""
    capacity_groups: int = 1
    """Capacity groups in this forward (sequences, where each has its own)."""
    dispatch_ns: int | None = None
    """In its dispatch all-to-alls; None: not seen."""
    combine_ns: int | None = None
    top_k: int | None = None
    """Choices per token that must add up; None: dynamic."""
    choices: int | None = None
    """Dynamic k: choices of all tokens, padding included, counted independently of the ids."""
    faithful: bool = True
    """False: the implementation runs other experts than its router chooses (meta: faithful)."""
    expert_choice: bool = False
    problems: dict[str, int] = field(default_factory=dict)
    """What capture itself found wrong, and for how many values."""
    notes: dict[str, int] = field(default_factory=dict)
    """What the library is known to do, and for how many tokens: warnings, not breaches."""
    loads: Loads | None = None
    """Of the forward's `parts`, one by one; None: it has none."""
    rows: LayerRows | None = None


@dataclass(slots=True)
class TokenRows:
    """The tokens behind the per-token rows of one stream."""

    stream: str
    token_N: Ids
    sequence_N: Ints
    position_N: Ids
    padding_N: Bools
    tag_N: Ids
    """Index into the forward's tags."""
    token_id_N: Ids | None = None
    forward_N: Ids | None = None
    """Index into the forward's `parts`; None: it has none."""


@dataclass(slots=True)
class SequenceRow:
    """A sequence of which per-token rows are kept, the first time it is seen."""

    sequence: int
    tag: str
    request: str | None = None
    parent: int | None = None
    """The sequence it forked from."""
    keys: dict[str, str | None] = field(default_factory=dict)


@dataclass(slots=True)
class Forward:
    """One forward of the root module, with everything that was seen in it.

    Or several, laid side by side because each costs more than its few tokens: then `parts` are
    they, and the rest is of all of them.
    """

    step: int
    forward: int
    phase: str
    t_start_ns: int | None
    """None: not known."""
    tags: list[str]
    tokens_G: Ints
    sequences_G: Ints
    padding_tokens: int = 0
    host_ns: int | None = 0
    device_ns: int | None = None
    layers: list[LayerCounts] = field(default_factory=list)
    tokens: list[TokenRows] = field(default_factory=list)
    sequences: list[SequenceRow] = field(default_factory=list)
    sampled: bool = False
    fires_expected: int = 0
    fires_seen: int = 0
    problems: dict[str, int] = field(default_factory=dict)
    lost_rows: int = 0
    parts: list[Forward] = field(default_factory=list)
    """Small forwards in order, one window's (`windows.stands_alone` of none), each with all but
    tags, layers and tokens; counts are their sums, and rows theirs in this order. `step` and
    `forward` are the first one's. Empty: this is one forward."""
    _row_bytes: int | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes that the per-token rows hold in memory; looked at when all of them are there."""
        if self._row_bytes is None:
            self._row_bytes = self._rows_held()
        return self._row_bytes

    def _rows_held(self) -> int:
        parts: list[Any] = [x.rows for x in self.layers if x.rows is not None] + list(self.tokens)
        total = 0
        for part in parts:  # a plain loop: of small forwards this is a good part of the cost
            for name in part.__slots__:
                total += getattr(getattr(part, name), "nbytes", 0)
        return total

    def drop_rows(self) -> None:
        """Give up the per-token rows, all of them, and say how many.

        Sequences stay: each is handed over once, with the first of its forwards.
        """
        for x in self.layers:
            if x.rows is None:
                continue
            self.lost_rows += len(x.rows)
            if x.rows.forward_N is not None:
                lost_F = np.bincount(x.rows.forward_N, minlength=len(self.parts)).tolist()
                for part, n in zip(self.parts, lost_F, strict=True):
                    part.lost_rows += n
        self.forget_rows()

    def forget_rows(self) -> None:
        """Let go of the memory of the per-token rows."""
        for layer in self.layers:
            layer.rows = None
        self.tokens = []
        self._row_bytes = 0

    def resolve(self) -> Forward:
        return self


@dataclass(slots=True)
class Losses:
    """Losses of the last forward, given after it."""

    step: int
    forward: int
    tags: list[str]
    loss_sum_G: Doubles
    loss_tokens_G: Ints
    sequence_N: Ints
    position_N: Ids | None
    """None: one loss for each whole sequence."""
    loss_N: Floats

    def resolve(self) -> Losses:
        return self


@dataclass(slots=True)
class Outcomes:
    """What became of tokens that earlier forwards routed; see the table `outcomes`."""

    step_N: Ints
    forward_N: Ids
    sequence_N: Ints
    position_N: Ids
    kept: bool

    def resolve(self) -> Outcomes:
        return self


@dataclass(slots=True)
class StepEnd:
    """The user's step is over: a window of training closes with it."""

    step: int

    def resolve(self) -> StepEnd:
        return self


Event = Forward | Losses | Outcomes | StepEnd


class Staged(Protocol):
    """An event whose numbers may still be on their way from a device."""

    def resolve(self) -> Event:
        """Wait for the numbers; called on the writer's thread."""
        ...


@runtime_checkable
class StagedForward(Protocol):
    """A forward on its way: its rows can be given up before they arrive."""

    lost_rows: int

    @property
    def row_bytes(self) -> int: ...
    def drop_rows(self) -> None: ...
    def resolve(self) -> Forward: ...
