"""One forward of the root module while it runs, and on its way to the writer."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moe_lens.trace.events import Forward, Ints, LayerCounts, LayerRows, TokenRows
from moe_lens.trace.meta import LayerInfo
from moe_lens.trace.windows import spread
from moe_lens_hooks.adapter import Observed
from moe_lens_hooks.batch import Batch, Landed
from moe_lens_hooks.exchange import Times
from moe_lens_hooks.following import Going
from moe_lens_hooks.lineage import Line, Rows
from moe_lens_hooks.reduce import Reduced, distinct_router_ids
from moe_lens_hooks.said import StepContext
from moe_lens_hooks.semantics import Semantics
from moe_lens_hooks.staging import HostCopy

_RESTARTS = (
    "positions start again inside a row: its sequences are packed, and were recorded as one. Say "
    "which they are: rec.step(sequences=...), or give the model their cumulative lengths"
)
_MISSED = (
    "a CUDA graph was replayed, but not by torch.cuda.CUDAGraph.replay: what it routed is lost"
)


@dataclass
class Replay:
    """Which replay of a captured CUDA graph a forward is.

    Attributes:
        number: From 1, of those that Python saw.
        counter: How many the device has counted.
        missed: One list for all replays of the graph: how many nobody saw before.
    """

    number: int
    counter: Tensor
    missed: list[int]

    def unseen(self, counted: int) -> int:
        """Replays that nobody saw since the one before, given the counter on the host."""
        unseen = counted - self.number - sum(self.missed)
        self.missed.append(unseen)
        return unseen


Key = tuple[Any, int]
"""What a layer is known by: its block (or its name in `rec.log`), and which call of it in a
forward, since blocks may be shared."""


@dataclass(slots=True)
class Block:
    """One MoE layer that ran in this forward.

    Its tensors are the model's own, held until the forward is over: whatever can be done for all
    layers at once then costs a fraction of what it costs between two layers of a model, which have
    the processor's caches to themselves.
    """

    key: Key
    info: LayerInfo
    router: nn.Module | None
    shape: tuple[int, int] | None
    """(B, S) of the block's input `[B, S, D]`; None for `[T, D]`."""
    seen: Observed
    times: Times | None = None
    """Of its all-to-alls; None: none was seen."""


@dataclass
class Pending:
    """One MoE layer that was taken and is not reduced yet."""

    info: LayerInfo
    observed: Observed
    meaning: Semantics | None
    times: Times | None

    @property
    def groups(self) -> int | None:
        """Groups that have an entropy; None: there are none, or zero experts stand in none."""
        several = (self.info.groups or 1) > 1 and not self.info.zero_experts
        return self.info.groups if several else None

    @property
    def kind(self) -> tuple[Any, ...]:
        """What layers must have in common to be reduced together."""
        x, m = self.observed, self.meaning
        assert x.expert_ids_TK is not None
        assert x.weights_TK is not None
        meaning = None if m is None else (m.score, m.selection, m.proportional)
        return (
            *(self.info.stream, self.info.experts + self.info.zero_experts, meaning),
            self.groups,
            *(x.expert_ids_TK.shape, x.expert_ids_TK.dtype, x.weights_TK.dtype),
            *(None if x.logits_TE is None else (x.logits_TE.shape, x.logits_TE.dtype),),
            *(x.kept_TK is None, x.chosen_TK is None, x.present_T is None, x.choices is None),
            x.received_E is None,
            *(distinct_router_ids(x), self.info.faithful, x.expert_ids_TK.device),
        )


@dataclass
class Seen:
    """Layers of this forward that were reduced together."""

    stream: str
    tokens: int
    layers: list[tuple[LayerInfo, int | None, int, Times | None]]
    """Each with its capacity, capacity groups and the times of its all-to-alls."""
    reduced: Reduced


