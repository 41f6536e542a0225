"""Writing a synthetic run, or counting it without writing.

F forwards, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe_lens.errors import TraceError, TraceWriteError
from moe_lens.trace.events import Event, Forward, StepEnd
from moe_lens.trace.lock import RankLock
from moe_lens.trace.meta import Attempt, LayerInfo, Meta
from moe_lens.trace.synthetic.forwards import count, forward, losses
from moe_lens.trace.synthetic.router import Routers
from moe_lens.trace.synthetic.schedule import START_NS, Batch, Moment, Sequences, moments
from moe_lens.trace.synthetic.spec import Spec
from moe_lens.trace.synthetic.truth import Truth
from moe_lens.trace.writer import TraceWriter

WAITING_BYTES = 64 << 20
"""Per-token rows handed to the writer before it is waited for."""


def generate(run: Path | str, spec: Spec) -> Truth:
    """Write a trace as a recorder would, rank after rank.

    Args:
        run: A folder that does not exist, or is empty.
        spec: What is in it. The same spec gives the same routing, bit for bit.

    Returns:
        What was planted, and the counts.

    Raises:
        TraceError: The folder holds something.
        TraceWriteError: The disk refuses.
    """
    run = Path(run)
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise TraceError(f"{run} is not an empty folder; write a synthetic trace into a new one.")
    when = moments(spec)
    counts_FLE = np.zeros((len(when), spec.layers, spec.experts), np.int64)
    for rank in range(spec.ranks):
        try:
            lock = RankLock(run, rank)
            try:
                counts_FLE += _write(run, spec, rank, when[-1])
            finally:
                lock.release()
        except OSError as e:
            raise TraceWriteError(f"cannot write the trace {run}: {e}") from e
    return Truth(spec, tuple(when), counts_FLE)


def counts(spec: Spec, *, rank: int | None = None) -> NDArray[np.int64]:
    """`[F, L, E]`: choices of each expert, forward by forward, as `generate` would write them.

    Args:
        spec: As for `generate`.
        rank: Of this rank's tokens alone; None: of all ranks together.

    Raises:
        ValueError: There is no such rank.
    """
    routers, when = Routers(spec), moments(spec)
    out_FLE = np.zeros((len(when), spec.layers, spec.experts), np.int64)
    for r in range(spec.ranks) if rank is None else (_known(spec, rank),):
        for moment, batch in _with_batches(spec, when, r):
            out_FLE[moment.index] += count(routers, batch, moment, r)
    return out_FLE


def events(spec: Spec, *, rank: int = 0) -> Iterator[Event]:
    """What capture would hand to the writer for one rank, in order: for writers under test.

    Raises:
        ValueError: There is no such rank.
    """
    _known(spec, rank)
    step, routers = 0, Routers(spec)
    for moment, batch in _with_batches(spec, moments(spec), rank):
        if moment.step != step:
            yield StepEnd(step)
            step = moment.step
        yield forward(routers, batch, moment, rank)
        if spec.losses and moment.phase in ("train", "eval"):
            yield losses(spec, batch, moment)


def _known(spec: Spec, rank: int) -> int:
    if not 0 <= rank < spec.ranks:
        raise ValueError(f"rank is from 0 to {spec.ranks - 1}, got {rank}.")
    return rank


def _with_batches(spec: Spec, when: list[Moment], rank: int) -> Iterator[tuple[Moment, Batch]]:
    """The forwards, each with its sequences, which are drawn once for all of theirs."""
    sequences = Sequences(spec)
    batch: Batch | None = None
    for moment in when:
        if batch is None or batch.number != moment.batch:
            batch = sequences.batch(rank, moment.batch)
        yield moment, batch


def _write(run: Path, spec: Spec, rank: int, last: Moment) -> NDArray[np.int64]:
    """Write a rank; its counts, `[F, L, E]`."""
    # Rows are never given up: this side waits, the writer does not fall behind.
    writer = TraceWriter(run, _meta(spec, rank), queue_bytes=1 << 62)
    counts_FLE, handed = [], 0
    try:
        for event in events(spec, rank=rank):
            if isinstance(event, Forward):
                counts_FLE.append([layer.routed_GE.sum(0) for layer in event.layers])
                handed += event.row_bytes
            writer.put(event)
            if handed > WAITING_BYTES:
                writer.flush()
                handed = 0
        writer.edit(lambda meta: _end(meta, last))
    finally:
        writer.close()
    if writer.breach_count:
        raise AssertionError(f"a synthetic forward breaks an invariant: {writer.take_breaches()}")
    return np.array(counts_FLE, np.int64)


def _meta(spec: Spec, rank: int) -> Meta:
    return Meta(
        run_id=f"synthetic-{spec.seed}",
        rank=rank,
        world=spec.ranks,
        coordinates={"dp": rank} if spec.ranks > 1 else {},
        model="Synthetic",
        layers=[_card(spec, i) for i in range(spec.layers)],
        sampling="every sequence" if spec.rows else "none",
        tags=list(spec.shares),
        keys=["pair", "variant"] if spec.pairs else [],
        attempts=[Attempt(0, START_NS)],
        versions={"numpy": np.__version__},
    )


def _card(spec: Spec, layer: int) -> LayerInfo:
    return LayerInfo(
        layer,
        f"model.layers.{layer}.mlp",
        spec.experts,
        spec.top_k,
        block=layer,
        adapter="synthetic",
        score="softmax",
        selection="logits",
        normalised=True,
        groups=spec.groups,
        top_groups=spec.groups,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        capacity_policy=None if spec.capacity_factor is None else "drop-by-position",
    )


def _end(meta: Meta, last: Moment) -> None:
    meta.attempts[-1].ended_ns = last.t_start_ns + last.host_ns
    meta.attempts[-1].end = "closed"
