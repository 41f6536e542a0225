"""The documented tables are the tables."""

from __future__ import annotations

from pathlib import Path

from moe_lens.trace.describe import markdown
from moe_lens.trace.schema import TABLES

PAGE = Path(__file__).parents[3] / "docs" / "trace-tables.md"


def test_the_page_is_generated_from_the_schema():
    assert PAGE.read_text(encoding="utf-8") == markdown(), (
        "regenerate it: python -m moe_lens.trace.describe > docs/trace-tables.md"
    )


def test_every_column_says_what_it_means():
    for table in TABLES.values():
        assert all(c.doc for c in table.columns), table.name