@dataclass
class OpenForward:
    """A forward that is running (`resolve` only after `close`)."""

    step: int
    forward: int
    phase: str
    going: Going = field(default_factory=Going)
    """How it goes on from the forwards before."""
    rows: Rows | None = None
    """The sequences of its rows; None where they are packed, or nothing was routed."""
    lines: list[Line] | None = None
    """The same, as its other streams know them."""
    returned: Any = None
    """What the root module returned, until `close`."""
    inputs: dict[str, Any] = field(default_factory=dict)
    """The root module's arguments by name, as far as they have one."""
    implicit: bool = False
    """No root module was entered: MoE blocks ran on their own, or routing was logged by hand."""
    counts_tokens: bool = True
    """False on a later stage of a pipeline: the first counted the same tokens."""
    token_ids: dict[str, Tensor] = field(default_factory=dict)
    """Vocabulary ids `[T]` by stream, if they are kept."""
    context: StepContext = field(default_factory=StepContext)
    batches: dict[str, Batch] = field(default_factory=dict)
    """By stream."""
    blocks: list[Block] = field(default_factory=list)
    """That ran and are not taken yet."""
    held_bytes: int = 0
    """Of routing tensors in them."""
    layers: list[Seen] = field(default_factory=list)
    thread: int = field(default_factory=threading.get_ident)
    seen: int = 0
    """MoE layers whose routing was seen."""
    entered: dict[int, int] = field(default_factory=dict)
    """How often each block (by id) was entered so far."""
    expected: int = 0
    problems: dict[str, int] = field(default_factory=dict)
    sampled: bool = False
    lost_rows: int = 0
    t_start_ns: int = field(default_factory=time.time_ns)
    _t0: int = field(default_factory=time.perf_counter_ns)
    host_ns: int = 0
    row_bytes: int = 0
    replay: Replay | None = None
    """Of a CUDA graph, where this forward is one."""
    _copy: HostCopy | None = None
    _whole: Forward | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, block: Block) -> None:
        """A block has returned."""
        self.blocks.append(block)
        self.held_bytes += block.seen.nbytes

    def problem(self, text: str, n: int = 1) -> None:
        self.problems[text] = self.problems.get(text, 0) + n

    def close(self) -> None:
        """The forward is over: start the copies to the host."""
        self.host_ns = time.perf_counter_ns() - self._t0
        # the caller's tensors, cache and graph are not ours to keep
        self.inputs, self.returned, self.rows = {}, None, None
        self.going = Going()
        # the caller may refill its buffers
        self.token_ids = {stream: ids.clone() for stream, ids in self.token_ids.items()}
        self.row_bytes = sum(t.nbytes for x in self.layers for t in x.reduced.rows.values())
        self._copy = HostCopy(self._tensors())

    def drop_rows(self) -> None:
        """Give up the per-token rows, all of them, and say how many."""
        shapes = [x.reduced.rows["expert_ids_NK"].shape for x in self.layers if x.reduced.rows]
        self.lost_rows += sum(layers * rows for layers, rows, _ in shapes)
        for x in self.layers:
            x.reduced.rows = {}
        for batch in self.batches.values():
            batch.drop_rows()
        self.row_bytes = 0
        assert self._copy is not None
        self._copy.keep(self._tensors())

    def _tensors(self) -> list[Tensor]:
        parts: list[Tensor] = []
        for b in self.batches.values():
            parts += b.tensors()
        parts += self.token_ids.values()
        for r in (x.reduced for x in self.layers):
            named = (r.counts, r.rows, r.problems, r.notes)
            parts += [t for numbers in named for t in numbers.values()]
        if self.replay is not None:
            parts.append(self.replay.counter)
        return parts

    @property
    def landed(self) -> Forward | None:
        """The whole forward, once somebody has waited for its numbers."""
        return self._whole

    def resolve(self) -> Forward:
        """Wait for the numbers and put them together (the same object at every call)."""
        with self._lock:
            if self._whole is None:
                assert self._copy is not None
                self._whole = self._assemble(self._copy.arrays())
                self._copy, self.layers, self.token_ids = None, [], {}
            return self._whole

    def _assemble(self, arrays: list[NDArray[Any]]) -> Forward:
        """Put the arrays, in the order of `_tensors`, together."""
        landed = iter(arrays)
        tags = sorted({t for b in self.batches.values() for t in b.tags})
        whole = Forward(
            step=self.step,
            forward=self.forward,
            phase=self.phase,
            t_start_ns=self.t_start_ns,
            host_ns=self.host_ns,
            tags=tags,
            tokens_G=np.zeros(len(tags), np.int64),
            sequences_G=np.zeros(len(tags), np.int64),
            sampled=self.sampled,
            fires_expected=self.expected,
            fires_seen=self.seen,
            problems=self.problems,
            lost_rows=self.lost_rows,
        )
        on_host = {stream: b.land(landed) for stream, b in self.batches.items()}
        ids = {stream: next(landed) for stream in self.token_ids}
        for stream, batch in on_host.items():
            self._add_batch(whole, stream, self.batches[stream], batch, ids.get(stream))
        for x in self.layers:
            r = x.reduced
            numbers = (r.counts, r.rows, r.problems, r.notes)
            named = [{name: next(landed) for name in part} for part in numbers]
            at_G = np.array([tags.index(t) for t in self.batches[x.stream].tags])
            batch = on_host[x.stream]
            for counts in _layer_counts(x, batch.tokens_G, batch.token_N, *named):
                spread(counts, at_G, len(tags))
                whole.layers.append(counts)
        if self.replay is not None and (missed := self.replay.unseen(int(next(landed)))):
            self.problem(_MISSED, missed)
        restarts = sum(b.restarts for b in on_host.values())
        if restarts and whole.layers:
            whole.layers[0].notes[_RESTARTS] = restarts
        return whole

    def _add_batch(
        self,
        whole: Forward,
        stream: str,
        batch: Batch,
        landed: Landed,
        ids_T: NDArray[Any] | None,
    ) -> None:
        """Add a stream's tokens and sequences."""
        at = np.array([whole.tags.index(t) for t in batch.tags], np.int32)
        if self.counts_tokens:
            whole.tokens_G[at] += landed.tokens_G
            whole.sequences_G[at] += landed.sequences_G
            whole.padding_tokens += batch.size - int(landed.tokens_G.sum())
        whole.sequences += landed.begin
        token_N, padding_T = landed.token_N, landed.padding_T
        if token_N is None or landed.position_N is None:
            return
        known = ids_T is not None and len(ids_T) == batch.size
        rows = TokenRows(
            stream=stream,
            token_N=token_N.astype(np.int32),
            sequence_N=landed.sequence_T[token_N],
            position_N=landed.position_N.astype(np.int32),
            padding_N=np.zeros(len(token_N), bool) if padding_T is None else padding_T[token_N],
            tag_N=at[landed.tag_T[token_N]],
            token_id_N=ids_T[token_N].astype(np.int32) if known and ids_T is not None else None,
        )
        whole.tokens.append(rows)


