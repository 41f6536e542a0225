"""The tables of the format as Markdown: `python -m moe_lens.trace.describe > docs/trace-tables.md`.

docs/trace-tables.md is this text; a test compares them.
"""

from __future__ import annotations

from moe_lens.trace.precision import PRECISION
from moe_lens.trace.schema import (
    COUNTERFACTUAL,
    LOAD_COARSE,
    REPLAY,
    REPLAY_EP,
    SCHEMA_VERSION,
    TABLES,
    Table,
)


def markdown() -> str:
    """Every table and column of the format."""
    head = (
        f"# The tables of trace format {SCHEMA_VERSION}\n\n"
        "Generated from `moe_lens/trace/schema.py`; see [ARCHITECTURE](../ARCHITECTURE.md) for how "
        "the files lie on disk. The views of `moe_lens.open` put `run` and `rank` in front.\n"
    )
    more = (LOAD_COARSE, REPLAY, REPLAY_EP, COUNTERFACTUAL, PRECISION)
    return head + "".join(_table(t) for t in (*TABLES.values(), *more))


def _table(table: Table) -> str:
    where = "file" if table in (REPLAY, REPLAY_EP, COUNTERFACTUAL, PRECISION) else "segment"
    order = f"sorted by {', '.join(table.sort)}" if table.sort else "in order of arrival"
    lines = [
        f"\n## {table.name}\n",
        f"A row is {table.row}. In a {where}: {order}.\n",
        "| column | type | null | meaning |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| `{c.name}` | {str(c.type).replace('element: ', '')} | "
        f"{'yes' if c.nullable else ''} | {c.doc} |"
        for c in table.columns
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")  # noqa: T201
