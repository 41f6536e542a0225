"""One forward of the root module while it runs, and on its way to the writer."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_lens.trace.events import (
    Forward,
    LayerCounts,
    LayerRows,
    SequenceRow,
    TokenRows,
)
from moe_lens.trace.windows import spread
from moe_lens_hooks.batch import Batch, StepContext
from moe_lens_hooks.reduce import Numbers
from moe_lens_hooks.staging import HostCopy


@dataclass
class Seen:
    """One MoE layer in this forward, reduced."""

    layer: int
    stream: str
    tokens: int
    top_k: int | None
    capacity: int | None
    capacity_groups: int
    counts: Numbers
    rows: Numbers
    problems: Numbers


@dataclass
class OpenForward:
    """A forward that is running (`resolve` only after `close`)."""

    step: int
    forward: int
    phase: str
    inputs: dict[str, Any] = field(default_factory=dict)
    """The root module's arguments by name, as far as they have one."""
    implicit: bool = False
    """No root module was entered: MoE blocks ran on their own, or routing was logged by hand."""
    token_ids: Tensor | None = None
    context: StepContext = field(default_factory=StepContext)
    batches: dict[str, Batch] = field(default_factory=dict)
    """By stream."""
    layers: list[Seen] = field(default_factory=list)
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
        self.row_bytes = sum(t.nbytes for x in self.layers for t in x.rows.values())
        self._copy = HostCopy(self._tensors())

    def drop_rows(self) -> None:
        """Give up the per-token rows, all of them, and say how many."""
        self.lost_rows += sum(len(x.rows["expert_ids_NK"]) for x in self.layers if x.rows)
        for x in self.layers:
            x.rows = {}
        for batch in self.batches.values():
            batch.rows_N = None
        self.row_bytes = 0
        self._copy = HostCopy(self._tensors())

    def _tensors(self) -> list[Tensor]:
        parts = [t for x in self.layers for p in (x.counts, x.rows, x.problems) for t in p.values()]
        for b in self.batches.values():
            parts += [b.tokens_G]
            parts += [t for t in (b.padding_T, b.rows_N, self.token_ids) if t is not None]
        return parts

    def resolve(self) -> Forward:
        """Wait for the numbers and put them together (the same object at every call)."""
        with self._lock:
            if self._whole is None:
                assert self._copy is not None
                self._whole = self._assemble(self._copy.arrays())
                self._copy = None
            return self._whole

    def _assemble(self, arrays: list[Any]) -> Forward:
        landed = iter(arrays)

        def take(numbers: Numbers) -> dict[str, Any]:
            return {name: next(landed) for name in numbers}

        tags = sorted({t for b in self.batches.values() for t in b.tags})
        layers = []
        for x in self.layers:
            batch = self.batches[x.stream]
            counts = _layer_counts(x, batch, take(x.counts), take(x.rows), take(x.problems))
            spread(counts, np.array([tags.index(t) for t in batch.tags]), len(tags))
            layers.append(counts)
        whole = Forward(
            step=self.step,
            forward=self.forward,
            phase=self.phase,
            t_start_ns=self.t_start_ns,
            host_ns=self.host_ns,
            tags=tags,
            tokens_G=np.zeros(len(tags), np.int64),
            sequences_G=np.zeros(len(tags), np.int64),
            layers=layers,
            sampled=self.sampled,
            fires_expected=self.expected,
            fires_seen=len(self.layers),
            problems=self.problems,
            lost_rows=self.lost_rows,
        )
        for stream, batch in self.batches.items():
            self._add_batch(whole, stream, batch, landed)
        return whole

    def _add_batch(self, whole: Forward, stream: str, batch: Batch, landed: Any) -> None:
        at = [whole.tags.index(t) for t in batch.tags]
        tokens_G = next(landed)
        padding_T = None if batch.padding_T is None else next(landed)
        rows_N = None if batch.rows_N is None else next(landed)
        ids_T = None if self.token_ids is None else next(landed).reshape(-1)
        whole.tokens_G[at] += tokens_G
        whole.sequences_G[at] += batch.sequences_G
        whole.padding_tokens += batch.size - int(tokens_G.sum())
        for number, tag, said, row in batch.first_seen:
            keys = {k: None if row >= len(v) else str(v[row]) for k, v in self.context.keys.items()}
            request = None if said is None else str(said)
            whole.sequences.append(SequenceRow(number, batch.tags[tag], request, keys))
        if rows_N is None:
            return
        n = len(rows_N)
        whole.tokens.append(
            TokenRows(
                stream=stream,
                token_N=rows_N.astype(np.int32),
                sequence_N=batch.sequence_T[rows_N],
                position_N=batch.position_T[rows_N],
                padding_N=np.zeros(n, bool) if padding_T is None else padding_T[rows_N],
                tag_N=np.array(at, np.int32)[batch.tag_T[rows_N]],
                token_id_N=None
                if ids_T is None or len(ids_T) != batch.size
                else ids_T[rows_N].astype(np.int32),
            )
        )


def _layer_counts(
    x: Seen, batch: Batch, counts: dict[str, Any], rows: dict[str, Any], problems: dict[str, Any]
) -> LayerCounts:
    valid = int(counts["tokens_G"].sum())
    integers = ("tokens_G", "routed_GE", "processed_GE", "padding_GE", "overflowed_GE")
    counts |= {n: counts[n].astype(np.int64, copy=False) for n in integers if n in counts}
    token_rows = None
    if rows:
        assert batch.rows_N is not None
        rows["token_N"] = batch.rows_N.cpu().numpy().astype(np.int32)
        token_rows = LayerRows(**rows)
    return LayerCounts(
        layer=x.layer,
        tokens=valid,
        padding_tokens=x.tokens - valid,
        capacity=x.capacity,
        capacity_groups=x.capacity_groups,
        top_k=x.top_k,
        problems={k: int(v) for k, v in problems.items() if int(v)},
        rows=token_rows,
        **counts,
    )


def recomputing() -> bool:
    """Inside a backward pass: gradient checkpointing runs a forward again, which is no decision.

    `torch.is_grad_enabled` does not tell: reentrant checkpointing's first forward runs without.
    """
    return torch._C._current_graph_task_id() != -1