def _layer_counts(
    x: Seen,
    tokens_G: Ints,
    rows_N: NDArray[np.int64] | None,
    counts: dict[str, Any],
    rows: dict[str, Any],
    problems: dict[str, Any],
    notes: dict[str, Any],
) -> Iterator[LayerCounts]:
    """The layers that were reduced together, one by one."""
    routed = counts.pop("all_tokens", np.full(len(x.layers), x.tokens))
    chosen = counts.pop("choices", None)
    own_tokens = counts.pop("tokens_G", None)
    for i, (info, capacity, groups, times) in enumerate(x.layers):
        dispatch_ns, combine_ns = (None, None) if times is None else times.read()
        token_rows = None
        if rows:
            assert rows_N is not None
            token_rows = _rows(rows_N, {name: values[i] for name, values in rows.items()})
        layer_G = tokens_G if own_tokens is None else own_tokens[i]
        valid = int(layer_G.sum())
        yield LayerCounts(
            layer=info.layer,
            tokens=valid,
            padding_tokens=int(routed[i]) - valid,
            tokens_G=layer_G,
            capacity=capacity,
            capacity_groups=groups,
            dispatch_ns=dispatch_ns,
            combine_ns=combine_ns,
            top_k=info.top_k,
            choices=None if chosen is None else int(chosen[i]),
            faithful=info.faithful,
            problems={name: int(n[i]) for name, n in problems.items() if n[i]},
            notes={name: int(n[i]) for name, n in notes.items() if n[i]},
            rows=token_rows,
            **{name: values[i] for name, values in counts.items()},
        )


def _rows(rows_N: NDArray[np.int64], parts: dict[str, Any]) -> LayerRows:
    """The rows of one layer, without tokens that it did not see."""
    token_N = rows_N.astype(np.int32)
    if "present_N" in parts:
        here_N = parts.pop("present_N")
        token_N, parts = token_N[here_N], {name: x[here_N] for name, x in parts.items()}
    return LayerRows(token_N=token_N, **parts)


def recomputing() -> bool:
    """Inside a backward pass: gradient checkpointing runs a forward again, which is no decision.

    `torch.is_grad_enabled` does not tell: reentrant checkpointing's first forward runs without.
    """
    return torch._C._current_graph_task_id() != -1
