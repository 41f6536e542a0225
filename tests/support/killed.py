"""A recording that is killed, and what must be left of it: for the test and for the benchmark.

As a script this is the child: it records made-up routing, flushes now and then, says on its output
what was flushed, and goes on until it is killed.

    python -m support.killed RUN SEED writer|record

`kill_once` is the parent. It kills the child at a random moment and then asks everything that a
trace promises: what was flushed is there, to the last number; `recover` changes nothing that is
read; a resumed recording goes on.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from moe_lens.trace import layout
from moe_lens.trace.events import Forward, LayerCounts, LayerRows, StepEnd, TokenRows
from moe_lens.trace.lock import RankLock
from moe_lens.trace.meta import Attempt, LayerInfo, Meta
from moe_lens.trace.writer import TraceWriter

L, E, K, B, S = 4, 16, 2, 4, 16  # layers, experts, top-k, sequences, positions
T = B * S
TAGS = ("code", "prose")
SEAL_ROWS = 1500  # rows of six steps: a kill often finds the writer sealing
MODES = ("writer", "record")


@dataclass
class Routing:
    """What one step routes, from the seed and the step's number alone."""

    expert_ids_LTK: np.ndarray
    weights_LTK: np.ndarray
    tag_B: np.ndarray

    @property
    def tag_T(self) -> np.ndarray:
        return np.repeat(self.tag_B, S)

    def counts_GE(self, layer: int) -> np.ndarray:
        cell = self.tag_T[:, None] * E + self.expert_ids_LTK[layer]
        return np.bincount(cell.ravel(), minlength=len(TAGS) * E).reshape(len(TAGS), E)


def routing(seed: int, step: int) -> Routing:
    g = np.random.default_rng([seed, step])
    first = g.integers(0, E, (L, T))
    ids = np.stack([first, (first + g.integers(1, E, (L, T))) % E], -1)
    return Routing(ids, g.random((L, T, K), dtype=np.float32), g.integers(0, 2, B))


# -- the child -----------------------------------------------------------------------------------


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())  # at once and whole: a buffer would die with the process


def write_until_killed(run: Path, seed: int) -> None:
    """Through the trace writer: no torch, so the child starts quickly."""
    lock = RankLock(run, 0)
    # As `record` will know them that resumes this trace: a layer keeps its number by its path.
    layers = [LayerInfo(i, str(i), E, K, adapter="rec.log") for i in range(L)]
    meta = Meta("killed", layers=layers, weights="exact", attempts=[Attempt(0, time.time_ns())])
    writer = TraceWriter(run, meta, seal_rows=SEAL_ROWS)
    say("ready")
    g = np.random.default_rng(seed)
    for step in range(1_000_000):
        writer.put(as_forward(routing(seed, step), step))
        writer.put(StepEnd(step))
        if g.random() < 0.3:
            writer.flush()
            say(f"flushed {step}")
    lock.release()


def as_forward(x: Routing, step: int) -> Forward:
    token_T = np.arange(T, dtype=np.int32)
    tokens_G = np.bincount(x.tag_T, minlength=2)
    layers = [
        LayerCounts(
            layer=i,
            tokens=T,
            padding_tokens=0,
            tokens_G=tokens_G,
            routed_GE=x.counts_GE(i),
            processed_GE=x.counts_GE(i),
            weight_sum_GE=np.zeros((2, E)),
            top_k=K,
            rows=LayerRows(token_T, x.expert_ids_LTK[i].astype(np.int32), x.weights_LTK[i]),
        )
        for i in range(L)
    ]
    tokens = TokenRows(
        stream="main",
        token_N=token_T,
        sequence_N=np.repeat(step * B + np.arange(B), S),
        position_N=np.tile(np.arange(S, dtype=np.int32), B),
        padding_N=np.zeros(T, bool),
        tag_N=x.tag_T.astype(np.int32),
    )
    return Forward(
        step=step,
        forward=0,
        phase="train",
        t_start_ns=0,
        tags=list(TAGS),
        tokens_G=tokens_G,
        sequences_G=np.bincount(x.tag_B, minlength=2),
        layers=layers,
        tokens=[tokens],
        sampled=True,
    )


