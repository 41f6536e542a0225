"""examples/look.py as a notebook runs it: cell by cell, the last expression of each displayed."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "look.py"


def cells() -> list[str]:
    parts = re.split(r"^# %%", EXAMPLE.read_text("utf-8"), flags=re.MULTILINE)[1:]
    return [part for part in parts if not part.startswith(" [markdown]")]


def run(cell: str, names: dict[str, Any]) -> Any:
    """Run a cell; what it ends with, or None."""
    body = ast.parse(cell).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), EXAMPLE.name, "exec"), names)
    if last is None:
        return None
    return eval(compile(ast.Expression(last.value), EXAMPLE.name, "eval"), names)


def test_its_cells_display_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    names: dict[str, Any] = {"__name__": "__main__"}
    shown = [run(cell, names) for cell in cells()]
    pages = [each._repr_html_() for each in shown if each is not None]
    names["trace"].close()
    assert len(pages) == 5
    assert "4 layers × 16 experts × top-4" in pages[0]
    assert "<td>low bytes</td>" in pages[1]
    for page in pages[2:]:
        assert "Plotly.newPlot" in page
    assert (tmp_path / "traces" / "look" / "meta" / "rank=0.json").exists()
