"""What writing and counting cost over the bare libraries that do the work.

Writing: rows of `routing` from capture's events to a sealed segment (Arrow tables built from the
events, appended to the open stream, read back, sorted by layer, written as Parquet) against bare
`pyarrow.parquet.write_table` of the very same rows, from one Arrow table that is built and sorted
already, with the same encodings and row groups. Gate: at least 0.8 of its rate.

Counting: choices per expert as the hooks count them (`moe_lens_hooks.reduce`, several layers at
once) against bare `np.bincount` of each layer's int64 ids. Gate: at least 0.8 of its rate.

Also printed, without a gate: the whole trace writer (invariants, windows and all tables), the
building of the Arrow tables alone, and an A/A pair of each bare side.

    python benchmarks/writer_throughput.py [--quick]
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from _common import Pairs, Report, interleaved, is_quick, scratch, table
from routing_generator import RoutingGenerator, Shape

from moe_lens.trace import layout, rows
from moe_lens.trace.events import Forward
from moe_lens.trace.meta import Attempt, Meta
from moe_lens.trace.schema import TABLES
from moe_lens.trace.segment import ROW_GROUP, open_parquet
from moe_lens.trace.store import TraceStore
from moe_lens.trace.writer import TraceWriter
from moe_lens_hooks.batch import Batch
from moe_lens_hooks.lineage import Line
from moe_lens_hooks.owners import owned_by_rows
from moe_lens_hooks.tally import Tally

ROUTING = TABLES["routing"]


def through_store(run: Path, forwards: list[Forward]) -> None:
    """Build, append, seal: the path that a row of `routing` takes."""
    store = TraceStore(run, Meta("throughput", attempts=[Attempt(0, 0)]))
    for forward in forwards:
        store.append("routing", pa.concat_tables(rows.routing_tables(forward, 0, exact=False)))
    store.close()


def through_writer(run: Path, forwards: list[Forward]) -> None:
    """The whole writer: every table, windows, invariants, a thread of its own."""
    writer = TraceWriter(run, Meta("throughput", attempts=[Attempt(0, 0)]))
    for forward in forwards:
        # The writer lets go of rows it has written; these are needed again.
        again = replace(forward, layers=[replace(x) for x in forward.layers])
        writer.put(again)
    writer.close()
    if writer.lost_rows or writer.breach_count:
        raise SystemExit(f"lost {writer.lost_rows} rows, breaches: {writer.take_breaches()}")


def parquet_options(path: Path) -> dict[str, Any]:
    """What the trace's writer tells pyarrow of encodings, pages, compression and statistics."""
    with mock.patch.object(pq, "ParquetWriter") as writer:
        open_parquet(path, ROUTING)
    return dict(writer.call_args.kwargs)


def writing(folder: Path, forwards: list[Forward], rounds: int) -> dict[str, Pairs]:
    """Pairs with the bare library first."""
    number = itertools.count()

    def run() -> Path:
        return folder / f"run{next(number)}"

    once = run()
    through_store(once, forwards)
    (segment,) = layout.segments(once, "routing", 0).values()
    # Read back as a list of plain chunks, in one piece: what a caller of write_table would hold.
    sealed = pq.read_table(segment).cast(ROUTING.schema).combine_chunks()
    target = folder / "bare.parquet"
    options = parquet_options(target)

    def write_bare() -> None:
        pq.write_table(sealed, target, row_group_size=ROW_GROUP, **options)

    write_bare()
    if abs(target.stat().st_size / segment.stat().st_size - 1) > 0.01:
        raise SystemExit("the two files differ in size: not the same encodings")

    def build() -> None:
        for forward in forwards:
            rows.routing_tables(forward, 0, exact=False)

    sides: dict[str, Callable[[], None]] = {
        "routing rows through the store": lambda: through_store(run(), forwards),
        "bare again (A/A)": write_bare,
        "building the Arrow tables alone": build,
        "the whole trace writer, all tables": lambda: through_writer(run(), forwards),
    }
    return {name: interleaved(write_bare, side, rounds) for name, side in sides.items()}


TOGETHER = 12
"""Layers that the hooks count at once: of this size, about what they hold until they reduce."""


def counting(forward: Forward, rounds: int) -> dict[str, Pairs]:
    """Pairs with `np.bincount` first, over the ids of all layers of a forward."""
    rows = [x.rows.expert_ids_NK for x in forward.layers if x.rows is not None]
    ids_LTK = torch.from_numpy(np.stack(rows).astype(np.int64))
    T, E = ids_LTK.shape[1], forward.layers[0].routed_GE.shape[1]
    tag = np.zeros(1, np.int64)
    tokens = torch.tensor([T])
    owners = owned_by_rows([Line(0, 0)], T, "bs")
    batch = Batch(
        (1, T), ["untagged"], None, False, tokens, owners, tag, None, None, None, None, None
    )
    tally = Tally(batch, E)
    parts = ids_LTK.split(TOGETHER)
    bare_ids = [x.ravel() for x in ids_LTK.numpy()]

    def hooks() -> list[torch.Tensor]:
        return [tally.choices(x) for _ in range(5) for x in parts]

    def bare() -> list[np.ndarray]:
        return [np.bincount(x, minlength=E) for _ in range(5) for x in bare_ids]

    if (torch.cat(hooks()).numpy().reshape(-1, E) != np.stack(bare())).any():
        raise SystemExit("the two counts differ")
    return {
        "counting in the hooks": interleaved(bare, hooks, rounds),
        "np.bincount again (A/A)": interleaved(bare, bare, rounds),
    }


def main() -> int:
    quick = is_quick(__doc__)
    torch.set_num_threads(1)
    shape = Shape(positions=64) if quick else Shape()
    n = 7  # of 196,608 rows: one segment of 1.4 M
    forwards = list(RoutingGenerator(shape).forwards(n))
    token_layers = n * shape.tokens * shape.layers
    report = Report(
        "writer_throughput",
        shape.described() | {"forwards": n, "torch_threads": 1},
        ("torch",),
    )
    with scratch() as folder:
        pairs = writing(folder, forwards, 3 if quick else 7)
    counts = counting(forwards[0], 5 if quick else 31)
    lines = []
    for of, found, units in (
        ("write_table", pairs, token_layers),
        ("bincount", counts, 5 * shape.tokens * shape.layers),
    ):
        for name, p in found.items():
            speed = [units / np.median(side) / 1e6 for side in (p.second, p.first)]
            lines.append([name, f"{speed[0]:.2f}", f"{speed[1]:.2f}", of, f"{1 / p.ratio:.3f}"])
            report.numbers[name] = p.as_dict() | {
                "rate_over_bare": 1 / p.ratio,
                "million_token_layers_per_cpu_s": speed[0],
            }
    table(["M token-layers / CPU s", "it", "bare", "bare is", "rate over bare"], lines)
    report.gate(
        "writing rows, rate over write_table",
        1 / pairs["routing rows through the store"].ratio,
        at_least=0.8,
    )
    report.gate(
        "counting, rate over np.bincount", 1 / counts["counting in the hooks"].ratio, at_least=0.8
    )
    return report.finish(keep=not quick)


if __name__ == "__main__":
    sys.exit(main())
