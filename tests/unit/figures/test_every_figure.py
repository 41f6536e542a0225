"""What holds for every figure: any size, no rows, no numbers, any text, either look."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from support.figure_tables import COMPUTED, FIGURES, answers
from support.traces import layer_info, meta

import moe_lens.figures
from moe_lens.figures.load_difference import load_difference
from moe_lens.figures.theme import dressed, template
from moe_lens.queries.session import open_trace
from moe_lens.trace.meta import write_meta

EVIL = "<b>bold</b> & \"q\" <a href='x'>%{x}</a> $\\alpha$"
HARMLESS = "&lt;b&gt;bold&lt;/b&gt; &amp; "


def draw(name: str, table: pd.DataFrame) -> go.Figure:
    return getattr(import_module(f"moe_lens.figures.{name}"), name)(table)


def texts(value: object) -> Iterator[str]:
    """Every text of a figure that Plotly shows, wherever it stands."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from texts(each)
    elif isinstance(value, list | tuple | np.ndarray):
        for each in value:
            yield from texts(each)


def test_every_figure_is_tested() -> None:
    folder = Path(moe_lens.figures.__path__[0])
    drawing = {p.stem for p in folder.glob("*.py") if f"def {p.stem}(" in p.read_text("utf-8")}
    # What is shared by figures is called after what it does, not after a file.
    assert drawing - {"blank", "dots", "heat", "layered", "rates"} == {*FIGURES, "load_difference"}


@pytest.mark.parametrize("name", FIGURES)
def test_an_empty_table_is_a_sentence(name: str) -> None:
    table = answers()[FIGURES[name]].iloc[:0]
    made = draw(name, table)
    assert len(made.data) == 0
    assert not made.layout.xaxis.visible
    sentence = made.layout.annotations[0].text.replace("<br>", " ")
    assert sentence.endswith(".")
    assert len(sentence) > 15
    assert made.layout.title.text


@pytest.mark.parametrize("name", FIGURES)
def test_columns_of_nulls_are_no_error(name: str) -> None:
    table = answers()[FIGURES[name]]
    keys = ["run", "layer", "expert", "step", "phase", "tag", "place", "position", "companion",
            "other", "next_expert", "capacity_factor", "low", "high", "source",
            "result", "kind", "value", "forwards", "dropped"]  # fmt: skip
    for nothing in (None, np.nan):
        empty = table.copy()
        for column in set(table.columns) - set(keys[:-1] if name != "quality_of_dropped" else keys):
            empty[column] = pd.Series([nothing] * len(table), dtype=object)
        assert draw(name, empty).layout.title.text


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize(("layers", "experts"), [(1, 1), (3, 4), (12, 40)])
def test_sizes(name: str, layers: int, experts: int) -> None:
    table = answers(layers, experts).get(FIGURES[name])
    if table is None:  # one expert has no other to be chosen with
        assert (name, experts) == ("co_activation", 1)
        return
    made = draw(name, table)
    assert len(made.data) > 0
    json.loads(made.to_json())
    assert 80 <= made.layout.height <= 1000


@pytest.mark.parametrize(
    "name", [n for n, q in FIGURES.items() if "tag" in answers()[q] and n != "drops_by_layer"]
)
def test_tags_are_shown_as_text(name: str) -> None:
    made = draw(name, answers(tags=(EVIL, "prose"))[FIGURES[name]])
    made.layout.template = None
    shown = list(texts(made.to_dict()))
    assert any(HARMLESS in text for text in shown), "the tag is nowhere to be seen"
    assert not any("<b>bold" in text or "<a href" in text for text in shown)
    # Inserted into a template, its own placeholder would be filled in.
    templates = [t.hovertemplate for t in made.data] + [t.texttemplate for t in made.data]
    assert not any("alpha" in t for t in templates if t)


@pytest.mark.parametrize("name", FIGURES)
def test_both_looks(name: str) -> None:
    light = draw(name, answers()[FIGURES[name]])
    dark = dressed(light, dark=True)
    assert light.layout.template == template()
    assert dark.layout.template == template(dark=True) != light.layout.template
    # Whatever depends on the look stands in the template: nothing else differs.
    a, b = light.to_dict(), dark.to_dict()
    del a["layout"]["template"], b["layout"]["template"]
    assert json.dumps(a, default=str, sort_keys=True) == json.dumps(b, default=str, sort_keys=True)


@pytest.mark.parametrize("name", FIGURES)
def test_axes_have_titles(name: str) -> None:
    made = draw(name, answers()[FIGURES[name]])
    named = [made.layout.xaxis.title.text, made.layout.yaxis.title.text]
    labelled = made.layout.yaxis.ticktext  # tags and experts need no title
    assert named[0]
    assert named[1] or labelled


@pytest.mark.parametrize("name", FIGURES)
def test_a_table_of_two_runs_is_refused(name: str) -> None:
    table = answers()[FIGURES[name]]
    both = pd.concat([table, table.assign(run="run2")])
    with pytest.raises(ValueError, match=r"has 2: 'run1', 'run2'.*table.run == 'run1'"):
        draw(name, both)


def test_the_tables_have_the_columns_of_the_questions(tmp_path: Path) -> None:
    write_meta(tmp_path, meta(0, layers=[layer_info(0, 4)]))
    made = answers()
    with open_trace(tmp_path) as trace:
        for name in sorted(set(FIGURES.values()) - COMPUTED):
            assert set(made[name].columns) <= set(trace.query(name).columns), name


def test_a_difference_of_nothing_is_a_sentence() -> None:
    table = answers()["load_map"]
    made = load_difference(table.iloc[:0], table)
    assert len(made.data) == 0
    assert "no layer in common" in made.layout.annotations[0].text