@contextmanager
def recorder(run: Path, *, resume: bool = False) -> Any:
    """A recorder that is handed the routing, and seals as often as the writer above."""
    from functools import partial

    import moe_lens_hooks.recorder as module

    module.TraceWriter = partial(TraceWriter, seal_rows=SEAL_ROWS)  # type: ignore[misc, assignment]
    try:
        with module.Recorder(None, run, tokens=1.0, weights="exact", resume=resume) as rec:
            yield rec
    finally:
        module.TraceWriter = TraceWriter  # type: ignore[misc]


def log_step(rec: Any, x: Routing, step: int) -> None:
    import torch

    with rec.step(tags=[TAGS[t] for t in x.tag_B], phase="train", number=step):
        for i in range(L):
            ids = torch.from_numpy(x.expert_ids_LTK[i].reshape(B, S, K))
            rec.log(i, ids, torch.from_numpy(x.weights_LTK[i].reshape(B, S, K)), experts=E)


def record_until_killed(run: Path, seed: int) -> None:
    """Through `record`, by its method for a router of one's own."""
    with recorder(run) as rec:
        say("ready")
        g = np.random.default_rng(seed)
        for step in range(1_000_000):
            log_step(rec, routing(seed, step), step)
            if g.random() < 0.3:
                rec.flush()
                say(f"flushed {step}")


# -- the parent ----------------------------------------------------------------------------------


@dataclass
class Outcome:
    """One kill."""

    mode: str
    flushed: int
    """Steps that the child said were flushed."""
    found: int
    """Steps in the trace after the kill."""
    sealed: int
    """Segments of any table."""
    sealing: bool
    """The kill met a segment half written, or written with its stream not removed yet."""
    torn: bool
    """The kill met a batch half appended."""
    wrong: list[str]
    """What broke a promise; empty when all held."""


def kill_once(run: Path, seed: int, mode: str, *, longest: float = 0.7) -> Outcome:
    """Start a child, kill it up to `longest` seconds after it is ready, and ask the trace."""
    delay = float(np.random.default_rng([seed, 1]).uniform(0, longest))
    flushed = 1 + _kill(run, seed, mode, delay)
    sealing, torn = _caught(run)
    wrong: list[str] = []
    found = 0
    if layout.ranks(run):  # else it died before the first file, and nothing was flushed
        before = _everything(run)
        found = before["steps"].num_rows
        wrong += [f"after the kill: {x}" for x in _compare(before, seed, flushed)]
        wrong += _recover(run, before)
    elif flushed:
        wrong.append(f"{flushed} steps were flushed, but there is no trace")
    sealed = len(list(run.glob("*/rank=0/seg-*.parquet")))
    more = 3
    with recorder(run, resume=True) as rec:
        for step in range(flushed, flushed + more):
            log_step(rec, routing(seed, step), step)
    after = _everything(run)
    wrong += [f"after resuming: {x}" for x in _compare(after, seed, flushed + more)]
    if after["steps"].num_rows != flushed + more:
        wrong.append(f"after resuming: {after['steps'].num_rows} steps, not {flushed + more}")
    return Outcome(mode, flushed, found, sealed, sealing, torn, wrong)


