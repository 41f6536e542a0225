"""How many bytes the trace takes on disk.

Realistic skewed routing (48 layers x 128 experts x top-8, 4,096 tokens a forward) goes through the
trace writer with every token's row; segments are sealed. Gates: at most 20 bytes per token-layer of
the default row (all columns of `routing`), at most 40 kB per window of `load` with one tag. Bytes
of the other tables and of each column are printed beside them.

    python benchmarks/bytes_per_row.py [--quick]

Bytes are exact: the same generator, seed and versions give the same numbers on any machine.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import pyarrow.parquet as pq
from _common import Report, is_quick, progress, scratch, table
from routing_generator import RoutingGenerator, Shape

from moe_lens.trace import layout
from moe_lens.trace.meta import Attempt, Meta
from moe_lens.trace.writer import TraceWriter


def write(run: Path, shape: Shape, forwards: int, *, rows: bool) -> None:
    """A trace of `forwards` forwards, sealed."""
    meta = Meta("bytes", sampling="all sequences" if rows else "none", attempts=[Attempt(0, 0)])
    writer = TraceWriter(run, meta)
    for forward in RoutingGenerator(shape).forwards(forwards, rows=rows):
        writer.put(forward)
        writer.flush()  # rows are never given up, however slow the disk is
        progress(f"forward {forward.step + 1} of {forwards}")
    writer.close()
    if writer.lost_rows or writer.breach_count:
        raise SystemExit(f"lost {writer.lost_rows} rows, breaches: {writer.take_breaches()}")


def bytes_of(run: Path, name: str) -> tuple[int, int, dict[str, int]]:
    """Rows of a table, bytes of its files, compressed bytes of each column."""
    rows, size, columns = 0, 0, defaultdict[str, int](int)
    for path in layout.segments(run, name, 0).values():
        footer = pq.read_metadata(path)
        rows += footer.num_rows
        size += path.stat().st_size
        for group in range(footer.num_row_groups):
            for i in range(footer.num_columns):
                chunk = footer.row_group(group).column(i)
                columns[chunk.path_in_schema.split(".")[0]] += chunk.total_compressed_size
    return rows, size, dict(columns)


def main() -> int:
    quick = is_quick(__doc__)
    # 24 forwards of 196,608 rows make three sealed segments; 250 windows one of `load`.
    shape = Shape(positions=64) if quick else Shape()
    forwards, windows = (4, 4) if quick else (24, 250)
    report = Report(
        "bytes_per_row", shape.described() | {"forwards": forwards, "load_windows": windows}
    )
    with scratch() as folder:
        write(folder / "rows", shape, forwards, rows=True)
        write(folder / "counts", shape, windows, rows=False)
        lines = []
        for run, name, unit, n in (
            ("rows", "routing", "token-layer", forwards * shape.tokens * shape.layers),
            ("rows", "tokens", "token", forwards * shape.tokens),
            ("rows", "sequences", "sequence", forwards * shape.requests),
            ("counts", "load", "window", windows),
            ("counts", "layers", "window", windows),
            ("counts", "routers", "window", windows),
            ("counts", "slices", "window", windows),
            ("counts", "steps", "forward", windows),
        ):
            rows, size, columns = bytes_of(folder / run, name)
            per = {c: b / n for c, b in columns.items()}
            lines += [[name, unit, f"{rows:,}", f"{size / n:,.2f}", f"{size / rows:.2f}"]]
            lines += [
                ["  " + c, "", "", f"{b:,.3f}", f"{b * n / rows:.3f}"] for c, b in per.items()
            ]
            report.numbers[name] = {
                "unit": unit,
                "units": n,
                "rows": rows,
                "bytes_per_unit": size / n,
                "bytes_per_row": size / rows,
                "column_bytes_per_unit": per,
            }
    table(["table", "unit", "rows", "bytes/unit", "bytes/row"], lines)
    row = report.numbers["routing"]["bytes_per_unit"]
    window = report.numbers["load"]["bytes_per_unit"]
    report.gate("routing, bytes per token-layer", row, at_most=20)
    report.gate("load, bytes per window with one tag", window, at_most=40_000)
    return report.finish(keep=not quick)


if __name__ == "__main__":
    sys.exit(main())
