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
from torch import Tensor

from moe_lens.trace.events import Forward, Ints, LayerCounts, LayerRows, SequenceRow, TokenRows
from moe_lens.trace.meta import LayerInfo
from moe_lens.trace.windows import spread
from moe_lens_hooks.adapter import Observed
from moe_lens_hooks.batch import Batch, StepContext
from moe_lens_hooks.reduce import Reduced, distinct_router_ids
from moe_lens_hooks.semantics import Semantics
from moe_lens_hooks.staging import HostCopy


@dataclass
class Pending:
    """One MoE layer that was seen in this forward and is not reduced yet.

    Its tensors are the model's own, held until then.
    """

    info: LayerInfo
    observed: Observed
    meaning: Semantics | None

    @property
    def nbytes(self) -> int:
        x = self.observed
        return sum(t.nbytes for t in (x.expert_ids_TK, x.weights_TK, x.logits_TE) if t is not None)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What layers must have in common to be reduced together."""
        x, m = self.observed, self.meaning
        assert x.expert_ids_TK is not None
        assert x.weights_TK is not None
        meaning = None if m is None else (m.score, m.selection, m.proportional)
        return (
            *(self.info.stream, self.info.experts + self.info.zero_experts, meaning),
            *(x.expert_ids_TK.shape, x.expert_ids_TK.dtype, x.weights_TK.dtype),
            *(None if x.logits_TE is None else (x.logits_TE.shape, x.logits_TE.dtype),),
            *(x.kept_TK is None, x.chosen_TK is None, x.present_T is None, x.choices is None),
            *(distinct_router_ids(x), self.info.faithful, x.expert_ids_TK.device),
        )


@dataclass
class Seen:
    """Layers of this forward that were reduced together."""

    stream: str
    tokens: int
    layers: list[tuple[LayerInfo, int | None, int]]
    """Each with its capacity and capacity groups."""
    reduced: Reduced


@dataclass
class OpenForward:
    """A forward that is running (`resolve` only after `close`)."""

    step: int
    forward: int
    phase: str
    past: int = 0
    """Positions in the cache when the forward began (its layers add to it as they run)."""
    inputs: dict[str, Any] = field(default_factory=dict)
    """The root module's arguments by name, as far as they have one."""
    implicit: bool = False
    """No root module was entered: MoE blocks ran on their own, or routing was logged by hand."""
    counts_tokens: bool = True
    """False on a later stage of a pipeline: the first counted the same tokens."""
    token_ids: Tensor | None = None
    context: StepContext = field(default_factory=StepContext)
    batches: dict[str, Batch] = field(default_factory=dict)
    """By stream."""
    pending: list[Pending] = field(default_factory=list)
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
    _copy: HostCopy | None = None
    _whole: Forward | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def problem(self, text: str, n: int = 1) -> None:
        self.problems[text] = self.problems.get(text, 0) + n

    def close(self) -> None:
        """The forward is over: start the copies to the host."""
        self.host_ns = time.perf_counter_ns() - self._t0
        self.inputs = {}  # the caller's tensors, cache and graph are not ours to keep
        if self.token_ids is not None:
            self.token_ids = self.token_ids.clone()  # the caller may refill its buffer
        self.row_bytes = sum(t.nbytes for x in self.layers for t in x.reduced.rows.values())
        self._copy = HostCopy(self._tensors())

    def drop_rows(self) -> None:
        """Give up the per-token rows, all of them, and say how many."""
        shapes = [x.reduced.rows["expert_ids_NK"].shape for x in self.layers if x.reduced.rows]
        self.lost_rows += sum(layers * rows for layers, rows, _ in shapes)
        for x in self.layers:
            x.reduced.rows = {}
        for batch in self.batches.values():
            batch.rows_N = batch.position_N = None
        self.row_bytes = 0
        self._copy = HostCopy(self._tensors())

    def _tensors(self) -> list[Tensor]:
        parts: list[Tensor] = []
        for b in self.batches.values():
            parts += [b.tokens_G]
            kept = (b.padding_T, b.rows_N, b.position_N, self.token_ids)
            parts += [t for t in kept if t is not None]
        for r in (x.reduced for x in self.layers):
            named = (r.counts, r.rows, r.problems, r.notes)
            parts += [t for numbers in named for t in numbers.values()]
        return parts

    def resolve(self) -> Forward:
        """Wait for the numbers and put them together (the same object at every call)."""
        with self._lock:
            if self._whole is None:
                assert self._copy is not None
                self._whole = self._assemble(self._copy.arrays())
                self._copy, self.layers, self.token_ids = None, [], None
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
        of_batch = {s: self._add_batch(whole, s, b, landed) for s, b in self.batches.items()}
        for x in self.layers:
            r = x.reduced
            numbers = (r.counts, r.rows, r.problems, r.notes)
            named = [{name: next(landed) for name in part} for part in numbers]
            at_G = np.array([tags.index(t) for t in self.batches[x.stream].tags])
            for counts in _layer_counts(x, *of_batch[x.stream], *named):
                spread(counts, at_G, len(tags))
                whole.layers.append(counts)
        return whole

    def _add_batch(
        self, whole: Forward, stream: str, batch: Batch, landed: Iterator[NDArray[Any]]
    ) -> tuple[Ints, NDArray[np.int64] | None]:
        """Add a stream's tokens and sequences; its valid tokens by tag, and its sampled tokens."""
        at = [whole.tags.index(t) for t in batch.tags]
        tokens_G = next(landed)
        padding_T = None if batch.padding_T is None else next(landed)
        rows_N = None if batch.rows_N is None else next(landed)
        position_N = None if batch.position_N is None else next(landed)
        ids_T = None if self.token_ids is None else next(landed).reshape(-1)
        if self.counts_tokens:
            whole.tokens_G[at] += tokens_G
            whole.sequences_G[at] += batch.sequences_G
            whole.padding_tokens += batch.size - int(tokens_G.sum())
        for number, tag, said, row in batch.first_seen:
            keys = {k: None if row >= len(v) else str(v[row]) for k, v in self.context.keys.items()}
            request = None if said is None else str(said)
            whole.sequences.append(SequenceRow(number, batch.tags[tag], request, keys))
        if rows_N is not None and position_N is not None:
            known = ids_T is not None and len(ids_T) == batch.size
            rows = TokenRows(
                stream=stream,
                token_N=rows_N.astype(np.int32),
                sequence_N=batch.sequence_T[rows_N],
                position_N=position_N.astype(np.int32),
                padding_N=np.zeros(len(rows_N), bool) if padding_T is None else padding_T[rows_N],
                tag_N=np.array(at, np.int32)[batch.tag_T[rows_N]],
                token_id_N=ids_T[rows_N].astype(np.int32) if known and ids_T is not None else None,
            )
            whole.tokens.append(rows)
        return tokens_G, rows_N


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
    for i, (info, capacity, groups) in enumerate(x.layers):
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