def _kill(run: Path, seed: int, mode: str, delay: float) -> int:
    """The last step that the child said was flushed; -1: none."""
    argv = [sys.executable, "-m", "support.killed", str(run), str(seed), mode]
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    child = subprocess.Popen(argv, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": path})
    assert child.stdout is not None
    if child.stdout.readline() != b"ready\n":
        raise RuntimeError(f"the child did not start (status {child.wait()})")
    time.sleep(delay)
    child.send_signal(signal.SIGKILL)
    said, _ = child.communicate()
    if child.returncode != -signal.SIGKILL:
        raise RuntimeError(f"the child ended by itself (status {child.returncode})")
    return int(said.split()[-1]) if said else -1


def _caught(run: Path) -> tuple[bool, bool]:
    """(in the middle of sealing, in the middle of appending)."""
    streams = layout.streams(run, 0)
    sealing = any(run.glob("*/rank=0/.*.tmp"))
    sealing |= any(layout.segment_path(run, name, 0, seq).exists() for name, seq in streams)
    return sealing, any(_torn(p) for p in streams.values())


def _torn(path: Path) -> bool:
    try:
        for _ in pa.ipc.open_stream(pa.memory_map(str(path))):
            pass
    except (pa.ArrowInvalid, OSError):
        return True
    return False


def _everything(run: Path) -> dict[str, pa.Table]:
    """All tables through DuckDB, in an order that does not depend on how they are stored."""
    import moe_lens

    names = ("load", "layers", "slices", "steps", "tokens", "routing")
    with moe_lens.open(run) as trace:
        return {n: trace.sql(f"from {n} order by all").arrow() for n in names}


def _recover(run: Path, before: dict[str, pa.Table]) -> list[str]:
    from moe_lens.trace.recover import recover

    recover(run)
    after = _everything(run)
    wrong = [f"recover changed {n}" for n in before if not after[n].equals(before[n])]
    left = [*layout.streams(run, 0).values(), *run.glob("*/rank=0/.*.tmp")]
    return wrong + [f"recover left {p.name}" for p in left]


def _compare(tables: dict[str, pa.Table], seed: int, steps: int) -> list[str]:
    """What is missing of the first `steps` steps, or wrong in any step that is there."""
    wrong = []
    missing = set(range(steps)) - set(tables["steps"].column("step").to_pylist())
    if missing:
        wrong.append(f"steps {sorted(missing)} are missing")
    want = {step: routing(seed, step) for step in _steps(tables, steps)}
    for name, rows_of in (
        ("routing", _routing_rows),
        ("load", _load_rows),
        ("tokens", _token_rows),
    ):
        got = _by_step(tables[name], COLUMNS[name])
        for step, x in want.items():
            expected, there = rows_of(x), got.get(step, set())
            # A table may lack a step that was not flushed; what it has must be right.
            if (step < steps and there != expected) or not there <= expected:
                lost, odd = len(expected - there), len(there - expected)
                wrong.append(f"{name}, step {step}: {lost} rows missing, {odd} wrong")
        rows = tables[name].num_rows
        if rows != sum(len(x) for x in got.values()):
            wrong.append(f"{name}: rows stand twice in it")
    return wrong


COLUMNS = {
    "routing": ("layer", "token", "expert_ids", "weights"),
    "load": ("layer", "tag", "expert", "routed", "processed"),
    "tokens": ("token", "position", "tag"),
}


def _steps(tables: dict[str, pa.Table], steps: int) -> list[int]:
    there = {s for n in COLUMNS for s in tables[n].column("step").to_pylist()}
    return sorted(there | set(range(steps)))


def _by_step(table: pa.Table, columns: tuple[str, ...]) -> dict[int, set[tuple[Any, ...]]]:
    out: dict[int, set[tuple[Any, ...]]] = {}
    lists = [_hashable(table.column(c)) for c in columns]
    for step, *row in zip(table.column("step").to_pylist(), *lists, strict=True):
        out.setdefault(step, set()).add(tuple(row))
    return out


def _hashable(column: pa.ChunkedArray) -> list[Any]:
    values = column.to_pylist()
    return [tuple(v) for v in values] if pa.types.is_list(column.type) else values


def _routing_rows(x: Routing) -> set[tuple[Any, ...]]:
    ids, weights = x.expert_ids_LTK.tolist(), x.weights_LTK.tolist()
    return {(i, t, tuple(ids[i][t]), tuple(weights[i][t])) for i in range(L) for t in range(T)}


def _load_rows(x: Routing) -> set[tuple[Any, ...]]:
    out = set()
    for i in range(L):
        for g, e in zip(*np.nonzero(n := x.counts_GE(i)), strict=True):
            out.add((i, TAGS[g], int(e), int(n[g, e]), int(n[g, e])))
    return out


def _token_rows(x: Routing) -> set[tuple[Any, ...]]:
    return {(t, t % S, TAGS[tag]) for t, tag in enumerate(x.tag_T)}


if __name__ == "__main__":
    {"writer": write_until_killed, "record": record_until_killed}[sys.argv[3]](
        Path(sys.argv[1]), int(sys.argv[2])
    )
