"""What a notebook shows of a trace and of an answer: compact tables, every text escaped."""

from __future__ import annotations

import html
import re
from pathlib import Path

from support.traces import write_run

from moe_lens.queries.session import open_trace

EVIL = "<script>alert('1')</script> & \"q\""


def cells(text: str, kind: str) -> list[str]:
    return [html.unescape(found) for found in re.findall(rf"<{kind}>(.*?)</{kind}>", text)]


def test_a_trace_shows_the_facts_of_each_run(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / name, steps=3, tokens=20, seed=i, model=EVIL).path
        for i, name in enumerate(("a", "<b>"))
    ]
    with open_trace(paths) as trace:
        shown = trace._repr_html_()
    assert cells(shown, "caption") == ["a", "<b>"]
    assert cells(shown, "th").count("forwards") == 2
    assert cells(shown, "td").count("3 (0 to 2)") == 2  # steps
    assert cells(shown, "td").count(EVIL) == 2
    assert "<script>" not in shown
    assert "<b>" not in shown


def test_a_closed_trace_says_so(tmp_path: Path) -> None:
    trace = open_trace(write_run(tmp_path / "a").path)
    trace.close()
    assert trace._repr_html_() == "<p>&lt;moe_lens.Trace closed&gt;</p>"


def test_an_answer_shows_its_first_rows(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", steps=3, tokens=30, tags=(EVIL, "code"))
    with open_trace(run.path) as trace:
        shown = trace.query("loss_by_tag")._repr_html_()
        long = trace.table("load")
    assert cells(shown, "th")[:3] == ["run", "phase", "tag"]
    assert EVIL in cells(shown, "td")
    assert "<script>" not in shown
    assert long._repr_html_().count("<tr>") == 21
    assert f"and {len(long) - 20:,} more rows" in long._repr_html_()
